//! Conversations to prompts, with tools in the form that Qwen's and Hermes' models were taught: the
//! signatures in the system message, calls and their results in tags.

use serde_json::{Value, json};
use tinker_chat::{Message, Renderer, Role, Tokenizer};
use tinker_types::Stop;

use super::split::ToolCall;
use crate::api_error::{ApiError, ApiResult};

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tool {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    /// JSON schema of the arguments.
    pub(crate) parameters: Value,
}

/// What tells the model about its tools (the chat template of Qwen 2.5 and 3).
fn tools_text(tools: &[Tool]) -> String {
    let mut text = String::from(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n\
         You are provided with function signatures within <tools></tools> XML tags:\n<tools>",
    );
    for tool in tools {
        let function = json!({
            "name": tool.name, "description": tool.description, "parameters": tool.parameters,
        });
        text.push_str(&format!(
            "\n{}",
            json!({"type": "function", "function": function})
        ));
    }
    text.push_str(
        "\n</tools>\n\nFor each function call, return a json object with function name and \
         arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": \
         <function-name>, \"arguments\": <args-json-object>}\n</tool_call>",
    );
    text
}

/// A reply with its calls as the model wrote it.
pub(crate) fn with_calls(text: &str, calls: &[ToolCall]) -> String {
    let mut all = text.to_owned();
    for call in calls {
        if !all.is_empty() {
            all.push('\n');
        }
        let body = json!({"name": call.name, "arguments": call.arguments});
        all.push_str(&format!("<tool_call>\n{body}\n</tool_call>"));
    }
    all
}

/// The prompt for the next message of the assistant, which begins with `prefill`.
///
/// # Errors
/// 400 if the model's chat format has no place for a message.
pub(crate) fn prompt(
    renderer: &dyn Renderer,
    tokenizer: &Tokenizer,
    mut messages: Vec<Message>,
    tools: &[Tool],
    prefill: Option<&str>,
) -> ApiResult<Vec<u32>> {
    if messages.is_empty() {
        return Err(ApiError::bad_request(
            "messages is empty: send at least one",
        ));
    }
    if !tools.is_empty() {
        add_tools(&mut messages, tools);
    }
    let bad = |e: tinker_chat::Error| ApiError::bad_request(format!("messages: {e}"));
    let mut tokens = renderer
        .build_generation_prompt(&messages, Role::Assistant)
        .map_err(bad)?;
    if let Some(text) = prefill {
        tokens.extend(tokenizer.encode_text(text).map_err(bad)?);
    }
    Ok(tokens)
}

fn add_tools(messages: &mut Vec<Message>, tools: &[Tool]) {
    let text = tools_text(tools);
    match messages.first_mut() {
        Some(first) if first.role == Role::System => {
            first.content = format!("{}\n\n{text}", first.content);
        }
        _ => messages.insert(0, Message::system(text)),
    }
}

/// Everything that ends a reply, as text: the chat format's stop, the end of text, and what the
/// request asks for.
///
/// # Errors
/// 400 if a stop is empty.
pub(crate) fn stops(
    tokenizer: &Tokenizer,
    renderer: Option<&dyn Renderer>,
    asked: Vec<String>,
) -> ApiResult<Vec<String>> {
    if let Some(i) = asked.iter().position(String::is_empty) {
        return Err(ApiError::bad_request(format!("stop {i} is empty")));
    }
    let mut all = asked;
    let mut tokens = tokenizer.eos_token_ids().to_vec();
    match renderer.map(Renderer::stop) {
        Some(Stop::Text(text)) => all.push(text),
        Some(Stop::Texts(texts)) => all.extend(texts),
        Some(Stop::Tokens(ids)) => tokens.extend(ids),
        None => {}
    }
    for token in tokens {
        // A token that has no text ends nothing that could be shown.
        all.extend(
            tokenizer
                .decode(&[token])
                .ok()
                .filter(|text| !text.is_empty()),
        );
    }
    all.dedup();
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_join_the_system_message_or_make_one() {
        let tools = [Tool {
            name: "f".into(),
            description: None,
            parameters: json!({"type": "object"}),
        }];
        let mut with = vec![Message::system("be kind"), Message::user("hi")];
        let mut without = vec![Message::user("hi")];

        add_tools(&mut with, &tools);
        add_tools(&mut without, &tools);

        assert!(with[0].content.starts_with("be kind\n\n# Tools"));
        assert_eq!((with.len(), without.len()), (2, 2));
        assert!(without[0].content.contains("\"name\":\"f\""));
    }

    #[test]
    fn calls_are_written_as_they_are_read() {
        let call = ToolCall {
            name: "f".into(),
            arguments: json!({"x": 1}),
        };

        let text = with_calls("so", std::slice::from_ref(&call));

        let mut splitter = super::super::split::Splitter::new(true);
        let mut parts = splitter.push(&text);
        parts.extend(splitter.finish());
        assert_eq!(
            parts,
            [
                super::super::split::Part::Text("so".into()),
                super::super::split::Part::Tool(call)
            ]
        );
    }
}
