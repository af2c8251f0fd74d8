//! OpenAssistant: messages that form trees, of which the best-ranked dialogue is taken.
//!
//! A tree's messages need not stand together, so a file is gathered before its dialogues are told. This is the one
//! schema whose memory grows with its corpus (oasst1: 85,000 messages, under 100 MB).

use super::schema::{dialogue, string};
use super::{Row, RowResult};
use crate::data::chatml::Role;
use anyhow::Result;
use serde_json::Value;
use std::collections::HashMap;

struct Message {
    id: String,
    role: Role,
    text: String,
    language: String,
    /// 0 is best; unranked messages come last.
    rank: i64,
    usable: bool,
}

/// The messages of a file.
#[derive(Default)]
pub struct Trees {
    roots: Vec<Message>,
    children: HashMap<String, Vec<Message>>,
}

impl Trees {
    /// Adds a message.
    ///
    /// # Errors
    /// Why the row is no message.
    pub fn push(&mut self, row: &Row) -> std::result::Result<(), String> {
        let role = string(row, "role")?;
        let message = Message {
            id: string(row, "message_id")?.to_string(),
            role: Role::from_name(role).ok_or_else(|| "a message has an unknown `role`".to_string())?,
            text: string(row, "text")?.to_string(),
            language: row.get("lang").and_then(Value::as_str).unwrap_or_default().to_string(),
            rank: row.get("rank").and_then(|r| r.as_i64().or_else(|| Some(r.as_f64()? as i64))).unwrap_or(i64::MAX),
            usable: row.get("deleted") != Some(&Value::Bool(true))
                && row.get("review_result") != Some(&Value::Bool(false)),
        };
        match row.get("parent_id") {
            Some(Value::String(parent)) => self.children.entry(parent.clone()).or_default().push(message),
            None | Some(Value::Null) => self.roots.push(message),
            Some(_) => return Err("`parent_id` is not a string".to_string()),
        }
        Ok(())
    }

    /// Tells the best dialogue of every tree, in the order of their roots.
    ///
    /// # Errors
    /// Those of `visit`.
    pub fn finish(mut self, languages: &[String], visit: &mut dyn FnMut(u64, RowResult) -> Result<bool>) -> Result<()> {
        for (number, root) in (1..).zip(std::mem::take(&mut self.roots)) {
            let result = self.best(root, languages);
            if !visit(number, result)? {
                return Ok(());
            }
        }
        Ok(())
    }

    fn best(&mut self, root: Message, languages: &[String]) -> RowResult {
        if !languages.is_empty() && !languages.contains(&root.language) {
            return Err("another language than --lang".to_string());
        }
        if !root.usable {
            return Err("a deleted or rejected message".to_string());
        }
        let mut path = vec![root];
        loop {
            let last = &path[path.len() - 1];
            let replies = self.children.remove(&last.id).unwrap_or_default();
            let next = replies.into_iter().filter(|m| m.usable && m.role != last.role).min_by_key(|m| m.rank);
            let Some(next) = next else { break };
            path.push(next);
        }
        if path[path.len() - 1].role != Role::Assistant {
            path.pop();
        }
        if path.is_empty() {
            return Err("a prompt without an answer".to_string());
        }
        dialogue(path.iter().map(|m| (m.role, m.text.as_str())).collect())
    }
}
