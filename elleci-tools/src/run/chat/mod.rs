//! `elleci-run chat`: a dialogue in a terminal or through a pipe.

pub mod command;
pub mod dialogue;
pub mod file;
pub mod input;

use std::io::{self, Write};

use anyhow::{Context, anyhow};
use elleci_core::sampler::Sampler;

use super::answer::{Answer, End};
use super::cli::ChatArgs;
use super::generate::summary;
use super::model::OpenModel;
use crate::exit::Interrupted;
use crate::train::device::Device;
use command::{Command, HELP, Line};
use dialogue::Dialogue;
use input::Input;

/// Runs the verb.
///
/// # Errors
/// [`crate::exit::Usage`] for options without a meaning; a model that cannot be used. At a terminal what goes wrong in
/// a turn is shown and the dialogue goes on; from a pipe it is the end.
pub fn run(args: &ChatArgs) -> anyhow::Result<()> {
    let sampler = Sampler::new(args.sampling.options()?)?;
    let device = Device::choose(&args.model.device.device, args.model.device.threads)?;
    crate::exit::errln!("{}", device.announcement);
    device.install(|| {
        let open = OpenModel::chosen(args.model.model.as_deref())?;
        crate::exit::errln!("{}", open.announcement());
        let (most, context) = (args.length.max_tokens(), args.length.context as usize);
        let mut dialogue = Dialogue::new(&open, sampler, args.system.clone(), most, context)?;
        if let Some(path) = &args.load {
            file::load(&mut dialogue, path).context("--load")?;
        }
        let input = Input::open()?;
        if input.is_terminal() {
            crate::exit::errln!("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves");
        }
        Chat { dialogue, input, last: None }.talk()
    })
}

struct Chat<'m> {
    dialogue: Dialogue<'m>,
    input: Input,
    last: Option<Answer>,
}

impl Chat<'_> {
    fn talk(&mut self) -> anyhow::Result<()> {
        while let Some(line) = self.input.read()? {
            let result = match Line::parse(&line) {
                Ok(None) => continue,
                Ok(Some(Line::Command(Command::Quit))) => break,
                Ok(Some(Line::Command(command))) => self.obey(command),
                Ok(Some(Line::Message(message))) => self.say(&message),
                Err(message) => Err(anyhow!(message)),
            };
            match result {
                Err(e) if self.input.is_terminal() && !e.is::<Interrupted>() => crate::exit::errln!("error: {e:#}"),
                other => other?,
            }
            if self.last.as_ref().is_some_and(|a| a.end == End::Closed) {
                break;
            }
        }
        Ok(())
    }

    fn say(&mut self, message: &str) -> anyhow::Result<()> {
        let mut out = io::stdout().lock();
        let answer = self.dialogue.say(message, &mut |text| {
            out.write_all(text.as_bytes())?;
            out.flush()
        })?;
        if answer.end != End::Closed {
            out.write_all(b"\n").and_then(|()| out.flush()).context("standard output")?;
        }
        let (end, terminal) = (answer.end, self.input.is_terminal());
        self.last = Some(answer);
        match end {
            End::Interrupted if !terminal => Err(Interrupted("stopped by Ctrl-C".into()).into()),
            End::MaxTokens => {
                crate::exit::errln!("(cut at {} tokens; /set max_tokens N allows more)", self.dialogue.max_tokens);
                Ok(())
            }
            End::Context => {
                crate::exit::errln!("(the context is full: /undo or /reset, or start again with a larger --context)");
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn obey(&mut self, command: Command) -> anyhow::Result<()> {
        match command {
            Command::Help => crate::exit::errln!("{HELP}"),
            Command::Retry => {
                let message = self.dialogue.undo().context("there is no message to answer again")?;
                return self.say(&message);
            }
            Command::Undo => {
                let message = self.dialogue.undo().context("there is nothing to take back")?;
                crate::exit::errln!("taken back: {message}");
            }
            Command::Reset => self.dialogue.reset(),
            Command::System(text) => {
                self.dialogue.system = text;
                self.dialogue.reset();
            }
            Command::Settings => {
                for (key, value) in self.dialogue.settings().entries() {
                    crate::exit::errln!("{key} {value}");
                }
            }
            Command::Set(key, value) => {
                let settings = self.dialogue.settings().with(&key, &value).map_err(|e| anyhow!(e))?;
                self.dialogue.set(settings)?;
            }
            Command::Save(path) => {
                file::save(&self.dialogue, &path)?;
                crate::exit::errln!("saved to {}", path.display());
            }
            Command::Load(path) => {
                file::load(&mut self.dialogue, &path)?;
                for exchange in &self.dialogue.exchanges {
                    crate::exit::errln!("> {}\n{}", exchange.message, exchange.answer);
                }
            }
            Command::Stats => self.stats(),
            Command::Quit => {}
        }
        Ok(())
    }

    fn stats(&self) {
        if let Some(answer) = &self.last {
            crate::exit::errln!("{}", summary(answer, self.dialogue.settings().sampling.seed));
        }
        let (turns, tokens) = (self.dialogue.exchanges.len(), self.dialogue.tokens.len());
        crate::exit::errln!("{turns} exchanges | {tokens} tokens in the context");
    }
}
