//! A small run for tests of the whole binary: its data, its configuration, and its process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use elleci_tools::data::shards::{ShardOptions, ShardWriter, Split};
use elleci_tools::report::metrics::{Record, read};
use tempfile::TempDir;

/// Ids of the test data.
pub const VOCAB: usize = 64;

/// A model of some thousand parameters with every kind of layer, 24 steps, a checkpoint every third.
pub const CONFIG: &str = r#"
[model]
vocab_size = 64
d_model = 32
n_layers = 4
max_seq_len = 32
n_heads = 2
kv_rank = 8
d_nope = 8
d_rope = 4
d_v = 8
d_inner = 64
head_dim = 16
d_state = 8
ffn_hidden = 48
[training]
steps = 24
batch = 4
accumulation = 2
sequence = [{ until = 0.5, length = 16 }, { until = 1.0, length = 32 }]
eval_interval = 12
save_interval = 3
threads = 1
[data]
sources = { one = "", two = "" }
phases = [{ until = 0.75, weights = { one = 0.8, two = 0.2 } }, { until = 1.0, weights = { one = 0.3, two = 0.7 } }]
[swa]
start = 0.6
"#;

/// A directory with `run.toml` and shards under `data`.
pub struct Scene {
    dir: TempDir,
}

impl Scene {
    pub fn new() -> Scene {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("run.toml"), CONFIG).unwrap();
        for (source, step) in [("one", 3), ("two", 7)] {
            write_shards(&dir.path().join("data").join(source), VOCAB, step);
        }
        Scene { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `elleci-train --config run.toml --data data --out OUT` and more.
    pub fn command(&self, out: &str, more: &[&str]) -> Command {
        let mut command = self.bare(&["--config", "run.toml", "--data", "data", "--out", out]);
        command.args(more);
        command
    }

    /// `elleci-train` with these arguments alone.
    pub fn bare(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_elleci-train"));
        command.args(args).current_dir(self.dir.path()).stdin(Stdio::null());
        command
    }

    /// Runs to the end and expects an exit code; returns standard output and error.
    pub fn expect(&self, mut command: Command, code: i32) -> (String, String) {
        let Output { status, stdout, stderr } = command.output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&stdout).into_owned(), String::from_utf8_lossy(&stderr).into_owned());
        assert_eq!(status.code(), Some(code), "{command:?}\n{out}\n{err}");
        (out, err)
    }

    pub fn spawn(&self, mut command: Command) -> Child {
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Step and loss, to the bit, of all steps in the metrics of a run.
    pub fn losses(&self, out: &str) -> Vec<(u64, u64)> {
        let loss = |record: Record| match record {
            Record::Step(step) => Some((step.step, step.loss.to_bits())),
            _ => None,
        };
        read(&self.path(out)).unwrap().into_iter().filter_map(loss).collect()
    }

    /// Names of the checkpoints of a run, oldest first; temporary ones too.
    pub fn checkpoints(&self, out: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path(out).join("checkpoints")) else { return Vec::new() };
        let mut names: Vec<_> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// Documents in which the next token mostly follows from the one before.
pub fn write_shards(dir: &Path, vocab: usize, step: usize) {
    let mut token_bytes = vec![3; vocab];
    token_bytes[0] = 0;
    let options = ShardOptions {
        tokenizer_sha256: "0".repeat(64),
        token_bytes,
        end_of_text: 0,
        shard_tokens: ShardOptions::DEFAULT_SHARD_TOKENS,
        overwrite: false,
    };
    let mut writer = ShardWriter::create(dir, options).unwrap();
    for document in 0..60 {
        let mut tokens: Vec<u32> =
            (0..50 + document % 40).map(|i| ((1 + document + i * step) % (vocab - 1) + 1) as u32).collect();
        tokens.push(0);
        let split = if document % 10 == 0 { Split::Val } else { Split::Train };
        writer.push(split, &tokens, None).unwrap();
    }
    writer.finish().unwrap();
}
