//! `elleci-run` as a user meets it, on a tiny model with random weights.

mod tiny;

use std::fs;
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use elleci_core::archive::{PackOptions, to_bytes};
use elleci_core::config::ModelConfig;
use elleci_core::inference::Session;
use elleci_core::init::initialise;
use elleci_core::model::{Batch, Checkpointing, Model, Workspace};
use elleci_core::sampler::{Sampler, SamplerOptions};
use elleci_tools::checkpoint::tensors::{Bytes, Tensor, TensorFile, write};
use elleci_tools::run::answer::{End, Request, answer};
use elleci_tools::run::chat::dialogue::Dialogue;
use elleci_tools::run::model::OpenModel;
use elleci_tools::{hf, train::backend::param_tensors};
use safetensors::Dtype;
use serde_json::Value;
use tiny::{VOCAB, config, params, tokenizer};

struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    /// `model.elleci`, which never ends by itself at temperature 0, and `bare.elleci`, which has no tokenizer.
    fn new() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let archive = |tokenizer| to_bytes(&config(), &params(0.0), tokenizer, PackOptions::default()).unwrap();
        fs::write(dir.path().join("model.elleci"), archive(Some(tokenizer().json()))).unwrap();
        fs::write(dir.path().join("bare.elleci"), archive(None)).unwrap();
        Scene { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_elleci-run"));
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    /// Runs with `input`; returns exit code, standard output and standard error.
    fn run(&self, args: &[&str], input: &str) -> (Option<i32>, String, String) {
        let mut command = self.command(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        // A program that fails early does not read its input.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        let Output { status, stdout, stderr } = child.wait_with_output().unwrap();
        let stdout = String::from_utf8(stdout).expect("standard output is UTF-8");
        (status.code(), stdout, String::from_utf8_lossy(&stderr).into_owned())
    }

    fn ok(&self, args: &[&str], input: &str) -> String {
        let (code, out, err) = self.run(args, input);
        assert_eq!(code, Some(0), "{args:?}: {err}");
        out
    }

    /// Expects `code`, nothing on standard output, and a message that holds every one of `parts`.
    fn fails(&self, args: &[&str], code: i32, parts: &[&str]) {
        let (found, out, err) = self.run(args, "");
        assert_eq!(found, Some(code), "{args:?}: {err}");
        assert_eq!(out, "", "{args:?}");
        let message = err.lines().filter(|l| !l.starts_with("device ") && !l.starts_with("model ")).collect::<String>();
        for part in parts {
            assert!(message.contains(part), "{args:?}: `{part}` is not in: {message}");
        }
    }

    fn json(&self, args: &[&str]) -> Value {
        let args = [&["generate", "-m", "model.elleci", "--json"], args].concat();
        serde_json::from_str(&self.ok(&args, "")).unwrap()
    }

    fn chat(&self, args: &[&str], input: &str) -> Vec<String> {
        let args = [&["chat", "-m", "model.elleci", "-n", "8"], args].concat();
        self.ok(&args, input).lines().map(str::to_string).collect()
    }
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|t| t.as_u64().unwrap() as u32).collect()
}

#[test]
fn text_tokens_and_json_agree() {
    let scene = Scene::new();
    for sampling in [&["--temp", "0"][..], &["--temp", "1.5", "--top-k", "0", "--min-p", "0", "--seed", "3"]] {
        let with = |more: &[&'static str]| [more, sampling, &["-n", "40"]].concat();
        let json = scene.json(&with(&["-p", "La città"]));
        let tokens = ids(&json["tokens"]);
        assert_eq!(tokens.len(), 40, "{json}");
        assert_eq!((&json["end"], &json["prefill"]["tokens"]), (&"max_tokens".into(), &json["prompt_tokens"]));
        assert_eq!(json["decode"]["tokens"], 39);
        assert_eq!(json["text"].as_str().unwrap(), tokenizer().decode(&tokens));
        assert!(tokens.iter().all(|t| *t > 3 && (*t as usize) < tokenizer().config().tokens), "{tokens:?}");

        let text = scene.ok(&with(&["generate", "-m", "model.elleci", "-p", "La città", "--echo"]), "");
        assert_eq!(text, format!("La città{}\n", json["text"].as_str().unwrap()));
        // Standard input and a file are prompts too.
        let text = scene.ok(&with(&["generate", "-m", "model.elleci"]), "La città");
        assert_eq!(text, format!("{}\n", json["text"].as_str().unwrap()));
        fs::write(scene.path("prompt.txt"), "La città").unwrap();
        assert_eq!(text, scene.ok(&with(&["generate", "-m", "model.elleci", "-f", "prompt.txt"]), ""));

        let prompt: Vec<String> = tokenizer().encode("La città").iter().map(u32::to_string).collect();
        let with_ids = [&["generate", "-m", "model.elleci", "--tokens"][..], sampling, &["-n", "40"]].concat();
        let out = scene.ok(&with_ids, &prompt.join(" "));
        let out: Vec<u32> = out.split_whitespace().map(|t| t.parse().unwrap()).collect();
        assert_eq!(out, tokens);
    }
    let seeded = |seed: &str| scene.json(&["-p", "x", "-s", seed])["text"].clone();
    assert_eq!(seeded("1"), seeded("1"));
    assert_ne!(seeded("1"), seeded("2"));
    // The same bits with any number of threads.
    let threads = |n: &str| scene.json(&["-p", "x", "-t", n])["tokens"].clone();
    assert_eq!(threads("1"), threads("3"));
}

#[test]
fn texts_end_where_they_should() {
    let scene = Scene::new();
    let whole = scene.json(&["-p", "La", "--temp", "1", "-n", "60"]);
    let text = whole["text"].as_str().unwrap();
    let middle: String = text.chars().skip(10).take(3).collect();
    let stopped = scene.json(&["-p", "La", "--temp", "1", "-n", "60", "--stop", "never", "--stop", &middle]);
    assert_eq!(stopped["end"], "stop_string");
    assert_eq!(stopped["text"].as_str().unwrap(), text.split(&middle).next().unwrap());

    let limited = scene.json(&["-p", "La", "-c", "12", "-n", "60"]);
    assert_eq!(limited["end"], "context");
    assert_eq!(limited["tokens"].as_array().unwrap().len() as u64, 12 - limited["prompt_tokens"].as_u64().unwrap());
    assert_eq!(scene.json(&["-p", "La", "-n", "0"])["tokens"], serde_json::json!([]));

    // A head that prefers the end tokens to all others.
    let ending = to_bytes(&config(), &params(30.0), Some(tokenizer().json()), PackOptions::default()).unwrap();
    fs::write(scene.path("model.elleci"), ending).unwrap();
    let ended = scene.json(&["-p", "La", "--temp", "0", "-n", "-1", "-c", "4000"]);
    assert_eq!(ended["end"], "end_of_text", "{ended}");
    let ignored = scene.json(&["-p", "La", "--temp", "0", "-n", "30", "--ignore-eos"]);
    assert_eq!((&ignored["end"], ids(&ignored["tokens"]).len()), (&"max_tokens".into(), 30));
    let first = ids(&ended["tokens"]);
    assert!(ids(&ignored["tokens"]).starts_with(&first) && first.len() < 30, "{first:?}");
}

/// What a dialogue computes turn by turn is what its tokens mean from the beginning.
#[test]
fn a_dialogue_is_its_tokens() {
    let scene = Scene::new();
    let open = OpenModel::open(&scene.path("model.elleci")).unwrap();
    let greedy = || Sampler::new(SamplerOptions::greedy()).unwrap();
    let dialogue =
        |system: Option<&str>| Dialogue::new(&open, greedy(), system.map(str::to_string), 7, 1 << 17).unwrap();
    let say = |d: &mut Dialogue<'_>, text: &str| d.say(text, &mut |_| Ok(())).unwrap().tokens;

    let mut d = dialogue(Some("Sii breve."));
    let first = say(&mut d, "Chi sei?");
    let text = |tokens: &[u32]| {
        let special = ["<|endoftext|>", "<|padding|>", "<|im_start|>", "<|im_end|>"];
        let piece = |t: &u32| match special.get(*t as usize) {
            Some(name) => name.to_string(),
            None => tokenizer().decode(&[*t]),
        };
        tokens.iter().map(piece).collect::<String>()
    };
    let frame =
        "<|im_start|>system\nSii breve.<|im_end|>\n<|im_start|>user\nChi sei?<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(text(&d.tokens), format!("{frame}{}<|im_end|>", text(&first)));
    let after_first = d.tokens.clone();
    let second = say(&mut d, "E poi?");
    let more = "\n<|im_start|>user\nE poi?<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(text(&d.tokens[after_first.len()..]), format!("{more}{}<|im_end|>", text(&second)));

    // The same tokens from the beginning.
    let prompt = &d.tokens[..d.tokens.len() - 1 - second.len()];
    let prompt: Vec<String> = prompt.iter().map(u32::to_string).collect();
    let json = scene.json(&["--tokens", "-p", &prompt.join(" "), "--temp", "0", "-n", "7"]);
    assert_eq!(ids(&json["tokens"]), second);

    // Taken back and said again, by the mark and, twice back, without one.
    assert_eq!(d.undo().as_deref(), Some("E poi?"));
    assert_eq!(d.tokens, after_first);
    assert_eq!(say(&mut d, "E poi?"), second);
    d.undo();
    assert_eq!(d.undo().as_deref(), Some("Chi sei?"));
    assert_eq!(d.undo(), None);
    assert_eq!(say(&mut d, "Chi sei?"), first);
    assert_eq!(say(&mut d, "E poi?"), second);

    // Saved and loaded into another dialogue, which forgets its own.
    let path = scene.path("saved.chat");
    elleci_tools::run::chat::file::save(&d, &path).unwrap();
    let mut other = dialogue(None);
    say(&mut other, "Altro.");
    elleci_tools::run::chat::file::load(&mut other, &path).unwrap();
    assert_eq!((&other.system, &other.exchanges, &other.tokens), (&d.system, &d.exchanges, &d.tokens));
    assert_eq!(say(&mut other, "Fine?"), say(&mut d, "Fine?"));
    assert_eq!(other.tokens, d.tokens);

    // A message that does not fit leaves everything as it was.
    let mut small = Dialogue::new(&open, greedy(), None, 7, 40).unwrap();
    let first = say(&mut small, "Ciao");
    let before = small.tokens.clone();
    let error = format!("{:#}", small.say(&"molto ".repeat(40), &mut |_| Ok(())).unwrap_err());
    assert!(error.contains("/undo") && error.contains("limit is 40"), "{error}");
    assert_eq!((&small.tokens, small.exchanges.len()), (&before, 1));
    small.undo();
    assert_eq!(say(&mut small, "Ciao"), first);
}

/// A long prompt is fed in parts so that it can be interrupted; what the session has computed is the same to the bit.
#[test]
fn parts_of_a_prompt_change_no_bit() {
    let scene = Scene::new();
    let open = OpenModel::open(&scene.path("model.elleci")).unwrap();
    let prompt: Vec<u32> = (0..2500).map(|i| (i * 37 + i / 7) % 300 + 4).collect();
    let mut whole = Session::new(open.packed()).unwrap();
    whole.extend(open.packed(), &prompt).unwrap();
    let mut parts = Session::new(open.packed()).unwrap();
    let mut sampler = Sampler::new(SamplerOptions::greedy()).unwrap();
    let request = Request { max_tokens: 0, context: 2500, ends: &[], stops: &[], banned: &[] };
    let done = answer(&open, &mut parts, &mut sampler, &request, &prompt, &mut |_| Ok(())).unwrap();
    assert_eq!((done.end, done.tokens.len(), done.prefill.tokens), (End::MaxTokens, 0, 2500));
    assert!(whole.to_bytes() == parts.to_bytes());
}

#[test]
fn a_dialogue_through_a_pipe() {
    let scene = Scene::new();
    let out = scene.chat(&["--temp", "0"], "Ciao\n\nCome stai?\n");
    assert_eq!(out.len(), 2, "{out:?}");
    let json = scene.json(&["--chat", "-p", "Ciao", "--temp", "0", "-n", "8"]);
    assert_eq!(out[0], json["text"].as_str().unwrap().replace('\n', ""), "the first answer is generate --chat's");
    // Taken back, begun anew and answered again, greedy choices are the same; a long line may be broken.
    assert_eq!(scene.chat(&["--temp", "0"], "Ciao\nuno\n/undo\nCome stai?\n/quit\nCiao\n")[2], out[1]);
    assert_eq!(
        scene.chat(&["--temp", "0"], "Ciao\n/retry\n/reset\nCiao\n"),
        [&out[0], &out[0], &out[0]].map(String::clone)
    );
    assert_eq!(scene.chat(&["--temp", "0"], "Ci\\\nao\n").len(), 1);
    // Another temperature, system turn and length.
    let hot = scene
        .chat(&["--temp", "0"], "Ciao\n/set temperature 2\n/set top_k 0\n/set top_p 1\n/set min_p 0\n/retry\n/retry\n");
    assert_eq!(hot[0], out[0]);
    assert!(hot[1] != hot[0] && hot[2] != hot[1], "{hot:?}");
    let (_, _, err) =
        scene.run(&["chat", "-m", "model.elleci", "--system", "A"], "/stats\n/system A B C\n/stats\n/system\n/stats\n");
    let size = |text: &str| tokenizer().encode(text).len();
    for content in ["A", "A B C"] {
        // <|im_start|>, the role, a line break, the content and <|im_end|>.
        let line = format!("0 exchanges | {} tokens", 2 + size("system") + size("\n") + size(content));
        assert!(err.contains(&line), "{line}: {err}");
    }
    assert!(err.contains("0 exchanges | 0 tokens"), "{err}");
    // Saved in one process, gone on with in another.
    scene.chat(&["--temp", "0"], "Ciao\n/save d.chat\n");
    assert_eq!(scene.chat(&["--load", "d.chat"], "Come stai?\n"), out[1..]);
    let (_, _, err) = scene.run(&["chat", "-m", "model.elleci"], "/help\n/set\n/stats\n/load d.chat\n");
    for part in ["/retry", "temperature 0.8", "0 exchanges", "> Ciao"] {
        assert!(err.contains(part), "{part}: {err}");
    }
}

#[test]
fn what_goes_wrong_in_a_dialogue_is_said() {
    let scene = Scene::new();
    scene.chat(&[], "Ciao\n/save good.chat\n");
    let good = fs::read(scene.path("good.chat")).unwrap();
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    fs::write(scene.path("flipped.chat"), flipped).unwrap();
    fs::write(scene.path("cut.chat"), &good[..good.len() - 1]).unwrap();
    fs::write(scene.path("short.chat"), &good[..10]).unwrap();
    fs::write(scene.path("other.chat"), "ciao").unwrap();
    for (input, parts) in [
        ("/frob\n", &["/frob", "/help"][..]),
        ("/retry\n", &["no message"]),
        ("/undo\n", &["nothing to take back"]),
        ("/set top_p 7\n", &["`top_p` is 7"]),
        ("/save\n", &["name of a file"]),
        ("/save no/such/folder\n", &["no/such/folder"]),
        ("/load absent\n", &["absent"]),
        ("/load flipped.chat\n", &["flipped.chat", "damaged"]),
        ("/load cut.chat\n", &["cut.chat", "damaged"]),
        ("/load short.chat\n", &["short.chat", "truncated"]),
        ("/load other.chat\n", &["other.chat", "not a saved dialogue"]),
    ] {
        let (code, out, err) = scene.run(&["chat", "-m", "model.elleci"], input);
        assert_eq!((code, out.as_str()), (Some(1), ""), "{input}: {err}");
        for part in parts {
            assert!(err.contains(part), "{input}: {err}");
        }
    }
    let (code, ..) = scene.run(&["chat", "-m", "model.elleci"], "Ciao\n/bogus\nCiao\n");
    assert_eq!(code, Some(1));
}

#[test]
fn bench_makes_the_table() {
    let scene = Scene::new();
    let run = |args: &[&str]| scene.ok(&[&["bench", "-p", "8,4", "-n", "3", "-r", "2"], args].concat(), "");
    let table = run(&["-m", "model.elleci", "-t", "1,2", "-d", "0,5", "--parallel", "1,3"]);
    assert_eq!(table.lines().count(), 2 + 2 * 2 * 4, "{table}");
    for part in ["| model.elleci |", " pp8 @ d5 |", " tg3 |", " tg3 x3 |", " ± ", "| threads |"] {
        assert!(table.contains(part), "{part}: {table}");
    }
    let json: Value = serde_json::from_str(&run(&["-m", "bare.elleci", "-o", "json"])).unwrap();
    assert_eq!((json.as_array().unwrap().len(), &json[2]["n_gen"]), (3, &Value::from(3)));
    assert_eq!(json[0]["samples_ts"].as_array().unwrap().len(), 2);
    assert!(json[0]["avg_ts"].as_f64().unwrap() > 0.0);
    assert_eq!(run(&["--preset", "nano", "-o", "csv"]).lines().count(), 4);
}

/// The logits of deployment are those of training's sequence forward.
#[test]
fn logits_are_those_of_the_trained_model() {
    let scene = Scene::new();
    let (rows, seq) = (2, 6);
    let tokens: Vec<i64> = (0..12).map(|i| (i * 29 + 4) % VOCAB as i64).collect();
    let integers = |values: &[i64], shape: &[usize]| {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        Tensor { name: "tokens".into(), dtype: Dtype::I64, shape: shape.to_vec(), bytes: Bytes::Ready(bytes.into()) }
    };
    write(&scene.path("io"), vec![integers(&tokens, &[rows, seq])]).unwrap();
    // A folder is packed in memory, embedding and head as int8.
    hf::write(&scene.path("hf"), &config(), param_tensors(&params(1.0)), None).unwrap();
    let (code, out, err) = scene.run(&["logits", "-m", "hf", "--batch", "io", "--out", "out"], "");
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("packing hf (Hugging Face folder"), "{err}");
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["shape"], serde_json::json!([rows, seq, VOCAB]));
    scene.ok(&["logits", "-m", "hf", "--batch", "io", "--out", "steps", "--decode"], "");
    let read = |name: &str| {
        let mut logits = vec![0.0; rows * seq * VOCAB];
        TensorFile::open(&scene.path(name)).unwrap().read_floats("logits", &[rows, seq, VOCAB], &mut logits).unwrap();
        logits
    };
    let found = [read("out"), read("steps")];
    assert!(found[0] != found[1], "prompts and single tokens are computed in different orders");

    let model = Model::new(config(), params(1.0)).unwrap();
    let mut ws = Workspace::new(&config(), rows, seq, Checkpointing::None);
    let ids: Vec<u32> = tokens.iter().map(|t| *t as u32).collect();
    let batch = Batch { batch: rows, seq, tokens: &ids, targets: &ids, weights: &[1.0; 12] };
    let mut want = vec![0.0; rows * seq * VOCAB];
    model.logits(&mut ws, &batch, &mut want).unwrap();
    let scale = want.iter().map(|v| v.abs()).fold(0.0, f32::max);
    // An element of an int8 row is off by at most a/254 (a the row's largest, some 3 deviations of a weight): uniform, that
    // is 0.7 % of a weight's deviation, and so of the deviation of a logit. Of 4,000 logits the worst is off by 4 such
    // deviations, and the largest is 3 deviations of a logit: 0.9 % of it. The embedding's rounding adds as much again, and int8
    // activations that fall to the other side in four layers of the size of the embedding up to twice that: 4 % together.
    for found in found {
        let worst = found.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 0.05 * scale, "{worst} of {scale}");
    }

    for (name, tensor, part) in [
        ("flat", integers(&tokens, &[12]), "[B, T]"),
        ("empty", integers(&[], &[0, 4]), "empty"),
        ("high", integers(&[1, VOCAB as i64], &[1, 2]), "holds 352"),
        ("names", Tensor { name: "targets".into(), ..integers(&tokens, &[rows, seq]) }, "no tensor `tokens`"),
    ] {
        write(&scene.path(name), vec![tensor]).unwrap();
        scene.fails(&["logits", "-m", "bare.elleci", "--batch", name, "--out", "x"], 1, &["--batch", part]);
        assert!(!scene.path("x").exists());
    }
}

#[test]
fn wrong_usage_exits_with_2() {
    let scene = Scene::new();
    scene.fails(&[], 2, &["Usage"]);
    scene.fails(&["bench"], 2, &["--model"]);
    for (args, part) in [
        (&["--temp", "-1"][..], "`temperature` is -1"),
        (&["--top-p", "0"], "`top_p` is 0"),
        (&["--min-p", "2"], "`min_p` is 2"),
        (&["--repeat-penalty", "0"], "`repetition_penalty` is 0"),
        (&["--device", "tpu"], "tpu"),
        (&["--device", "cuda"], "--device cpu"),
        (&["--tokens", "-p", "1 2 352"], "`352`"),
        (&["--tokens", "-p", "due"], "0 to 351"),
        (&["-n", "-7"], "-7"),
        (&["--system", "x", "-p", "x"], "--chat"),
    ] {
        scene.fails(&[&["generate", "-m", "model.elleci"], args].concat(), 2, &[part]);
    }
    scene.fails(&["bench", "--preset", "huge"], 2, &["huge", "elleci-1.5b"]);
    scene.fails(&["bench", "-m", "model.elleci", "-p", "0", "-n", "0"], 2, &["nothing to measure"]);
    scene.fails(&["bench", "-m", "model.elleci", "--parallel", "0"], 2, &["--parallel"]);
    for verb in ["generate", "chat", "bench", "logits"] {
        assert!(scene.ok(&[verb, "--help"], "").contains("Example"), "{verb}");
    }
}

#[test]
fn bad_models_and_prompts_are_named() {
    let scene = Scene::new();
    let generate = |model: &str, parts: &[&str]| {
        scene.fails(&["generate", "-m", model, "-p", "x"], 1, &[&["--model", model], parts].concat());
    };
    generate("absent.elleci", &["elleci-convert"]);
    fs::write(scene.path("empty.elleci"), "").unwrap();
    generate("empty.elleci", &["empty"]);
    fs::write(scene.path("text.elleci"), "x".repeat(4096)).unwrap();
    generate("text.elleci", &["no .elleci archive"]);
    let whole = fs::read(scene.path("model.elleci")).unwrap();
    fs::write(scene.path("cut.elleci"), &whole[..whole.len() - 64]).unwrap();
    generate("cut.elleci", &[]);
    let mut flipped = whole.clone();
    flipped[whole.len() / 2] ^= 4;
    fs::write(scene.path("flipped.elleci"), flipped).unwrap();
    generate("flipped.elleci", &[]);
    fs::create_dir(scene.path("folder")).unwrap();
    scene.fails(&["generate", "-m", "folder", "-p", "x"], 2, &["--model", "folder", "config.json"]);
    hf::write(&scene.path("hf"), &config(), param_tensors(&params(f32::NAN)), None).unwrap();
    generate("hf", &["lm_head.weight", "not finite"]);
    let broken = to_bytes(&config(), &params(1.0), Some(b"{}"), PackOptions::default()).unwrap();
    fs::write(scene.path("broken.elleci"), broken).unwrap();
    generate("broken.elleci", &["tokenizer"]);
    let small = ModelConfig { vocab_size: 320, ..config() };
    let small = to_bytes(&small, &initialise(&small, 1), Some(tokenizer().json()), PackOptions::default()).unwrap();
    fs::write(scene.path("small.elleci"), small).unwrap();
    generate("small.elleci", &["tokenizer has 330", "`vocab_size` of 320"]);

    scene.fails(&["generate", "-m", "bare.elleci", "-p", "x"], 1, &["no tokenizer", "--tokens"]);
    scene.fails(&["chat", "-m", "bare.elleci"], 1, &["no tokenizer"]);
    assert_eq!(
        scene.ok(&["generate", "-m", "bare.elleci", "--tokens", "-p", "5, 6", "-n", "3"], "").split(' ').count(),
        3
    );
    scene.fails(&["generate", "-m", "model.elleci", "-f", "nowhere"], 1, &["nowhere"]);
    let long = "grande ".repeat(50);
    scene.fails(&["generate", "-m", "model.elleci", "-p", &long, "-c", "20"], 1, &["limit is 20", "--context"]);
}

/// Ctrl-C ends a text, not in the middle of a character, and the program says how it ended.
#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_text() {
    let scene = Scene::new();
    let mut command = scene.command(&["generate", "-m", "model.elleci", "-p", "La", "-n", "-1", "--temp", "1.2"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut out = child.stdout.take().unwrap();
    let mut first = [0; 64];
    out.read_exact(&mut first).unwrap();
    let reader = std::thread::spawn(move || {
        let mut rest = Vec::new();
        out.read_to_end(&mut rest).unwrap();
        rest
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let all = [&first[..], &reader.join().unwrap()].concat();
    assert_eq!(output.status.code(), Some(130));
    assert!(std::str::from_utf8(&all).unwrap().ends_with('\n'));
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(err.contains("interrupted |") && err.contains("tokens/s"), "{err}");
}

/// A reader that goes away ends the program, without a complaint.
#[cfg(unix)]
#[test]
fn a_closed_pipe_is_no_error() {
    let scene = Scene::new();
    for args in
        [&["generate", "-m", "model.elleci", "-p", "x", "-n", "-1"][..], &["chat", "-m", "model.elleci", "-n", "-1"]]
    {
        let mut command = scene.command(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"Ciao\n").unwrap();
        child.stdout.take().unwrap().read_exact(&mut [0; 8]).unwrap();
        let output = child.wait_with_output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{err}");
        assert!(!err.contains("error"), "{err}");
    }
}

/// On a fresh clone, without a model of one's own.
#[test]
fn the_bundled_model_answers() {
    let scene = Scene::new();
    let (code, out, err) = scene.run(&["chat", "--temp", "0", "-n", "60"], "Ciao!\nCome ti chiami?\n");
    assert_eq!(code, Some(0), "{err}");
    let answers: Vec<&str> = out.lines().collect();
    assert_eq!(answers.len(), 2, "{out}");
    assert!(answers[0].starts_with("Ciao") && answers[1].split_whitespace().count() > 2, "{out}");
    assert!(err.contains("the bundled model; -m takes another"), "{err}");

    let text = scene.ok(&["generate", "-p", "C'era una volta", "-n", "20", "--temp", "0"], "");
    assert!(text.split_whitespace().count() > 5, "{text}");
    let (_, _, quiet) = scene.run(&["generate", "-q", "-p", "C'era", "-n", "2"], "");
    assert_eq!(quiet, "");
}
