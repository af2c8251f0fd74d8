//! `elleci-eval` as a user meets it, on a tiny model with random weights.

mod texts;

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use elleci_core::archive::{PackOptions, to_bytes};
use elleci_core::config::ModelConfig;
use elleci_core::init::initialise;
use elleci_core::params::ParamKind;
use elleci_tools::data::tokenizer::{Tokenizer, TrainOptions, train_tokenizer};
use serde_json::Value;

/// Rows of the embedding; the tokenizer has fewer tokens.
const VOCAB: usize = 352;

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: VOCAB,
        d_model: 32,
        n_layers: 4,
        max_seq_len: 256,
        n_heads: 2,
        kv_rank: 8,
        d_nope: 8,
        d_rope: 4,
        d_v: 8,
        d_inner: 64,
        head_dim: 16,
        d_state: 8,
        ffn_hidden: 48,
        ..ModelConfig::preset("nano").unwrap()
    }
}

fn tokenizer() -> &'static Tokenizer {
    static TOKENIZER: OnceLock<Tokenizer> = OnceLock::new();
    TOKENIZER.get_or_init(|| {
        let texts = (0..200).map(|i| format!("La città è più {} che bella: perché no? {i}", "grande ".repeat(i % 5)));
        train_tokenizer(texts, &TrainOptions { tokens: 330, vocab_size: VOCAB, words: Vec::new() }).unwrap()
    })
}

/// `model.elleci`, `other.elleci` of other weights, `bare.elleci` without a tokenizer, and data of two tasks under `data`.
struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Scene {
        let scene = Scene { dir: tempfile::tempdir().unwrap() };
        let archive = |seed, tokenizer: Option<&[u8]>| {
            let mut params = initialise(&config(), seed);
            let layout = params.layout().clone();
            for p in layout.params().iter().filter(|p| p.kind == ParamKind::Embedding) {
                params.data_mut()[p.range.clone()].iter_mut().for_each(|w| *w *= 40.0);
            }
            to_bytes(&config(), &params, tokenizer, PackOptions::default()).unwrap()
        };
        fs::write(scene.path("model.elleci"), archive(11, Some(tokenizer().json()))).unwrap();
        fs::write(scene.path("other.elleci"), archive(12, Some(tokenizer().json()))).unwrap();
        fs::write(scene.path("bare.elleci"), archive(11, None)).unwrap();
        let pairs: String =
            (0..40).map(|i| format!("{{\"sen\":\"Io vado via {i}.\",\"wrong_sen\":\"Io va via {i}.\"}}\n")).collect();
        scene.put("data/multiblimp_ita.jsonl", &pairs);
        let row = |i: usize| {
            format!(
                "{{\"premise\":\"Piove {i}.\",\"choice1\":\"Mi bagno.\",\"choice2\":\"Esce.\",\"question\":\"effect\",\"label\":{}}}\n",
                i % 2
            )
        };
        scene.put("data/cambridgeltl/xcopa/it/test/0000.jsonl", &(0..10).map(row).collect::<String>());
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn put(&self, name: &str, text: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_elleci-eval"));
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        command.env("XDG_CACHE_HOME", self.path("cache"));
        command
    }

    /// Exit code, standard output, standard error.
    fn run(&self, args: &[&str]) -> (Option<i32>, String, String) {
        let Output { status, stdout, stderr } = self.command(args).output().unwrap();
        (status.code(), String::from_utf8(stdout).unwrap(), String::from_utf8_lossy(&stderr).into_owned())
    }

    fn ok(&self, args: &[&str]) -> (String, String) {
        let (code, out, err) = self.run(args);
        assert_eq!(code, Some(0), "{args:?}: {err}");
        (out, err)
    }

    fn json(&self, name: &str) -> Value {
        serde_json::from_str(&fs::read_to_string(self.path(name)).unwrap()).unwrap()
    }

    fn fails(&self, args: &[&str], code: i32, parts: &[&str]) {
        let (found, out, err) = self.run(args);
        assert_eq!(found, Some(code), "{args:?}: {out}{err}");
        for part in parts {
            assert!(err.contains(part), "{args:?}: `{part}` is not in: {err}");
        }
    }
}

/// The tokens that a run says it has fed.
fn fed(err: &str) -> u64 {
    let line = err.lines().find_map(|l| l.split_once(" tokens in")).expect("tokens are counted");
    line.0.replace(',', "").parse().unwrap()
}

const TWO: [&str; 6] = ["-m", "model.elleci", "--tasks", "multiblimp_ita,xcopa_it", "--data", "data"];

fn with<'a>(base: &[&'a str], more: &[&'a str]) -> Vec<&'a str> {
    [base, more].concat()
}

#[test]
fn results_are_the_harness_s_layout_and_the_log_holds_every_item() {
    let s = Scene::new();
    let (out, _) = s.ok(&with(&TWO, &["--json", "r.json", "--log", "log"]));
    assert!(out.starts_with("| task") && out.contains("multiblimp_ita") && out.contains("acc_norm"), "{out}");
    let r = s.json("r.json");
    assert_eq!(r, s.json("log/results.json"));
    for (task, n) in [("multiblimp_ita", 40), ("xcopa_it", 10)] {
        let entry = &r["results"][task];
        let accuracy = entry["acc,none"].as_f64().unwrap();
        let samples = fs::read_to_string(s.path(&format!("log/samples_{task}.jsonl"))).unwrap();
        let lines: Vec<Value> = samples.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(lines.len(), n);
        let mut right = 0.0;
        for line in &lines {
            let scores: Vec<f64> =
                line["filtered_resps"].as_array().unwrap().iter().map(|s| s[0].as_f64().unwrap()).collect();
            let best = if scores[1] > scores[0] { 1 } else { 0 };
            assert_eq!(line["acc"].as_f64().unwrap(), f64::from(u8::from(line["target"] == best)));
            right += line["acc"].as_f64().unwrap();
        }
        assert!((accuracy - right / n as f64).abs() < 1e-12);
        let deviation = (accuracy * (1.0 - accuracy) / (n as f64 - 1.0)).sqrt();
        assert!((entry["acc_stderr,none"].as_f64().unwrap() - deviation).abs() < 1e-12);
        assert_eq!(r["n-samples"][task]["effective"], n);
        assert_eq!(r["higher_is_better"][task]["acc"], true);
        assert_eq!(r["elleci"]["tasks"][task]["chance"]["acc"], 0.5);
    }
    assert_eq!(r["versions"]["xcopa_it"], 1.0);
    let xcopa = fs::read_to_string(s.path("log/samples_xcopa_it.jsonl")).unwrap();
    let first: Value = serde_json::from_str(xcopa.lines().next().unwrap()).unwrap();
    assert_eq!(first["arguments"]["gen_args_1"]["arg_0"], "Piove 0 quindi");
    assert_eq!(first["arguments"]["gen_args_1"]["arg_1"], " esce.");
    assert_eq!(first["doc"]["premise"], "Piove 0.");
    // The same from the other tasks' company, another thread count, and a fresh cache.
    s.ok(&with(
        &["-m", "model.elleci", "--tasks", "xcopa_it", "--data", "data", "--no-cache", "-t", "1"],
        &["--json", "one.json"],
    ));
    assert_eq!(s.json("one.json")["results"]["xcopa_it"], r["results"]["xcopa_it"]);
    let (out, _) = s.ok(&with(&TWO, &["--json", "-", "--limit", "3"]));
    let limited: Value = serde_json::from_str(&out).expect("one object on standard output");
    assert_eq!(limited["n-samples"]["multiblimp_ita"]["original"], 40);
    assert_eq!(limited["n-samples"]["multiblimp_ita"]["effective"], 3);
}

/// The answers in the cache, by file.
fn kept(s: &Scene) -> usize {
    let mut lines = 0;
    let Ok(models) = fs::read_dir(s.path("cache/elleci/eval")) else { return 0 };
    for model in models {
        for file in fs::read_dir(model.unwrap().path()).unwrap() {
            lines += fs::read_to_string(file.unwrap().path()).unwrap().lines().count().saturating_sub(1);
        }
    }
    lines
}

#[test]
fn what_was_answered_is_not_asked_again() {
    let s = Scene::new();
    s.ok(&with(&TWO, &["--limit", "5", "--json", "a.json"]));
    assert_eq!(kept(&s), 10);
    let (_, err) = s.ok(&with(&TWO, &["--limit", "5", "--json", "b.json"]));
    assert!(err.contains("\n0 tokens in"), "{err}");
    assert_eq!(s.json("a.json")["results"], s.json("b.json")["results"]);
    s.ok(&TWO);
    assert_eq!(kept(&s), 50);
    // Another model, window, number of examples or other data: other answers.
    s.ok(&with(&TWO[2..], &["-m", "other.elleci"]));
    assert_eq!(kept(&s), 100);
    let (_, err) = s.ok(&with(&TWO, &["--max-length", "100"]));
    assert!(!err.contains("\n0 tokens in"), "{err}");
    s.put("data/multiblimp_ita.jsonl", "{\"sen\":\"a\",\"wrong_sen\":\"b\"}\n{\"sen\":\"c\",\"wrong_sen\":\"d\"}\n");
    let (_, err) = s.ok(&TWO);
    assert!(!err.contains("\n0 tokens in"), "{err}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_the_answers_and_the_next_run_goes_on() {
    let s = Scene::new();
    let many: String =
        (0..20_000).map(|i| format!("{{\"sen\":\"Io vado via {i}.\",\"wrong_sen\":\"Io va via {i}.\"}}\n")).collect();
    s.put("data/multiblimp_ita.jsonl", &many);
    let args = ["-m", "model.elleci", "--tasks", "multiblimp_ita", "--data", "data"];
    let mut child = s.command(&args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let start = Instant::now();
    while kept(&s) == 0 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be stopped");
        assert!(start.elapsed() < Duration::from_secs(120), "nothing was kept");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{err}");
    assert!(err.contains("answers are kept"), "{err}");
    let first = kept(&s);
    assert!((1..20_000).contains(&first), "{first}");
    let limit = (first + 128).to_string();
    let (_, err) = s.ok(&with(&args, &["--limit", &limit]));
    assert_eq!(kept(&s), first + 128, "{err}");
}

#[test]
fn missing_data_is_told_and_the_others_go_on() {
    let s = Scene::new();
    let (code, out, err) = s.run(&["-m", "model.elleci", "--tasks", "arc_it,xcopa_it", "--data", "data"]);
    assert_eq!(code, Some(1), "{err}");
    assert!(out.contains("xcopa_it") && !out.contains("arc_it"), "{out}");
    assert!(err.contains("elleci-data fetch --eval --tasks arc_it"), "{err}");
    // A damaged file of one task leaves the other alone, too.
    s.put("data/arc_it.jsonl", "{\"instruction\":\"a\"}\n");
    let (code, out, err) = s.run(&["-m", "model.elleci", "--tasks", "arc_it,xcopa_it", "--data", "data"]);
    assert_eq!((code, out.contains("xcopa_it")), (Some(1), true), "{err}");
    assert!(err.contains("arc_it.jsonl") && err.contains("no column `option_a`"), "{err}");
    // Rows that are there, but none for the examples.
    fs::remove_file(s.path("data/arc_it.jsonl")).unwrap();
    s.put(
        "data/m_mmlu_it.jsonl",
        "{\"instruction\":\"a\",\"option_a\":\"b\",\"option_b\":\"c\",\"option_c\":\"d\",\"option_d\":\"e\",\"answer\":\"A\"}\n",
    );
    let (_, err) = s.ok(&["-m", "model.elleci", "--data", "data", "--limit", "2"]);
    let line = err.lines().find(|l| l.starts_with("m_mmlu_it: ")).unwrap_or_else(|| panic!("{err}"));
    assert!(line.contains("split `train`") && line.contains("--shots 0"), "{line}");
    let none = err.lines().find(|l| l.contains("tasks have no data")).unwrap_or_else(|| panic!("{err}"));
    assert!(none.contains("squad_it") && !none.contains("m_mmlu_it"), "{none}");
    s.ok(&["-m", "model.elleci", "--data", "data", "--tasks", "m_mmlu_it", "--shots", "0"]);
    fs::remove_file(s.path("data/m_mmlu_it.jsonl")).unwrap();
    // A suite passes over what has no data.
    let (out, err) = s.ok(&["-m", "model.elleci", "--data", "data", "--limit", "2"]);
    assert!(err.contains("have no data") && err.contains("hellaswag_it"), "{err}");
    for name in ["it_minimal_pairs", "- subjunctive", "it_bits_per_byte", "it_generation", "xcopa_it"] {
        assert!(name == "- subjunctive" || out.contains(name), "{name}: {out}");
    }
}

#[test]
fn answers_of_another_kernel_are_other_answers() {
    let s = Scene::new();
    let args = with(&TWO, &["--limit", "5"]);
    s.ok(&args);
    let output = s.command(&args).env("ELLECI_ISA", "portable").output().unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    let portable = elleci_core::simd::Isa::detect() == elleci_core::simd::Isa::Portable;
    assert_eq!(err.contains("\n0 tokens in"), portable, "{err}");
}

#[test]
fn two_runs_are_compared_item_by_item() {
    let s = Scene::new();
    s.ok(&with(&TWO, &["--log", "a"]));
    s.ok(&with(&TWO[2..], &["-m", "other.elleci", "--log", "b"]));
    let (out, _) = s.ok(&["compare", "a", "b"]);
    assert!(out.starts_with("| task") && out.contains("xcopa_it"), "{out}");
    let (json, _) = s.ok(&["compare", "a", "b", "--json"]);
    let r: Value = serde_json::from_str(&json).unwrap();
    let results = |run: &str, task: &str| s.json(&format!("{run}/results.json"))["results"][task]["acc,none"].as_f64();
    for d in r["differences"].as_array().unwrap().iter().filter(|d| d["metric"] == "acc") {
        let task = d["task"].as_str().unwrap();
        assert_eq!((d["a"].as_f64(), d["b"].as_f64()), (results("a", task), results("b", task)), "{task}");
    }
    let (same, _) = s.ok(&["compare", "a", "a", "--json"]);
    let same: Value = serde_json::from_str(&same).unwrap();
    assert!(same["differences"].as_array().unwrap().iter().all(|d| d["difference"] == 0.0 && d["p"] == 1.0), "{same}");
    s.fails(&["compare", "a", "nowhere"], 1, &["nowhere", "--log"]);
    // Items that were asked otherwise are no pairs.
    s.put("data/multiblimp_ita.jsonl", "{\"sen\":\"a\",\"wrong_sen\":\"b\"}\n{\"sen\":\"c\",\"wrong_sen\":\"d\"}\n");
    s.ok(&with(&TWO, &["--log", "c"]));
    s.fails(&["compare", "a", "c"], 1, &["multiblimp_ita", "not asked the same"]);
}

#[test]
fn parts_and_means_of_groups_are_compared_and_guessing_at_classes_has_a_value() {
    let s = Scene::new();
    let row = |i: usize| format!("{{\"full_text\":\"Tweet {i}.\",\"hs\":{}}}\n", u8::from(i.is_multiple_of(3)));
    s.put("data/evalita-mp_hs.jsonl", &(0..12).map(row).collect::<String>());
    let args = ["--tasks", "it_minimal_pairs,evalita-mp_hs", "--data", "data", "--limit", "64"];
    s.ok(&with(&args, &["-m", "model.elleci", "--log", "a"]));
    s.ok(&with(&args, &["-m", "other.elleci", "--log", "b"]));
    let results = |run: &str| s.json(&format!("{run}/results.json"));
    let (a, b) = (results("a"), results("b"));
    // 4 of 12 are of the class: guessing gets Σ C(12, c) / 2¹² · 2c · 4/12 / (4 + c) = 0.3912.
    for name in ["evalita-mp_hs_prompt-1", "evalita-mp_hs_prompt-6"] {
        let chance = a["elleci"]["tasks"][name]["chance"]["f1"].as_f64().unwrap();
        assert!((chance - 0.3912).abs() < 5e-5, "{chance}");
    }
    let (json, _) = s.ok(&["compare", "a", "b", "--json", "--resamples", "100"]);
    let r: Value = serde_json::from_str(&json).unwrap();
    let all = r["differences"].as_array().unwrap();
    let parts: Vec<&Value> = all.iter().filter(|d| !d["part"].is_null()).collect();
    assert_eq!(parts.len(), 16);
    for d in &parts {
        let part = d["part"].as_str().unwrap();
        let of = |run: &Value| run["elleci"]["tasks"]["it_minimal_pairs"]["parts"][part]["acc"].clone();
        assert_eq!((&d["a"], &d["b"], &d["n"]), (&of(&a), &of(&b), &Value::from(4)), "{part}");
    }
    let mean = all.iter().find(|d| d["task"] == "evalita-mp_hs").expect("the group's mean");
    for (key, run) in [("a", &a), ("b", &b)] {
        let value = run["groups"]["evalita-mp_hs"]["f1,none"].as_f64().unwrap();
        assert!((mean[key].as_f64().unwrap() - value).abs() < 1e-12, "{mean}");
    }
    assert_eq!((&mean["n"], &mean["variants"]), (&Value::from(72), &Value::from(6)));
    // 100 draws cannot tell less than 2 in 101.
    assert!(all.iter().all(|d| d["p"].as_f64().unwrap() >= 2.0 / 101.0), "{json}");
    let (out, _) = s.ok(&["compare", "a", "b", "--resamples", "100"]);
    assert!(out.contains("| - subjunctive") && out.contains("| evalita-mp_hs (mean)"), "{out}");
}

#[test]
fn wrong_usage_and_hostile_definitions_are_told_by_name() {
    let s = Scene::new();
    // Without -m: the bundled model, which arc_it asks nothing for want of data.
    s.fails(&["--tasks", "arc_it"], 1, &["no data"]);
    s.fails(&["-m", "model.elleci", "--tasks", "arc_ti"], 2, &["arc_ti", "arc_it"]);
    s.fails(&["-m", "model.elleci", "--tasks", ""], 2, &["--tasks", "empty"]);
    s.fails(&["-m", "model.elleci", "--tasks", "nosuch.toml"], 2, &["nosuch.toml", "cannot read"]);
    s.fails(&["-m", "model.elleci", "--data", "nowhere"], 2, &["--data", "nowhere"]);
    s.fails(&["-m", "model.elleci", "--limit", "0"], 2, &["--limit"]);
    s.fails(&["-m", "nowhere.elleci"], 1, &["nowhere.elleci"]);
    s.fails(&["-m", "bare.elleci"], 1, &["no tokenizer", "--tokenizer"]);
    s.put(
        "bad.toml",
        "name = \"../x\"\ntitle = \"\"\nversion = 1.0\nkind = \"rolling\"\nmetrics = [\"bits_per_byte\"]\n",
    );
    s.fails(&["-m", "model.elleci", "--tasks", "bad.toml"], 2, &["bad.toml", "`name`"]);
    s.put("bad.toml", "name = 1");
    s.fails(&["-m", "model.elleci", "--tasks", "bad.toml"], 2, &["bad.toml", "name"]);
    // A template that would not end, and one that asks for what is not there.
    let own = |text: &str| {
        let toml = format!(
            "name = \"own\"\ntitle = \"\"\nversion = 1.0\nkind = \"rolling\"\nmetrics = [\"bits_per_byte\"]\ntext = {text:?}\n"
        );
        s.put("own.toml", &toml);
        s.put("data/own.jsonl", "{\"a\":\"La città\"}\n{\"a\":\"è più grande\"}\n");
    };
    let args = ["-m", "model.elleci", "--tasks", "own.toml", "--data", "data"];
    own("{% for i in range(9999) %}{% for j in range(9999) %}{{ a }}{% endfor %}{% endfor %}");
    s.fails(&args, 1, &["own", "fuel"]);
    own("{{ b }}");
    s.fails(&args, 1, &["own", "row 1", "undefined"]);
    own("{{ a");
    // The definition is to blame, and no row.
    s.fails(&args, 1, &[r#"own: cannot run: template "{{ a": syntax error"#]);
    own("{{ a }}.");
    let (out, _) = s.ok(&args);
    assert!(out.contains("own"), "{out}");
    // A continuation that no window holds ends its task, and not the run.
    let long = "perché no? ".repeat(200);
    s.put("data/multiblimp_ita.jsonl", &format!("{{\"sen\":\"{long}\",\"wrong_sen\":\"b\"}}\n"));
    let (code, out, err) = s.run(&TWO);
    assert_eq!((code, out.contains("xcopa_it")), (Some(1), true), "{err}");
    assert!(err.contains("multiblimp_ita") && err.contains("--max-length"), "{err}");
    assert!(err.contains(&long[..36]) && !err.contains(&long[..60]), "only its beginning is shown: {err}");
}

#[test]
fn tasks_are_listed_with_source_and_licence() {
    let s = Scene::new();
    let (out, _) = s.ok(&["list"]);
    for part in ["arc_it", "alexandrainst/m_arc it", "CC BY-SA 4.0", "evalita-mp_te_prompt-6", "bundled"] {
        assert!(out.contains(part), "{part}: {out}");
    }
    let (json, _) = s.ok(&["list", "--json"]);
    let tasks: Value = serde_json::from_str(&json).unwrap();
    assert!(tasks["tasks"].as_array().unwrap().len() > 50);
}

#[cfg(feature = "hub")]
#[test]
fn a_bundled_task_has_nothing_to_be_fetched() {
    let s = Scene::new();
    let mut command = Command::new(env!("CARGO_BIN_EXE_elleci-data"));
    let command =
        command.args(["fetch", "--eval", "--tasks", "it_arithmetic", "--out", "eval"]).current_dir(s.dir.path());
    let Output { status, stderr, .. } = command.output().unwrap();
    let err = String::from_utf8_lossy(&stderr);
    assert!(status.success() && err.contains("need no data"), "{err}");
}
