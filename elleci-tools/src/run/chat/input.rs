//! Lines from a terminal, with editing and history, or from a pipe.

use std::io::{self, BufRead, IsTerminal};

use anyhow::Context;
use rustyline::error::ReadlineError;

/// Where messages come from.
pub enum Input {
    /// A person.
    Terminal(Box<rustyline::DefaultEditor>),
    /// A file or another program.
    Pipe,
}

impl Input {
    /// Standard input, whatever it is.
    ///
    /// # Errors
    /// When the terminal cannot be used.
    pub fn open() -> anyhow::Result<Input> {
        if io::stdin().is_terminal() {
            let editor = rustyline::DefaultEditor::new().context("opening the terminal")?;
            return Ok(Input::Terminal(Box::new(editor)));
        }
        Ok(Input::Pipe)
    }

    /// Whether a person sits there.
    pub fn is_terminal(&self) -> bool {
        matches!(self, Input::Terminal(_))
    }

    /// The next message or command, `\` at the end of a line joining it to the next. `None` at the end.
    ///
    /// # Errors
    /// When the input cannot be read.
    pub fn read(&mut self) -> anyhow::Result<Option<String>> {
        let mut text = String::new();
        loop {
            let prompt = if text.is_empty() { "> " } else { "… " };
            let Some(line) = self.line(prompt)? else {
                return Ok((!text.is_empty()).then_some(text));
            };
            match line.strip_suffix('\\') {
                Some(first) => {
                    text += first;
                    text.push('\n');
                }
                None => {
                    text += &line;
                    if let Input::Terminal(editor) = self {
                        // Only convenience is lost when the history does not take it.
                        let _ = editor.add_history_entry(text.as_str());
                    }
                    return Ok(Some(text));
                }
            }
        }
    }

    fn line(&mut self, prompt: &str) -> anyhow::Result<Option<String>> {
        let Input::Terminal(editor) = self else {
            let mut line = Vec::new();
            let read = io::stdin().lock().read_until(b'\n', &mut line).context("reading standard input")?;
            let line = String::from_utf8(line).context("standard input is not UTF-8 text")?;
            return Ok((read > 0).then(|| line.trim_end_matches(['\n', '\r']).to_string()));
        };
        match editor.readline(prompt) {
            Ok(line) => Ok(Some(line)),
            Err(ReadlineError::Eof) => Ok(None),
            Err(ReadlineError::Interrupted) => {
                crate::exit::errln!("Ctrl-D or /quit leaves");
                Ok(Some(String::new()))
            }
            Err(e) => Err(e).context("reading the terminal"),
        }
    }
}
