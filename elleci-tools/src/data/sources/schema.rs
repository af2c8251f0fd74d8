//! The columns of known data sets, and how their rows become documents.

use super::{Document, RowResult};
use crate::data::chatml::{Role, Turn};
use serde_json::Value;

/// A row by column.
pub type Row = serde_json::Map<String, Value>;

/// What the columns of a data set mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Schema {
    /// Cosmopedia V2: `prompt`, `text`, `audience`, `format`, `seed_data`; the `text` is read.
    Cosmopedia,
    /// Hugging Face Wikipedia: `id`, `url`, `title`, `text`; the title stands above the text.
    Wikipedia,
    /// OpenAssistant: trees of messages; the best-ranked dialogue of each tree is read.
    Oasst,
    /// `instruction`, `input` (optional), `output`.
    Instruction,
    /// `messages`: a list of `role` and `content`.
    Messages,
    /// `prompt`, `completion`.
    Completion,
    /// `text`.
    Text,
}

impl Schema {
    /// All of them, in the order of detection: the most particular first.
    const ALL: [Schema; 7] = [
        Schema::Oasst,
        Schema::Messages,
        Schema::Instruction,
        Schema::Completion,
        Schema::Cosmopedia,
        Schema::Wikipedia,
        Schema::Text,
    ];

    /// The name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Schema::Cosmopedia => "cosmopedia",
            Schema::Wikipedia => "wikipedia",
            Schema::Oasst => "oasst",
            Schema::Instruction => "instruction",
            Schema::Messages => "messages",
            Schema::Completion => "completion",
            Schema::Text => "text",
        }
    }

    /// All names, for messages.
    pub fn names() -> String {
        Schema::ALL.map(Schema::name).join(", ")
    }

    /// Columns that tell the schema.
    pub fn required(self) -> &'static [&'static str] {
        match self {
            Schema::Cosmopedia => &["text", "prompt", "seed_data"],
            Schema::Wikipedia => &["title", "text"],
            Schema::Oasst => &["message_id", "parent_id", "message_tree_id", "role", "text"],
            Schema::Instruction => &["instruction", "output"],
            Schema::Messages => &["messages"],
            Schema::Completion => &["prompt", "completion"],
            Schema::Text => &["text"],
        }
    }

    /// Columns that are read.
    pub fn columns(self) -> &'static [&'static str] {
        match self {
            Schema::Cosmopedia | Schema::Text => &["text"],
            Schema::Instruction => &["instruction", "input", "output"],
            Schema::Oasst => &[
                "message_id",
                "parent_id",
                "message_tree_id",
                "role",
                "text",
                "lang",
                "rank",
                "deleted",
                "review_result",
            ],
            other => other.required(),
        }
    }

    /// The schema that has these columns.
    pub fn detect<'a>(columns: impl Iterator<Item = &'a str> + Clone) -> Option<Schema> {
        let has = |wanted: &str| columns.clone().any(|c| c == wanted);
        Schema::ALL.into_iter().find(|s| s.required().iter().all(|c| has(c)))
    }

    /// The document that a row stands for (OpenAssistant's rows only do so together; see `oasst.rs`).
    ///
    /// # Errors
    /// Why the row is of no use.
    pub fn document(self, row: &Row) -> RowResult {
        match self {
            Schema::Cosmopedia | Schema::Text => Ok(Document::Text(clean(string(row, "text")?)?)),
            Schema::Wikipedia => {
                let (title, text) = (clean(string(row, "title")?)?, clean(string(row, "text")?)?);
                Ok(Document::Text(format!("{title}\n\n{text}")))
            }
            Schema::Oasst => Err("a single message is no dialogue".to_string()),
            Schema::Instruction => {
                let instruction = clean(string(row, "instruction")?)?;
                let input = match row.get("input") {
                    None | Some(Value::Null) => "",
                    Some(_) => string(row, "input")?.trim(),
                };
                let user = if input.is_empty() { instruction } else { format!("{instruction}\n\n{input}") };
                dialogue(vec![(Role::User, &user), (Role::Assistant, string(row, "output")?)])
            }
            Schema::Completion => {
                dialogue(vec![(Role::User, string(row, "prompt")?), (Role::Assistant, string(row, "completion")?)])
            }
            Schema::Messages => messages(row.get("messages")),
        }
    }
}

/// Line ends as `\n`, no white space around.
///
/// # Errors
/// Nothing is left.
pub fn clean(text: &str) -> std::result::Result<String, String> {
    let text = text.trim();
    if text.is_empty() {
        return Err("empty text".to_string());
    }
    Ok(if text.contains('\r') { text.replace("\r\n", "\n") } else { text.to_string() })
}

/// A string column.
pub fn string<'a>(row: &'a Row, column: &str) -> std::result::Result<&'a str, String> {
    match row.get(column) {
        Some(Value::String(s)) => Ok(s),
        None | Some(Value::Null) => Err(format!("`{column}` is missing")),
        Some(_) => Err(format!("`{column}` is not a string")),
    }
}

/// A dialogue from roles and contents.
///
/// # Errors
/// An empty turn, or no answer of the assistant at the end.
pub fn dialogue(turns: Vec<(Role, &str)>) -> RowResult {
    if turns.last().is_none_or(|(role, _)| *role != Role::Assistant) {
        return Err("the dialogue does not end with the assistant".to_string());
    }
    let turn = |(role, content)| Ok(Turn { role, content: clean(content)? });
    Ok(Document::Dialogue(turns.into_iter().map(turn).collect::<std::result::Result<_, String>>()?))
}

fn messages(value: Option<&Value>) -> RowResult {
    let Some(Value::Array(list)) = value else { return Err("`messages` is not a list".to_string()) };
    let mut turns = Vec::with_capacity(list.len());
    for message in list {
        let Value::Object(message) = message else { return Err("a message is not an object".to_string()) };
        let role = string(message, "role")?;
        let role = Role::from_name(role).ok_or_else(|| "a message has an unknown `role`".to_string())?;
        turns.push((role, string(message, "content")?));
    }
    dialogue(turns)
}
