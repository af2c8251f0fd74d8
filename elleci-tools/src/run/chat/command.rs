//! The /commands of a dialogue.

use std::path::PathBuf;

use elleci_core::sampler::SamplerOptions;

use crate::run::cli::parse_seed;

/// What `/help` says.
pub const HELP: &str = "\
/retry            another answer to the last message
/undo             takes the last message and its answer back
/reset            begins anew; the system turn stays
/system TEXT      sets the system turn and begins anew; without TEXT removes it
/set KEY VALUE    temperature, top_k, top_p, min_p, repeat_penalty, repeat_last_n, seed, max_tokens; alone: shows them
/save FILE        writes the dialogue, to go on with it later without computing it again
/load FILE        goes on with a dialogue that /save wrote
/stats            tokens and speed of the last answer, and what the context holds
/quit             leaves, as Ctrl-D does
A line that ends with \\ goes on in the next one. A message that begins with / is typed with //. Ctrl-C stops an answer.";

const NAMES: [&str; 10] = ["help", "retry", "undo", "reset", "system", "set", "save", "load", "stats", "quit"];

/// A parsed command.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Lists the commands.
    Help,
    /// Answers the last message again.
    Retry,
    /// Takes the last exchange back.
    Undo,
    /// Forgets all turns.
    Reset,
    /// Forgets all turns, and has another system turn.
    System(Option<String>),
    /// Shows the settings.
    Settings,
    /// Changes a setting.
    Set(String, String),
    /// Writes the dialogue.
    Save(PathBuf),
    /// Reads a dialogue.
    Load(PathBuf),
    /// Shows figures.
    Stats,
    /// Leaves.
    Quit,
}

/// What a line of input is.
#[derive(Clone, Debug, PartialEq)]
pub enum Line {
    /// Something to say.
    Message(String),
    /// Something to do.
    Command(Command),
}

impl Line {
    /// Reads a line. `None` for an empty one.
    ///
    /// # Errors
    /// A command that does not exist, or that lacks or has too many arguments.
    pub fn parse(line: &str) -> Result<Option<Line>, String> {
        let line = line.trim();
        let Some(rest) = line.strip_prefix('/') else {
            return Ok((!line.is_empty()).then(|| Line::Message(line.to_string())));
        };
        if rest.starts_with('/') {
            return Ok(Some(Line::Message(rest.to_string())));
        }
        let (name, argument) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        let argument = argument.trim();
        let file = |name: &str| match argument {
            "" => Err(format!("/{name} needs the name of a file")),
            path => Ok(PathBuf::from(path)),
        };
        let command = match name {
            "help" | "?" | "h" => Command::Help,
            "retry" | "regen" => Command::Retry,
            "undo" => Command::Undo,
            "reset" | "clear" => Command::Reset,
            "system" => Command::System((!argument.is_empty()).then(|| argument.to_string())),
            "set" if argument.is_empty() => Command::Settings,
            "set" => {
                let (key, value) = argument
                    .split_once(|c: char| c.is_whitespace() || c == '=')
                    .ok_or_else(|| format!("/set {argument}: the value is missing"))?;
                Command::Set(key.to_string(), value.trim().to_string())
            }
            "save" => Command::Save(file("save")?),
            "load" => Command::Load(file("load")?),
            "stats" => Command::Stats,
            "quit" | "exit" | "bye" | "q" => Command::Quit,
            other => return Err(unknown(other)),
        };
        let takes_none =
            matches!(command, Command::Help | Command::Retry | Command::Undo | Command::Reset | Command::Stats);
        if takes_none && !argument.is_empty() {
            return Err(format!("/{name} takes no argument; a message that begins with / is typed with //"));
        }
        Ok(Some(Line::Command(command)))
    }
}

fn unknown(name: &str) -> String {
    let near = NAMES.iter().map(|n| (strsim::damerau_levenshtein(n, name), n)).min();
    let hint = near.filter(|(distance, _)| *distance <= 2).map(|(_, n)| format!("; did you mean /{n}?"));
    format!("there is no command /{name}{}; /help lists them", hint.unwrap_or_default())
}

/// What `/set` changes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Settings {
    /// How to choose.
    pub sampling: SamplerOptions,
    /// Tokens of an answer at most.
    pub max_tokens: usize,
}

impl Settings {
    /// Every key with its value.
    pub fn entries(&self) -> [(&'static str, String); 8] {
        let s = &self.sampling;
        let most = if self.max_tokens == usize::MAX { "-1".into() } else { self.max_tokens.to_string() };
        [
            ("temperature", s.temperature.to_string()),
            ("top_k", s.top_k.to_string()),
            ("top_p", s.top_p.to_string()),
            ("min_p", s.min_p.to_string()),
            ("repeat_penalty", s.repetition_penalty.to_string()),
            ("repeat_last_n", s.repetition_window.to_string()),
            ("seed", s.seed.to_string()),
            ("max_tokens", most),
        ]
    }

    /// With one key changed. Dashes stand for underscores.
    ///
    /// # Errors
    /// A key that there is not, a value that is none or has no meaning.
    pub fn with(&self, key: &str, value: &str) -> Result<Settings, String> {
        fn number<T: std::str::FromStr>(key: &str, value: &str) -> Result<T, String> {
            value.parse().map_err(|_| format!("{key}: `{value}` is not a number that it can have"))
        }
        let mut new = *self;
        let s = &mut new.sampling;
        let key = key.replace('-', "_");
        match key.as_str() {
            "temperature" | "temp" => s.temperature = number(&key, value)?,
            "top_k" => s.top_k = number(&key, value)?,
            "top_p" => s.top_p = number(&key, value)?,
            "min_p" => s.min_p = number(&key, value)?,
            "repeat_penalty" | "repetition_penalty" => s.repetition_penalty = number(&key, value)?,
            "repeat_last_n" | "repetition_window" => s.repetition_window = number(&key, value)?,
            "seed" => s.seed = parse_seed(value).map_err(|e| format!("seed: {e}"))?,
            "max_tokens" if value == "-1" => new.max_tokens = usize::MAX,
            "max_tokens" => new.max_tokens = number(&key, value)?,
            _ => {
                let keys: Vec<&str> = self.entries().iter().map(|e| e.0).collect();
                return Err(format!("there is no setting `{key}`; there are {}", keys.join(", ")));
            }
        }
        new.sampling.validate().map_err(|e| e.to_string())?;
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(line: &str) -> Command {
        match Line::parse(line) {
            Ok(Some(Line::Command(command))) => command,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn lines_are_messages_or_commands() {
        assert_eq!(Line::parse("  "), Ok(None));
        assert_eq!(Line::parse(" Ciao, /help \n"), Ok(Some(Line::Message("Ciao, /help".into()))));
        assert_eq!(Line::parse("//etc/passwd"), Ok(Some(Line::Message("/etc/passwd".into()))));
        for name in NAMES.iter().filter(|n| !["save", "load"].contains(n)) {
            assert!(matches!(Line::parse(&format!("/{name}")), Ok(Some(Line::Command(_)))), "{name}");
            assert!(HELP.contains(&format!("/{name}")) || *name == "help", "{name}");
        }
        assert_eq!(command("/system  Sii breve. "), Command::System(Some("Sii breve.".into())));
        assert_eq!(command("/system"), Command::System(None));
        assert_eq!(command("/set temp 0.5"), Command::Set("temp".into(), "0.5".into()));
        assert_eq!(command("/set top-k=3"), Command::Set("top-k".into(), "3".into()));
        assert_eq!(command("/set"), Command::Settings);
        assert_eq!(command("/save il mio file.chat"), Command::Save("il mio file.chat".into()));
        assert_eq!(command("/exit"), Command::Quit);
        for (line, part) in [
            ("/resett", "/reset?"),
            ("/frobnicate", "no command /frobnicate;"),
            ("/save", "name of a file"),
            ("/set seed", "value is missing"),
            ("/undo that", "no argument"),
        ] {
            let error = Line::parse(line).unwrap_err();
            assert!(error.contains(part), "{line}: {error}");
        }
    }

    #[test]
    fn settings_change_one_at_a_time() {
        let settings = Settings { sampling: SamplerOptions::default(), max_tokens: 256 };
        for (key, value) in settings.entries() {
            assert_eq!(settings.with(key, &value), Ok(settings), "{key}");
        }
        assert_eq!(settings.with("temp", "0.5").unwrap().sampling.temperature, 0.5);
        assert_eq!(settings.with("top-k", "0").unwrap().sampling.top_k, 0);
        assert_eq!(settings.with("max_tokens", "-1").unwrap().max_tokens, usize::MAX);
        for (key, value, part) in [
            ("top_p", "2", "`top_p` is 2"),
            ("top_k", "-1", "top_k"),
            ("seed", "x", "seed"),
            ("colour", "red", "`colour`; there are temperature"),
        ] {
            let error = settings.with(key, value).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
