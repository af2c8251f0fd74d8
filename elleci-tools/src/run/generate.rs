//! `elleci-run generate`: one prompt, one continuation.

use std::fs;
use std::io::{self, Read, Write};
use std::path::Path;

use anyhow::{Context, ensure};
use elleci_core::inference::Session;
use elleci_core::sampler::Sampler;
use serde_json::json;

use super::answer::{Answer, End, Piece, Request, answer};
use super::cli::GenerateArgs;
use super::model::OpenModel;
use crate::data::chatml::{Role, Turn, encode_prompt};
use crate::data::tokenizer::END_OF_TEXT_ID;
use crate::exit::{Interrupted, usage};
use crate::train::device::Device;

/// Runs the verb.
///
/// # Errors
/// [`crate::exit::Usage`] for options without a meaning; a model or prompt that cannot be used; [`Interrupted`].
pub fn run(args: &GenerateArgs) -> anyhow::Result<()> {
    let sampler = Sampler::new(args.sampling.options()?)?;
    let device = Device::choose(&args.model.device.device, args.model.device.threads)?;
    let prompt = read_prompt(args)?;
    let report = |line: &str| {
        if !args.quiet {
            crate::exit::errln!("{line}");
        }
    };
    report(&device.announcement);
    device.install(|| {
        let open = OpenModel::chosen(args.model.model.as_deref())?;
        report(&open.announcement());
        let tokens = tokens_of(args, &open, &prompt)?;
        let answer = continue_prompt(args, &open, sampler, &prompt, &tokens)?;
        finish(args, &open, &tokens, &answer, report)
    })
}

/// The prompt's text, from wherever it comes.
fn read_prompt(args: &GenerateArgs) -> anyhow::Result<String> {
    match (&args.prompt, &args.file) {
        (Some(text), _) => Ok(text.clone()),
        (None, Some(path)) if path != Path::new("-") => {
            fs::read_to_string(path).with_context(|| format!("--file {}", path.display()))
        }
        _ => {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text).context("reading the prompt from standard input")?;
            Ok(text)
        }
    }
}

/// The prompt's tokens; an empty prompt is the beginning of a document.
fn tokens_of(args: &GenerateArgs, open: &OpenModel, prompt: &str) -> anyhow::Result<Vec<u32>> {
    let mut tokens = if args.tokens {
        parse_ids(prompt, open.config().vocab_size)?
    } else if args.chat {
        let mut turns = Vec::new();
        if let Some(system) = &args.system {
            turns.push(Turn { role: Role::System, content: system.clone() });
        }
        turns.push(Turn { role: Role::User, content: prompt.trim_end().to_string() });
        encode_prompt(open.need_tokenizer()?, &turns)
    } else {
        open.need_tokenizer()?.encode(prompt)
    };
    if tokens.is_empty() {
        tokens.push(END_OF_TEXT_ID);
    }
    Ok(tokens)
}

/// Token ids apart by white space or commas; brackets around them are passed over.
fn parse_ids(text: &str, vocab_size: usize) -> anyhow::Result<Vec<u32>> {
    let separates = |c: char| c.is_whitespace() || ",[]".contains(c);
    let id = |word: &str| {
        let id: Option<u32> = word.parse().ok().filter(|id| (*id as usize) < vocab_size);
        id.ok_or_else(|| usage(format!("the prompt holds `{word}`; --tokens takes ids from 0 to {}", vocab_size - 1)))
    };
    text.split(separates).filter(|w| !w.is_empty()).map(id).collect()
}

fn continue_prompt(
    args: &GenerateArgs,
    open: &OpenModel,
    mut sampler: Sampler,
    prompt: &str,
    tokens: &[u32],
) -> anyhow::Result<Answer> {
    let mut session = Session::new(open.packed())?;
    let request = Request {
        max_tokens: args.length.max_tokens(),
        context: args.length.context as usize,
        ends: if args.ignore_eos { &[] } else { open.ends() },
        stops: &args.stop,
        banned: &open.banned(args.ignore_eos),
    };
    let mut out = io::stdout().lock();
    if args.echo {
        out.write_all(prompt.as_bytes()).and_then(|()| out.flush()).context("standard output")?;
    }
    let mut between = if args.echo && prompt.ends_with(|c: char| !c.is_whitespace()) { " " } else { "" };
    let mut show = |piece: Piece<'_>| {
        if args.json {
            return Ok(());
        }
        if !args.tokens {
            out.write_all(piece.text.as_bytes())?;
        } else if let Some(token) = piece.token {
            write!(out, "{between}{token}")?;
            between = " ";
        }
        out.flush()
    };
    answer(open, &mut session, &mut sampler, &request, tokens, &mut show)
}

fn finish(
    args: &GenerateArgs,
    open: &OpenModel,
    prompt: &[u32],
    answer: &Answer,
    report: impl Fn(&str),
) -> anyhow::Result<()> {
    if answer.end == End::Closed {
        return Ok(());
    }
    let mut out = io::stdout().lock();
    let line = if args.json {
        let mut value = json!({ "model": open.name, "prompt_tokens": prompt.len(), "seed": args.sampling.seed });
        if let (Some(all), serde_json::Value::Object(more)) = (value.as_object_mut(), serde_json::to_value(answer)?) {
            all.extend(more);
        }
        format!("{value}\n")
    } else {
        // A prompt of a shell begins on a line of its own.
        "\n".to_string()
    };
    out.write_all(line.as_bytes()).and_then(|()| out.flush()).context("standard output")?;
    report(&summary(answer, args.sampling.seed));
    ensure!(answer.end != End::Interrupted, Interrupted("stopped by Ctrl-C".into()));
    Ok(())
}

/// One line on how a text ended and how fast it came.
pub fn summary(answer: &Answer, seed: u64) -> String {
    let end = match answer.end {
        End::EndOfText => "end of text",
        End::StopString => "stop string",
        End::MaxTokens => "--max-tokens reached",
        End::Context => "--context is full",
        End::Interrupted => "interrupted",
        End::Closed => "output closed",
    };
    let (prefill, decode) = (&answer.prefill, &answer.decode);
    format!(
        "{end} | prompt {} tokens, {:.1} tokens/s | text {} tokens, {:.1} tokens/s | seed {seed}",
        prefill.tokens,
        prefill.tokens_per_second,
        answer.tokens.len(),
        decode.tokens_per_second
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_in_any_usual_form() {
        assert_eq!(parse_ids(" 1, 2\t[3]\n4 ", 5).unwrap(), [1, 2, 3, 4]);
        assert_eq!(parse_ids("", 5).unwrap(), [0; 0]);
        for wrong in ["5", "-1", "1.5", "x"] {
            let error = parse_ids(wrong, 5).unwrap_err().to_string();
            assert!(error.contains(&format!("`{wrong}`")) && error.contains("0 to 4"), "{error}");
        }
    }
}
