//! The parts of a reply: reasoning, text and tool calls, told apart by the tags that models write.

use serde::Deserialize;
use serde_json::Value;

use super::text::n_held_back;

const THINK: &str = "<think>";
const THINK_END: &str = "</think>";
const TOOL: &str = "<tool_call>";
const TOOL_END: &str = "</tool_call>";

/// A part of a reply, or more of the last one.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Part {
    Thinking(String),
    Text(String),
    Tool(ToolCall),
}

/// A call that the model asks for.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub(crate) struct ToolCall {
    pub(crate) name: String,
    /// The arguments by name.
    #[serde(default)]
    pub(crate) arguments: Value,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but white space so far.
    Start,
    /// White space before reasoning.
    ThinkStart,
    Thinking,
    /// White space after reasoning or a call.
    Between,
    Text,
    Tool,
}

/// Splits one reply as it comes.
#[derive(Debug)]
pub(crate) struct Splitter {
    state: State,
    /// Whether tool calls are looked for.
    with_tools: bool,
    held: String,
}

impl Splitter {
    pub(crate) const fn new(with_tools: bool) -> Self {
        Self {
            state: State::Start,
            with_tools,
            held: String::new(),
        }
    }

    /// The parts that more text adds.
    pub(crate) fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        while self.step(&mut parts) {}
        parts
    }

    /// The rest. A call that was left open is kept as text.
    pub(crate) fn finish(&mut self) -> Vec<Part> {
        let rest = std::mem::take(&mut self.held);
        match self.state {
            State::Thinking if !rest.is_empty() => vec![Part::Thinking(rest)],
            State::Text if !rest.is_empty() => vec![Part::Text(rest)],
            State::Tool => match serde_json::from_str(rest.trim()) {
                Ok(call) => vec![Part::Tool(call)],
                Err(_) => vec![Part::Text(format!("{TOOL}{rest}"))],
            },
            State::Start | State::Between if !rest.trim().is_empty() => {
                vec![Part::Text(rest.trim_start().to_owned())]
            }
            _ => Vec::new(),
        }
    }

    /// Takes one step; true if there may be another.
    fn step(&mut self, parts: &mut Vec<Part>) -> bool {
        match self.state {
            State::Start | State::Between => self.begin(),
            State::ThinkStart => {
                self.held = self.held.trim_start().to_owned();
                if self.held.is_empty() {
                    return false;
                }
                self.state = State::Thinking;
                true
            }
            State::Thinking => self.until(THINK_END, State::Between, parts, Part::Thinking),
            State::Text if self.with_tools => self.until(TOOL, State::Tool, parts, Part::Text),
            State::Text => {
                if !self.held.is_empty() {
                    parts.push(Part::Text(std::mem::take(&mut self.held)));
                }
                false
            }
            State::Tool => self.end_of_call(parts),
        }
    }

    fn begin(&mut self) -> bool {
        let text = self.held.trim_start();
        let may_think = self.state == State::Start;
        if may_think && text.starts_with(THINK) {
            self.held = text[THINK.len()..].to_owned();
            self.state = State::ThinkStart;
            return true;
        }
        if text.is_empty() || (may_think && THINK.starts_with(text)) {
            return false;
        }
        self.held = text.to_owned();
        self.state = State::Text;
        true
    }

    /// Gives what comes before a tag, and goes on after it.
    fn until(
        &mut self,
        tag: &str,
        next: State,
        parts: &mut Vec<Part>,
        part: fn(String) -> Part,
    ) -> bool {
        let found = self.held.find(tag);
        let n_held = || n_held_back(&self.held, std::iter::once(tag));
        // White space before a tag is no part of the text.
        let may_show = || self.held[..self.held.len() - n_held()].trim_end().len();
        let end = found.unwrap_or_else(may_show);
        let rest = self.held.split_off(end);
        let mut before = std::mem::replace(&mut self.held, rest);
        if found.is_some() {
            before.truncate(before.trim_end().len());
            self.held.drain(..tag.len());
            self.state = next;
        }
        if !before.is_empty() {
            parts.push(part(before));
        }
        found.is_some()
    }

    fn end_of_call(&mut self, parts: &mut Vec<Part>) -> bool {
        let Some(end) = self.held.find(TOOL_END) else {
            return false;
        };
        let rest = self.held.split_off(end + TOOL_END.len());
        let call = std::mem::replace(&mut self.held, rest);
        self.state = State::Between;
        parts.push(match serde_json::from_str(call[..end].trim()) {
            Ok(call) => Part::Tool(call),
            Err(_) => Part::Text(format!("{TOOL}{call}")),
        });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All parts of a reply that comes `n` characters at a time, neighbours of a kind joined.
    fn split(text: &str, n: usize) -> Vec<Part> {
        let mut splitter = Splitter::new(true);
        let chars: Vec<char> = text.chars().collect();
        let mut all: Vec<Part> = Vec::new();
        let mut add = |part: Part| match (all.last_mut(), part) {
            (Some(Part::Text(before)), Part::Text(more)) => before.push_str(&more),
            (Some(Part::Thinking(before)), Part::Thinking(more)) => before.push_str(&more),
            (_, part) => all.push(part),
        };
        for piece in chars.chunks(n) {
            let piece: String = piece.iter().collect();
            splitter.push(&piece).into_iter().for_each(&mut add);
        }
        splitter.finish().into_iter().for_each(&mut add);
        all
    }

    fn call(name: &str, arguments: Value) -> Part {
        Part::Tool(ToolCall {
            name: name.to_owned(),
            arguments,
        })
    }

    fn text(text: &str) -> Part {
        Part::Text(text.to_owned())
    }

    #[test]
    fn parts_do_not_depend_on_how_the_text_comes() {
        let call_a = "<tool_call>\n{\"name\": \"a\", \"arguments\": {\"x\": 1}}\n</tool_call>";
        let cases = [
            (" plain < text ".to_owned(), vec![text("plain < text ")]),
            (
                "<think>\nhm\n</think>\n\nyes".to_owned(),
                vec![Part::Thinking("hm".into()), text("yes")],
            ),
            (
                format!("so\n{call_a}\n{call_a}"),
                vec![
                    text("so"),
                    call("a", serde_json::json!({"x": 1})),
                    call("a", serde_json::json!({"x": 1})),
                ],
            ),
            (
                "<tool_call>no json</tool_call>!".to_owned(),
                vec![text("<tool_call>no json</tool_call>!")],
            ),
            (
                "<tool_call>{\"name\": \"b\"}".to_owned(),
                vec![call("b", Value::Null)],
            ),
            (
                "a <tool_call>{\"na".to_owned(),
                vec![text("a<tool_call>{\"na")],
            ),
            ("  ".to_owned(), vec![]),
        ];
        for (reply, expected) in cases {
            for n in [1, 2, 5, 1000] {
                assert_eq!(split(&reply, n), expected, "{reply:?} by {n}");
            }
        }
    }

    #[test]
    fn without_tools_calls_are_text() {
        let mut splitter = Splitter::new(false);

        let parts = splitter.push("<tool_call>{}</tool_call>");

        assert_eq!(parts, [text("<tool_call>{}</tool_call>")]);
    }
}
