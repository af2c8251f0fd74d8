//! A run with a checkpoint, its tokenizer and a text, and the program on them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use elleci_core::archive::{AlignedBytes, Archive};
use elleci_core::config::ModelConfig;
use elleci_core::init::initialise;
use elleci_core::params::Params;
use elleci_tools::checkpoint::{FORMAT, RngState, State, Store, TokenizerId};
use elleci_tools::data::tokenizer::{Tokenizer, TrainOptions, train_tokenizer};
use elleci_tools::train::backend::param_tensors;
use elleci_tools::train::layers;
use serde_json::Value;
use tempfile::TempDir;

/// Rows of the embedding.
pub const VOCAB: usize = 300;

/// Odd sizes that fit together, and no preset's.
pub fn tiny() -> ModelConfig {
    ModelConfig {
        vocab_size: VOCAB,
        d_model: 24,
        n_layers: 4,
        n_heads: 2,
        kv_rank: 10,
        d_nope: 6,
        d_rope: 4,
        d_v: 5,
        d_inner: 36,
        head_dim: 12,
        d_state: 7,
        ffn_hidden: 22,
        max_seq_len: 32,
        ..ModelConfig::preset("nano").unwrap()
    }
}

/// A run with one checkpoint, `run/checkpoints/step-00000007`, whose tokenizer is in `run/final`.
pub struct Scene {
    pub dir: TempDir,
    pub params: Params,
    pub average: Params,
    pub tokenizer: Tokenizer,
}

impl Scene {
    pub fn new() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        let (params, average) = (initialise(&tiny(), 1), initialise(&tiny(), 2));
        let text = "La storia della casa e del mare. ".repeat(50);
        let options = TrainOptions { words: Vec::new(), ..TrainOptions::new(280, 280) };
        let tokenizer = train_tokenizer([text].into_iter(), &options).unwrap();
        fs::create_dir_all(dir.path().join("run/final")).unwrap();
        tokenizer.save(&dir.path().join("run/final/tokenizer.json")).unwrap();
        let store = Store::open(&dir.path().join("run/checkpoints")).unwrap();
        let mut run = layers::load(None, &[]).unwrap();
        run.model = tiny();
        let mut state = State {
            format: FORMAT,
            step: 7,
            phase: 0,
            tokens: 7 * 64,
            skipped: 0,
            updates: 7,
            averaged: 2,
            rng: RngState::new(0),
            data: Value::Null,
            tokenizer: TokenizerId { hash: tokenizer.sha256().to_string(), vocab_size: VOCAB },
            seconds: 1.0,
            config: run,
            files: Default::default(),
        };
        let groups = vec![("model.safetensors", param_tensors(&params)), ("swa.safetensors", param_tensors(&average))];
        store.save(&mut state, groups).unwrap();
        fs::write(dir.path().join("text.txt"), "La storia del mare e della casa.\n".repeat(20)).unwrap();
        Scene { dir, params, average, tokenizer }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn run(&self, args: &[&str]) -> Output {
        run(self.dir.path(), args)
    }

    /// Runs and expects success; returns standard output.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", stderr(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(args)).unwrap()
    }

    /// Runs and expects `code`, a message with every one of `parts`, and not a file more or less than before.
    pub fn fails(&self, args: &[&str], code: i32, parts: &[&str]) {
        let before = self.names();
        let output = self.run(args);
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {message}");
        for part in parts {
            assert!(message.contains(part), "{args:?}: `{part}` is not in: {message}");
        }
        assert_eq!(self.names(), before, "{args:?} left something");
    }

    /// What is in the scene, hidden names too.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> =
            fs::read_dir(self.dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    pub fn archive(&self, name: &str) -> Archive<AlignedBytes> {
        Archive::open(AlignedBytes::from(&fs::read(self.path(name)).unwrap()[..])).unwrap()
    }
}

/// The program, in a directory.
pub fn run(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_elleci-convert")).current_dir(dir).args(args).output().expect("the binary runs")
}

/// What a program said on standard error.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The path of a PyTorch file.
pub fn fixture(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../fixtures/pth").join(name).display().to_string()
}
