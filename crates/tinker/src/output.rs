//! What a command returns, and the only place that writes to standard output.

use std::io::{self, IsTerminal as _, Write as _};

use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use serde_json::Value;

/// How data is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub(crate) enum Format {
    // No doc comments: they would put every flag's help on a line of its own.
    // For people.
    #[default]
    Table,
    // One document.
    Json,
    // One document per row.
    Jsonl,
}

/// The data that a command produced, in the form for people and in the form for programs.
#[derive(Debug)]
pub(crate) struct Output {
    text: Text,
    json: Value,
    /// Key of the array in `json` whose elements are the rows of `jsonl`.
    rows: Option<&'static str>,
    /// What to say on standard error once the data is out.
    note: Option<String>,
}

#[derive(Debug)]
enum Text {
    /// Printed as it is, with a line break after it if it has none.
    Lines(String),
    Table {
        header: Vec<&'static str>,
        rows: Vec<Vec<String>>,
    },
}

impl Output {
    /// No data: whatever there was to say went to standard error.
    pub(crate) fn none() -> Self {
        Self {
            text: Text::Lines(String::new()),
            json: Value::Null,
            rows: None,
            note: None,
        }
    }

    /// A text, and the document that says the same.
    pub(crate) fn text(text: impl Into<String>, json: Value) -> Self {
        Self {
            text: Text::Lines(text.into()),
            json,
            rows: None,
            note: None,
        }
    }

    /// A list: `{"<key>": [...]}` in JSON, a table with `header` for people.
    pub(crate) fn list<T: Serialize>(
        key: &'static str,
        items: &[T],
        header: &[&'static str],
        row: impl Fn(&T) -> Vec<String>,
    ) -> serde_json::Result<Self> {
        Ok(Self {
            text: Text::Table {
                header: header.to_vec(),
                rows: items.iter().map(row).collect(),
            },
            json: serde_json::json!({ key: serde_json::to_value(items)? }),
            rows: Some(key),
            note: None,
        })
    }

    /// One thing: its JSON as it is, a table of properties for people.
    pub(crate) fn properties(rows: Vec<(String, String)>, json: Value) -> Self {
        Self {
            text: Text::Table {
                header: vec!["Property", "Value"],
                rows: rows
                    .into_iter()
                    .map(|(key, value)| vec![key, value])
                    .collect(),
            },
            json,
            rows: None,
            note: None,
        }
    }

    /// The same data; a list of nothing says so on standard error.
    pub(crate) fn or_note(self, note: &str) -> Self {
        match &self.text {
            Text::Table { rows, .. } if rows.is_empty() => self.with_note(note),
            _ => self,
        }
    }

    /// The same data with something to say on standard error after it.
    pub(crate) fn with_note(mut self, note: impl Into<String>) -> Self {
        self.note = Some(note.into());
        self
    }

    /// What to say on standard error once the data is out.
    pub(crate) fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }

    /// Writes the data in `format`; a reader that went away is no error.
    ///
    /// # Errors
    /// Standard output cannot be written.
    pub(crate) fn print(&self, format: Format) -> io::Result<()> {
        write_quietly(&self.render(format, io::stdout().is_terminal())?)
    }

    /// The data in `format`, as a file gets it.
    ///
    /// # Errors
    /// It cannot be written as JSON.
    pub(crate) fn to_text(&self, format: Format) -> io::Result<String> {
        self.render(format, false)
    }

    fn render(&self, format: Format, is_terminal: bool) -> io::Result<String> {
        let text = match format {
            Format::Table => self.text.render(is_terminal),
            Format::Json if self.json.is_null() => String::new(),
            Format::Json => serde_json::to_string_pretty(&self.json)?,
            Format::Jsonl => self.lines()?,
        };
        Ok(match text.is_empty() || text.ends_with('\n') {
            true => text,
            false => text + "\n",
        })
    }

    fn lines(&self) -> io::Result<String> {
        let rows = self.rows.and_then(|key| self.json[key].as_array());
        let Some(rows) = rows else {
            return match &self.json {
                Value::Null => Ok(String::new()),
                json => Ok(serde_json::to_string(json)?),
            };
        };
        let mut text = String::new();
        for row in rows {
            text += &serde_json::to_string(row)?;
            text.push('\n');
        }
        Ok(text)
    }
}

impl Text {
    fn render(&self, is_terminal: bool) -> String {
        match self {
            Self::Lines(text) => text.clone(),
            Self::Table { header, rows } => table(header, rows, is_terminal),
        }
    }
}

/// A box on a terminal that is wide enough; aligned columns everywhere else, so that no path is
/// broken over lines and programs read rows as lines.
fn table(header: &[&'static str], rows: &[Vec<String>], is_terminal: bool) -> String {
    let mut table = Table::new();
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(header.to_vec());
    table.add_rows(rows.iter().cloned());
    if is_terminal {
        table.load_style(presets::UTF8_FULL_CONDENSED);
        let boxed = table.to_string();
        let width = boxed.lines().next().unwrap_or_default().chars().count();
        if table
            .width()
            .is_none_or(|columns| width <= usize::from(columns))
        {
            return boxed;
        }
    }
    table.load_style(presets::NOTHING);
    let lines: Vec<String> = table
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect();
    lines.join("\n")
}

/// Writes `text` to standard output at once, for what cannot wait for the command's end.
///
/// # Errors
/// Standard output cannot be written; a closed pipe is not an error.
pub(crate) fn write_quietly(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn list() -> Output {
        let items = [
            json!({"name": "a", "n": 1}),
            json!({"name": "bcd", "n": 20}),
        ];
        Output::list("things", &items, &["Name", "N"], |item| {
            vec![
                item["name"].as_str().unwrap().to_owned(),
                item["n"].to_string(),
            ]
        })
        .unwrap()
    }

    #[test]
    fn pipes_get_aligned_columns_without_rules() {
        let text = list().to_text(Format::Table).unwrap();

        assert_eq!(text, " Name  N\n a     1\n bcd   20\n");
    }

    #[test]
    fn json_is_one_document_and_jsonl_one_per_row() {
        let json: Value = serde_json::from_str(&list().to_text(Format::Json).unwrap()).unwrap();
        let lines = list().to_text(Format::Jsonl).unwrap();

        assert_eq!(json["things"][1]["name"], "bcd");
        assert_eq!(lines.lines().count(), 2);
        assert_eq!(
            serde_json::from_str::<Value>(lines.lines().next().unwrap()).unwrap()["n"],
            1
        );
    }

    #[test]
    fn no_data_prints_nothing() {
        for format in [Format::Table, Format::Json, Format::Jsonl] {
            assert_eq!(Output::none().to_text(format).unwrap(), "");
        }
    }
}
