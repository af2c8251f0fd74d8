//! What the user is told about a model: notes, and reasons.

use std::fs;

use elleci_core::config::ModelConfig;
use elleci_core::init::initialise;
use elleci_tools::data::tokenizer::{TrainOptions, train_tokenizer};
use elleci_tools::hf;
use elleci_tools::train::backend::param_tensors;
use serde_json::Value;

use crate::scene::{Scene, stderr, tiny};

fn notes(report: &Value) -> String {
    report["notes"].to_string()
}

#[test]
fn tokenizers_of_other_models() {
    let scene = Scene::new();
    let options = TrainOptions { words: Vec::new(), ..TrainOptions::new(290, 290) };
    let other = train_tokenizer(["Un altro testo, con altre parole. ".repeat(50)].into_iter(), &options).unwrap();
    other.save(&scene.path("other.json")).unwrap();
    let flag = ["--tokenizer", "other.json"];
    let hash = scene.tokenizer.sha256().to_string();
    scene.fails(&[&["run", "x.elleci"], &flag[..]].concat(), 2, &["other.json", "another tokenizer", &hash]);
    scene.fails(&[&["run", "x"], &flag[..]].concat(), 2, &["another tokenizer"]);
    // The right one from elsewhere is as good as the run's own.
    scene.ok(&["run", "x.elleci", "--tokenizer", "run/final/tokenizer.json"]);

    // Where nobody knows the hash, far fewer tokens than rows are worth a word.
    let config = ModelConfig { vocab_size: 600, ..tiny() };
    hf::write(&scene.path("wide"), &config, param_tensors(&initialise(&config, 1)), None).unwrap();
    let report = scene.json(&[&["wide", "w.elleci", "--json"], &flag[..]].concat());
    assert!(notes(&report).contains(&format!("{} tokens and the model 600", other.config().tokens)), "{report}");
    let report = scene.json(&["run", "x.elleci", "--json", "--force"]);
    assert_eq!(notes(&report), "[]");

    // An archive's own may be unusable, and is then replaced.
    scene.ok(&["wide", "small.elleci", "--tokenizer", "other.json"]);
    let bytes = elleci_core::archive::to_bytes(&tiny(), &scene.params, Some(b"{}"), Default::default()).unwrap();
    fs::write(scene.path("odd.elleci"), bytes.as_ref()).unwrap();
    scene.fails(&["odd.elleci", "odd"], 1, &["the tokenizer is unusable", "--tokenizer gives another"]);
    scene.ok(&["odd.elleci", "odd", "--tokenizer", "run/final/tokenizer.json"]);
}

/// What is there and cannot be read is not absent. A directory stands for all that cannot be read: tests may run as root.
#[test]
fn a_tokenizer_that_cannot_be_read() {
    let scene = Scene::new();
    scene.ok(&["run", "m"]);
    fs::remove_file(scene.path("m/tokenizer.json")).unwrap();
    scene.ok(&["m", "without.elleci"]);
    fs::create_dir(scene.path("m/tokenizer.json")).unwrap();
    for from in ["m", "m/model.safetensors"] {
        scene.fails(&[from, "x.elleci"], 1, &["m/tokenizer.json", "--tokenizer"]);
        scene.ok(&[from, "with.elleci", "--force", "--tokenizer", "run/final/tokenizer.json"]);
    }
    fs::remove_file(scene.path("run/final/tokenizer.json")).unwrap();
    fs::create_dir(scene.path("run/final/tokenizer.json")).unwrap();
    let report = scene.json(&["run", "x.elleci", "--json"]);
    assert!(notes(&report).contains("not found, ") && notes(&report).contains("final/tokenizer.json"), "{report}");
}

#[test]
fn values_that_do_not_fit() {
    let scene = Scene::new();
    let mut params = scene.params.clone();
    params.data_mut()[..3].copy_from_slice(&[1e6, -65505.0, f32::MAX]);
    hf::write(&scene.path("large"), &tiny(), param_tensors(&params), None).unwrap();
    for (dense, count) in [("f32", 0), ("f16", 3), ("bf16", 1), ("int8", 0)] {
        let report = scene.json(&["large", "x.elleci", "--dense", dense, "--force", "--json"]);
        let told = notes(&report);
        match count {
            0 => assert!(!told.contains("too large"), "{told}"),
            _ => assert!(told.contains(&format!("{count} values are too large for --dense {dense}")), "{told}"),
        }
        scene.ok(&["inspect", "x.elleci"]);
    }
}

/// Both models of a comparison score the same bytes, whatever their tokenizers make of them.
#[test]
fn one_text_for_both() {
    let scene = Scene::new();
    scene.ok(&["run", "a"]);
    scene.ok(&["run", "b"]);
    let options = TrainOptions { words: Vec::new(), ..TrainOptions::new(262, 262) };
    let other = train_tokenizer(["Un altro testo, con altre parole. ".repeat(50)].into_iter(), &options).unwrap();
    other.save(&scene.path("b/tokenizer.json")).unwrap();
    fs::write(scene.path("it.txt"), "Perché la città è così? La storia del mare. ".repeat(20)).unwrap();
    for most in ["1", "7", "50", "0"] {
        let report = scene.json(&["compare", "a", "b", "--text", "it.txt", "--text-tokens", most, "--json"]);
        let [a, b] = [&report["models"][0], &report["models"][1]];
        assert_eq!(a["bytes"], b["bytes"], "{report}");
        // Or else the test tells nothing.
        assert!(a["tokens"].as_u64() < b["tokens"].as_u64() || most != "0", "{report}");
    }
    // The same tokenizer twice: as many tokens as were asked for.
    let report = scene.json(&["compare", "a", "a", "--text", "it.txt", "--text-tokens", "50", "--json"]);
    assert_eq!((&report["models"][0]["tokens"], &report["models"][1]["tokens"]), (&50.into(), &50.into()));
}

/// A model that was trained with long sequences is scored in windows that fit every machine.
#[test]
fn windows_are_bounded() {
    let scene = Scene::new();
    for (name, max_seq_len) in [("a", 4096), ("b", 1 << 24)] {
        let config = ModelConfig { max_seq_len, ..tiny() };
        let tokenizer = scene.path("run/final/tokenizer.json");
        hf::write(&scene.path(name), &config, param_tensors(&scene.params), Some(&tokenizer)).unwrap();
    }
    fs::write(scene.path("long.txt"), "abcdefghij".repeat(600)).unwrap();
    let report = scene.json(&["compare", "a", "b", "--text", "long.txt", "--json"]);
    assert!(report["models"][0]["tokens"].as_u64() > Some(5000), "longer than a window: {report}");
    assert_eq!(report["relative_difference"], 0.0, "{report}");
}

#[test]
fn names_in_a_file_do_not_command_a_terminal() {
    use elleci_tools::checkpoint::tensors::{Tensor, write};
    let scene = Scene::new();
    write(&scene.path("x.safetensors"), vec![Tensor::f32("a\u{1b}[31m\nb", &[1], &[0.5])]).unwrap();
    let message = stderr(&scene.run(&["inspect", "x.safetensors", "--config", "nano"]));
    assert!(message.contains("a\\u{1b}[31m\\nb [1]") && !message.contains('\u{1b}'), "{message}");
    let output = scene.run(&["inspect", "x.safetensors"]);
    let table = String::from_utf8(output.stdout.clone()).unwrap();
    assert!(table.contains("a\\u{1b}[31m\\nb") && !table.contains('\u{1b}'), "{table}");
    assert!(!stderr(&output).contains('\u{1b}'));
    for verb in ["inspect", "compare"] {
        assert!(scene.ok(&[verb, "--help"]).contains("Examples:"));
    }
}
