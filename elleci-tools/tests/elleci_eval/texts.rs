//! `--text`: bits per byte of any text.

use std::fs;
#[cfg(unix)]
use std::process::{Command, Stdio};
#[cfg(unix)]
use std::time::{Duration, Instant};

use serde_json::Value;

#[cfg(unix)]
use super::kept;
use super::{Scene, fed, with};

#[test]
fn any_text_has_bits_per_byte() {
    let s = Scene::new();
    let text = "La città è più grande che bella: perché no? ".repeat(40);
    s.put("romanzo.txt", &text);
    let (out, _) = s.ok(&["-m", "model.elleci", "--text", "romanzo.txt", "--json", "-"]);
    let r: Value = serde_json::from_str(&out).unwrap();
    let entry = &r["results"]["text_0_romanzo"];
    let bits = entry["bits_per_byte,none"].as_f64().unwrap();
    assert_eq!(entry["bits_per_byte_stderr,none"], "N/A");
    // Bits of a byte and perplexity of a byte are the same number in two forms.
    let perplexity = entry["byte_perplexity,none"].as_f64().unwrap();
    assert!((perplexity.log2() - bits).abs() < 1e-9 && bits > 0.0, "{entry}");
    fs::write(s.path("latin1.txt"), b"citt\xe0").unwrap();
    s.fails(&["-m", "model.elleci", "--text", "latin1.txt"], 1, &["latin1.txt", "UTF-8"]);
    s.fails(&["-m", "model.elleci", "--text", "none.txt"], 1, &["none.txt"]);
    s.put("empty.txt", "");
    s.fails(&["-m", "model.elleci", "--text", "empty.txt"], 1, &["empty.txt", "empty, and there is nothing"]);
    s.put("data/own.jsonl", "{\"text\":\"\"}\n{\"text\":\"\"}\n");
    let head = "name = \"own\"\ntitle = \"\"\nversion = 1.0\nkind = \"rolling\"\n";
    s.put("own.toml", &format!("{head}metrics = [\"bits_per_byte\"]\ntext = \"{{{{ text }}}}\"\n"));
    s.fails(&["-m", "model.elleci", "--tasks", "own.toml", "--data", "data"], 1, &["own", "nothing to score"]);
}

#[test]
fn windows_of_a_text_slide_by_the_stride() {
    let s = Scene::new();
    s.put("romanzo.txt", &"La città è più grande che bella: perché no? ".repeat(60));
    let run = |more: &[&str]| -> (Value, u64) {
        let (out, err) = s.ok(&with(&["-m", "model.elleci", "--text", "romanzo.txt", "--json", "-"], more));
        (serde_json::from_str(&out).unwrap(), fed(&err))
    };
    let stride = |r: &Value| r["elleci"]["tasks"]["text_0_romanzo"]["stride"].as_u64();
    let bits = |r: &Value| r["results"]["text_0_romanzo"]["bits_per_byte,none"].as_f64().unwrap();
    let (half, fed_half) = run(&[]);
    let (disjoint, fed_disjoint) = run(&["--stride", "256"]);
    assert_eq!((stride(&half), stride(&disjoint)), (Some(128), Some(256)));
    assert_eq!(half["configs"]["text_0_romanzo"]["overlap"], 129);
    // Other windows are other questions, for the cache too, and half a window reads most tokens twice.
    assert_ne!(bits(&half), bits(&disjoint));
    assert!(fed_disjoint > 0 && fed_half * 2 > fed_disjoint * 3, "{fed_half} {fed_disjoint}");
    let (again, fed) = run(&["--stride", "128"]);
    assert_eq!((&again["results"], fed), (&half["results"], 0), "half a window is the default, and was answered");
    let (out, _) = s.ok(&["-m", "model.elleci", "--tasks", "it_bits_per_byte", "--limit", "1", "--json", "-"]);
    let bundled: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(bundled["elleci"]["tasks"]["it_bits_per_byte"]["stride"], 256, "as the harness has it");
    let text = ["-m", "model.elleci", "--text", "romanzo.txt"];
    s.fails(&with(&text, &["--stride", "257"]), 2, &["--stride", "256", "--max-length"]);
    s.fails(&with(&text, &["--stride", "0"]), 2, &["--stride"]);
    s.fails(&["-m", "model.elleci", "--tasks", "it_bits_per_byte", "--stride", "8"], 2, &["--text"]);
}

#[cfg(unix)]
#[test]
fn a_text_that_was_interrupted_goes_on_within_it_to_the_same_bit() {
    let s = Scene::new();
    let words = ["La città", "è più", "grande", "che bella:", "perché no?", "17"];
    let text: Vec<&str> = (0..60_000u64).map(|i| words[(i * i / 7 % 6) as usize]).collect();
    s.put("romanzo.txt", &text.join(" "));
    let args = ["-m", "model.elleci", "--text", "romanzo.txt", "--max-length", "64", "-t", "1"];
    let mut child = s.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while kept(&s) < 3 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be stopped");
        assert!(start.elapsed() < Duration::from_secs(120), "nothing was kept");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(130), "{err}");
    assert!(err.contains("answers are kept"), "{err}");
    let (_, rest) = s.ok(&with(&args, &["--json", "resumed.json"]));
    let (_, whole) = s.ok(&with(&args, &["--json", "whole.json", "--no-cache"]));
    assert_eq!(s.json("resumed.json")["results"], s.json("whole.json")["results"]);
    let (first, rest) = (fed(&err), fed(&rest));
    assert!(first > 0 && rest > 0);
    assert_eq!(first + rest, fed(&whole), "no token is fed twice");
}
