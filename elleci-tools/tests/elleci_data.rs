//! `elleci-data` as a user meets it: exit codes, messages, files.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

fn command(dir: &Path, args: &[&str]) -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_elleci-data"));
    c.current_dir(dir).args(args);
    c
}

fn run(dir: &Path, args: &[&str]) -> Output {
    command(dir, args).output().expect("the binary runs")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs and expects success; returns standard output.
fn ok(dir: &Path, args: &[&str]) -> String {
    let output = run(dir, args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// Runs and expects `code` and a message that holds every one of `parts`; nothing on standard output.
fn fails(dir: &Path, args: &[&str], code: i32, parts: &[&str]) {
    let output = run(dir, args);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {message}");
    assert!(output.stdout.is_empty(), "{args:?} wrote to standard output");
    for part in parts {
        assert!(message.contains(part), "{args:?}: `{part}` is not in: {message}");
    }
}

/// A corpus, a tokenizer and a shard set.
fn workspace() -> tempfile::TempDir {
    let tmp = tempfile::tempdir().unwrap();
    let line =
        |i: usize| format!("{{\"text\":\"La storia {i} della casa {} e del mare.\"}}\n", "sul monte ".repeat(i % 9));
    fs::write(tmp.path().join("corpus.jsonl"), (0..400).map(line).collect::<String>()).unwrap();
    fs::write(
        tmp.path().join("dialogues.jsonl"),
        "{\"instruction\":\"Chi è?\",\"output\":\"È il mare.\"}\n{\"instruction\":\"\",\"output\":\"x\"}\n",
    )
    .unwrap();
    fs::write(tmp.path().join("words.txt"), "casa\nmare\n").unwrap();
    ok(
        tmp.path(),
        &["tokenizer", "--vocab", "400", "--words", "words.txt", "--out", "tok/tokenizer.json", "corpus.jsonl"],
    );
    ok(tmp.path(), &["prepare", "-t", "tok", "-o", "set", "--holdout", "0.1", "corpus.jsonl"]);
    tmp
}

#[test]
fn from_text_to_figures() {
    let tmp = workspace();
    let dir = tmp.path();
    let stats: serde_json::Value =
        serde_json::from_str(&ok(dir, &["stats", "set", "--tokenizer", "tok", "--json"])).unwrap();
    let documents = |split: &str| stats[split]["documents"].as_u64().unwrap();
    assert_eq!(documents("train") + documents("val"), 400);
    assert!(documents("val") > 10);
    assert_eq!(stats["vocab_size"], 400);
    assert_eq!(stats["train"]["target_share"], 1.0);
    assert!(stats["example"][0]["text"].as_str().unwrap().starts_with("La storia"));
    let table = ok(dir, &["stats", "set", "--tokenizer", "tok"]);
    assert!(table.contains("⟦La storia") && table.contains("<|endoftext|>⟧"), "{table}");

    let output = run(dir, &["prepare", "-t", "tok", "-o", "chat", "--holdout", "0", "--json", "dialogues.jsonl"]);
    assert!(stderr(&output).contains("1 x empty text (first: dialogues.jsonl:2)"), "{}", stderr(&output));
    let summary: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(summary["rejected"]["reasons"]["empty text"]["count"], 1);
    let table = ok(dir, &["stats", "chat", "--tokenizer", "tok"]);
    assert!(
        table
            .contains("<|im_start|>user\nChi è?<|im_end|>\n<|im_start|>assistant\n⟦È il mare.<|im_end|>⟧<|endoftext|>")
    );

    // The same again gives the same bytes.
    let first = fs::read(dir.join("tok/tokenizer.json")).unwrap();
    ok(dir, &["tokenizer", "--vocab", "400", "--words", "words.txt", "--out", "again.json", "corpus.jsonl"]);
    assert_eq!(first, fs::read(dir.join("again.json")).unwrap());
    let first = fs::read(dir.join("set/index.json")).unwrap();
    ok(
        dir,
        &["prepare", "-t", "tok", "-o", "set", "--holdout", "0.1", "--overwrite", "--threads", "1", "corpus.jsonl"],
    );
    assert_eq!(first, fs::read(dir.join("set/index.json")).unwrap());
}

#[test]
fn wrong_usage_exits_with_2() {
    let tmp = tempfile::tempdir().unwrap();
    let dir = tmp.path();
    fails(dir, &[], 2, &["Usage"]);
    fails(dir, &["frobnicate"], 2, &["frobnicate"]);
    fails(dir, &["prepare", "--out", "x", "in.jsonl"], 2, &["--tokenizer"]);
    fails(dir, &["prepare", "-t", "t", "-o", "x", "--schema", "csv", "in.jsonl"], 2, &["csv", "oasst"]);
    fails(dir, &["fetch", "--demo", "--only", "oasst"], 2, &["--only"]);
    fails(dir, &["tokenizer"], 2, &["INPUT"]);
    for holdout in ["nan", "-0.1", "1", "2"] {
        fails(dir, &["prepare", "-t", "t", "-o", "x", "--holdout", holdout, "in.jsonl"], 2, &["--holdout", "below 1"]);
    }
    for (option, value) in [("--shard-tokens", "0"), ("--threads", "5000")] {
        fails(dir, &["prepare", "-t", "t", "-o", "x", option, value, "in.jsonl"], 2, &[option, value]);
    }
    // Before anything is read: there is no input.
    fails(dir, &["tokenizer", "--vocab", "0", "in.jsonl"], 2, &["the vocabulary is 0"]);
    fails(dir, &["tokenizer", "--vocab", "65537", "in.jsonl"], 2, &["the vocabulary is 65537"]);
    fails(dir, &["tokenizer", "--vocab", "300", "--pad-to", "299", "in.jsonl"], 2, &["padding to 299"]);
    fails(dir, &["tokenizer", "in.jsonl"], 2, &["in.jsonl", "cannot read the input"]);
    assert!(ok(dir, &["--help"]).contains("130 stopped by Ctrl-C"));
    for verb in ["fetch", "tokenizer", "prepare", "stats"] {
        assert!(ok(dir, &[verb, "--help"]).contains("Examples:"), "{verb}");
    }
}

#[test]
fn bad_inputs_are_named_and_leave_nothing() {
    let tmp = workspace();
    let dir = tmp.path();
    fs::write(dir.join("empty.jsonl"), "").unwrap();
    fs::write(dir.join("rotten.jsonl"), "x\n{}\n").unwrap();
    fs::write(dir.join("odd.jsonl"), "{\"foo\":\"x\"}\n").unwrap();
    fs::write(dir.join("table.csv"), "a,b\n").unwrap();
    let prepare = |input: &str, code: i32, parts: &[&str]| {
        fails(dir, &["prepare", "-t", "tok", "-o", "new", input], code, parts);
        assert!(!dir.join("new").exists() && !dir.join(".new.partial").exists() && !dir.join(".new.lock").exists());
    };
    prepare("nowhere.jsonl", 2, &["nowhere.jsonl", "cannot read the input"]);
    prepare("empty.jsonl", 1, &["no usable document"]);
    prepare("rotten.jsonl", 1, &["rotten.jsonl", "no known schema"]);
    prepare("odd.jsonl", 1, &["odd.jsonl", "columns (foo)", "--schema"]);
    prepare("table.csv", 2, &["table.csv", "unknown kind of file", ".jsonl"]);
    fails(dir, &["prepare", "-t", "tok", "-o", "set", "corpus.jsonl"], 2, &["set", "--overwrite"]);
    fails(dir, &["prepare", "-t", "none", "-o", "new", "corpus.jsonl"], 1, &["none", "elleci-data tokenizer"]);
    fails(dir, &["tokenizer", "--vocab", "400", "empty.jsonl"], 1, &["no text"]);
    fails(dir, &["tokenizer", "--vocab", "90000", "corpus.jsonl"], 2, &["90000", "65536"]);
    fails(dir, &["tokenizer", "--vocab", "270", "corpus.jsonl", "--words", "nolist"], 1, &["nolist"]);
    assert!(!dir.join("tokenizer.json").exists());

    fs::write(dir.join("tok/tokenizer.json"), "{").unwrap();
    fails(
        dir,
        &["prepare", "-t", "tok", "-o", "new", "corpus.jsonl"],
        1,
        &["tokenizer.config.json", "do not belong together"],
    );
    fs::remove_file(dir.join("tok/tokenizer.config.json")).unwrap();
    fails(dir, &["prepare", "-t", "tok", "-o", "new", "corpus.jsonl"], 1, &["tokenizer.json", "not a valid tokenizer"]);
}

#[test]
fn a_tokenizer_replaces_no_input_and_nothing_unasked() {
    let tmp = workspace();
    let dir = tmp.path();
    let before = fs::read(dir.join("corpus.jsonl")).unwrap();
    let train = |out: &str, more: &[&str], code: i32, parts: &[&str]| {
        let args = [&["tokenizer", "--vocab", "300", "--words", "words.txt", "--out", out], more].concat();
        fails(dir, &args, code, parts);
    };
    train("corpus.jsonl", &["corpus.jsonl"], 2, &["corpus.jsonl", "is an input"]);
    train("corpus.jsonl", &["--overwrite", "corpus.jsonl"], 2, &["corpus.jsonl", "is an input"]);
    train("tok/../corpus.jsonl", &["--overwrite", "corpus.jsonl"], 2, &["is an input"]);
    train("words.txt", &["--overwrite", "corpus.jsonl"], 2, &["words.txt", "is an input"]);
    // Found in a directory that is read.
    train("tok/tokenizer.json", &["--overwrite", "tok", "corpus.jsonl"], 2, &["tok/tokenizer.json", "is an input"]);
    train("tok", &["--overwrite", "corpus.jsonl"], 2, &["tok", "not a regular file"]);
    train("tok/tokenizer.json", &["corpus.jsonl"], 2, &["tok/tokenizer.json", "--overwrite"]);
    fs::write(dir.join("lone.config.json"), "{}").unwrap();
    train("lone.json", &["corpus.jsonl"], 2, &["lone.config.json", "--overwrite"]);
    assert_eq!(fs::read(dir.join("corpus.jsonl")).unwrap(), before);
    assert_eq!(fs::read_to_string(dir.join("words.txt")).unwrap(), "casa\nmare\n");
    let train = ["tokenizer", "--vocab", "300", "--words", "words.txt", "--out", "tok/tokenizer.json", "--overwrite"];
    assert!(ok(dir, &[&train[..], &["corpus.jsonl"]].concat()).contains("padded to 300"));
}

#[test]
fn damaged_sets_are_refused() {
    let tmp = workspace();
    let dir = tmp.path();
    ok(dir, &["tokenizer", "--vocab", "280", "--words", "words.txt", "--out", "other.json", "corpus.jsonl"]);
    fails(dir, &["stats", "set", "-t", "other.json"], 1, &["`tokenizer_sha256`", "pass the one"]);
    fails(dir, &["stats", "nowhere"], 1, &["nowhere", "no such directory"]);

    let bin = dir.join("set/train-00000.bin");
    let good = fs::read(&bin).unwrap();
    let mut bad = good.clone();
    bad[20] ^= 1;
    fs::write(&bin, &bad).unwrap();
    fails(dir, &["stats", "set"], 1, &["train-00000.bin", "checksum"]);
    ok(dir, &["stats", "set", "--no-verify"]);
    fs::write(&bin, &good[..good.len() - 1]).unwrap();
    fails(dir, &["stats", "set", "--no-verify"], 1, &["train-00000.bin", "truncated"]);
    fs::write(&bin, &good).unwrap();

    let index = dir.join("set/index.json");
    let json = fs::read_to_string(&index).unwrap();
    fs::write(&index, &json[..json.len() / 2]).unwrap();
    fails(dir, &["stats", "set"], 1, &["index.json", "not valid JSON"]);
    fs::write(&index, json.replace("\"vocab_size\": 400", "\"vocab_size\": 300")).unwrap();
    fails(dir, &["stats", "set"], 1, &["token-bytes.bin", "vocab_size"]);
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_nothing_half_written() {
    let tmp = workspace();
    let dir = tmp.path();
    // A pipe that never ends: the run is surely in the middle when the signal comes.
    let fifo = dir.join("endless.jsonl");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let mut child =
        command(dir, &["prepare", "-t", "tok", "-o", "new", "endless.jsonl"]).stderr(Stdio::piped()).spawn().unwrap();
    let mut pipe = fs::OpenOptions::new().write(true).open(&fifo).unwrap();
    pipe.write_all(b"{\"text\":\"uno\"}\n").unwrap();
    let start = Instant::now();
    while !dir.join(".new.partial").exists() {
        assert!(start.elapsed() < Duration::from_secs(30), "the writer did not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    // The handler runs on its own thread: keep the rows coming until they are no longer wanted.
    while child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < Duration::from_secs(60), "the run did not stop");
        let _ = pipe.write_all(b"{\"text\":\"due\"}\n");
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert!(stderr(&output).contains("interrupted; nothing was written"), "{}", stderr(&output));
    for name in ["new", ".new.partial", ".new.lock"] {
        assert!(!dir.join(name).exists(), "{name}");
    }
}

/// A hub on the loopback interface: one dataset file, which breaks off in the middle as often as it is told.
struct Hub {
    content: Vec<u8>,
    sha256: String,
    break_offs: AtomicU32,
    /// The first byte that each download asked for.
    starts: Mutex<Vec<usize>>,
    /// Data set, revision as it stands in addresses, file.
    place: (&'static str, &'static str, &'static str),
}

const FILE: &str = "data/train-00000-of-00001.parquet";

impl Hub {
    fn serve(&self, stream: &mut (impl Read + Write)) -> std::io::Result<()> {
        let mut lines = BufReader::new(&mut *stream).lines();
        let request = lines.next().transpose()?.unwrap_or_default();
        let mut start = None;
        for line in lines.by_ref() {
            let line = line?.to_ascii_lowercase();
            if let Some(range) = line.strip_prefix("range: bytes=") {
                let (first, last) = range.split_once('-').unwrap();
                start = Some((first.parse::<usize>().unwrap(), last.parse::<usize>().ok()));
            }
            if line.is_empty() {
                break;
            }
        }
        drop(lines);
        let path = request.split(' ').nth(1).unwrap_or_default();
        let (repo, revision, file) = self.place;
        if path == format!("/api/datasets/{repo}/revision/{revision}") {
            let body = format!(
                "{{\"sha\":\"c0ffee\",\"siblings\":[{{\"rfilename\":\"README.md\"}},{{\"rfilename\":\"{file}\"}}]}}"
            );
            return write!(
                stream,
                "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
                body.len()
            );
        }
        if path != format!("/datasets/{repo}/resolve/{revision}/{file}") {
            return write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
        let total = self.content.len();
        let (first, last) = start.unwrap_or((0, None));
        let body = &self.content[first..last.map_or(total, |l| l + 1)];
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {first}-{}/{total}\r\n\
             X-Repo-Commit: c0ffee\r\nETag: \"{}\"\r\nConnection: close\r\n\r\n",
            body.len(),
            first + body.len() - 1,
            self.sha256
        )?;
        if last.is_some() {
            return stream.write_all(body);
        }
        self.starts.lock().unwrap().push(first);
        let breaks = self.break_offs.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok();
        stream.write_all(if breaks { &body[..body.len() / 2] } else { body })
    }
}

/// Starts a hub that serves until the test ends; returns its address.
fn start(hub: &'static Hub) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // A client that goes away is its own test's affair.
            let _ = stream.and_then(|mut s| hub.serve(&mut s));
        }
    });
    address
}

fn hub(break_offs: u32, sha256: impl Fn(&[u8]) -> String) -> &'static Hub {
    hub_of(("OpenAssistant/oasst1", "main", FILE), break_offs, sha256)
}

fn hub_of(
    place: (&'static str, &'static str, &'static str),
    break_offs: u32,
    sha256: impl Fn(&[u8]) -> String,
) -> &'static Hub {
    let content: Vec<u8> = (0..300_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
    let sha256 = sha256(&content);
    Box::leak(Box::new(Hub { content, sha256, break_offs: break_offs.into(), starts: Mutex::default(), place }))
}

fn fetch(dir: &Path, endpoint: &str) -> Output {
    fetch_with(dir, endpoint, &["--only", "oasst"])
}

fn fetch_with(dir: &Path, endpoint: &str, what: &[&str]) -> Output {
    command(dir, &[&["fetch", "--out", "got"], what].concat())
        .env("HF_ENDPOINT", endpoint)
        .env("HF_HOME", dir.join("hf"))
        .env_remove("HTTP_PROXY")
        .env_remove("http_proxy")
        .env_remove("ALL_PROXY")
        .env_remove("all_proxy")
        .output()
        .unwrap()
}

#[test]
fn fetch_gets_a_corpus_and_goes_on_where_it_broke_off() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = hub(2, elleci_tools::data::shards::sha256_hex);
    let endpoint = start(hub);
    let output = fetch(tmp.path(), &endpoint);
    assert!(output.status.success(), "{}", stderr(&output));
    let got = tmp.path().join("got/oasst/train-00000-of-00001.parquet");
    assert_eq!(fs::read(&got).unwrap(), hub.content);
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "got/oasst/train-00000-of-00001.parquet");
    let starts = hub.starts.lock().unwrap().clone();
    // Each attempt asks for what is missing, not for the whole.
    assert_eq!(starts, [0, 150_000, 225_000]);
    // Again: nothing is downloaded.
    assert!(fetch(tmp.path(), &endpoint).status.success());
    assert_eq!(hub.starts.lock().unwrap().len(), 3);
}

#[test]
fn fetch_refuses_a_wrong_checksum_and_reports_an_absent_hub() {
    let tmp = tempfile::tempdir().unwrap();
    let hub = hub(0, |_| "0".repeat(64));
    let output = fetch(tmp.path(), &start(hub));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("checksum") && stderr(&output).contains(FILE), "{}", stderr(&output));
    assert!(!tmp.path().join("got/oasst").exists());
    let blobs = tmp.path().join("hf/hub/datasets--OpenAssistant--oasst1/blobs");
    let left: Vec<_> = fs::read_dir(blobs).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert!(left.iter().all(|n| n.to_string_lossy().ends_with(".lock")), "{left:?}");

    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let output = fetch(tmp.path(), &format!("http://{closed}"));
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("cannot list the dataset OpenAssistant/oasst1"), "{}", stderr(&output));
}

/// The branch that holds the parquet form of every data set.
const CONVERTED: &str = "refs%2Fconvert%2Fparquet";

#[test]
fn test_sets_come_from_their_parquet_form_and_what_is_absent_is_named() {
    let tmp = tempfile::tempdir().unwrap();
    let place = ("alexandrainst/m_hellaswag", CONVERTED, "it/val/0000.parquet");
    let hub = hub_of(place, 1, elleci_tools::data::shards::sha256_hex);
    let output = fetch_with(tmp.path(), &start(hub), &["--eval", "--tasks", "hellaswag_it"]);
    assert!(output.status.success(), "{}", stderr(&output));
    let got = "got/alexandrainst/m_hellaswag/it/val/0000.parquet";
    assert_eq!(fs::read(tmp.path().join(got)).unwrap(), hub.content);
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), got);

    // The split of the examples is not there: the other one is got all the same. A set without a parquet form has its own files.
    let place = ("cambridgeltl/xcopa", "main", "data/it/test.jsonl");
    let output = fetch_with(
        tmp.path(),
        &start(hub_of(place, 0, elleci_tools::data::shards::sha256_hex)),
        &["--eval", "--tasks", "xcopa_it"],
    );
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(stderr(&output).contains("no file of the split validation of it"), "{}", stderr(&output));
    assert!(tmp.path().join("got/cambridgeltl/xcopa/it/test/test.jsonl").exists());

    fails(tmp.path(), &["fetch", "--eval", "--tasks", "xcopa_ti"], 2, &["is it `xcopa_it`?"]);
    fails(tmp.path(), &["fetch", "--tasks", "xcopa_it"], 2, &["--eval"]);
}
