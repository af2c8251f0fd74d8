//! `elleci-train` as a whole: what it leaves, what it refuses, and how it says so.

use crate::scene::{Scene, VOCAB, write_shards};
use elleci_tools::checkpoint::tensors::{Bytes, Tensor, TensorFile, write};
use elleci_tools::{data, hf};
use safetensors::Dtype;

#[test]
fn a_run_leaves_models_checkpoints_and_logs_and_is_not_done_twice() {
    let scene = Scene::new();
    let (out, err) = scene.expect(scene.command("run", &["--record-batches", "batches"]), 0);
    assert!(out.contains("loss ") && out.contains("model run/final"), "{out}");
    assert!(err.contains("device cpu | 1 thread (as asked"), "{err}");
    let (config, params) = hf::read(&scene.path("run/final")).unwrap();
    assert_eq!(config.vocab_size, VOCAB);
    assert!(params.data().iter().all(|v| v.is_finite()));
    let (_, average) = hf::read(&scene.path("run/final-swa")).unwrap();
    assert_ne!(average.data(), params.data());
    assert_eq!(scene.checkpoints("run"), ["step-00000018", "step-00000021", "step-00000024"]);
    for name in ["config.toml", "metrics.jsonl", "metrics.csv", "evals.csv", "report.html", "loss.svg"] {
        assert!(scene.path("run").join(name).is_file(), "{name}");
    }
    let losses = scene.losses("run");
    assert_eq!(losses.len(), 24);
    let (first, last) = (f64::from_bits(losses[0].1), f64::from_bits(losses[23].1));
    assert!(last < first, "{first} -> {last}");

    // The recorded stream: two micro-batches of 4 x 16 at first, of 4 x 32 from the middle on.
    for (step, seq) in [(1, 16), (12, 16), (13, 32), (24, 32)] {
        let file = TensorFile::open(&scene.path(&format!("batches/batch-{step:08}.safetensors"))).unwrap();
        for micro in 0..2 {
            let (shape, tokens) = file.read_integers(&format!("micro.{micro}.tokens")).unwrap();
            assert_eq!(shape, [4, seq]);
            let (_, targets) = file.read_integers(&format!("micro.{micro}.targets")).unwrap();
            assert_eq!(tokens[1..seq], targets[..seq - 1]);
        }
        assert_eq!(file.entries()["lr"].shape, [4]);
    }

    let (out, err) = scene.expect(scene.command("run", &[]), 0);
    assert!(out.is_empty() && err.contains("finished run of 24 steps") && err.contains("--out"), "{out}{err}");
    let (_, err) = scene.expect(scene.command("run", &["--resume", "never"]), 2);
    assert!(err.contains("--resume never"), "{err}");
    // Longer, without saying anything again but where the data is.
    scene.expect(scene.bare(&["--resume", "run", "--steps", "27"]), 0);
    assert_eq!(scene.losses("run").len(), 27);
    assert_eq!(scene.losses("run")[..24], losses);
}

#[test]
fn the_same_losses_at_one_and_two_threads() {
    let scene = Scene::new();
    for threads in ["1", "2"] {
        scene.expect(scene.command(threads, &["--threads", threads]), 0);
    }
    assert_eq!(scene.losses("1"), scene.losses("2"));
}

#[test]
fn a_model_starts_from_another_ones_weights() {
    let scene = Scene::new();
    scene.expect(scene.command("run", &[]), 0);
    for init in ["run/final", "run/checkpoints/step-00000024"] {
        let out = format!("from-{}", init.len());
        scene.expect(scene.command(&out, &["--init", init, "--steps", "2"]), 0);
        let (fresh, trained) = (f64::from_bits(scene.losses("run")[0].1), f64::from_bits(scene.losses(&out)[0].1));
        assert!(trained < fresh, "{init}: {trained}, fresh {fresh}");
    }
    let (_, err) = scene.expect(scene.command("other", &["--init", "run/final", "--set", "model.d_state=16"]), 2);
    assert!(err.contains("`d_state` is 8") && err.contains("has 16"), "{err}");
    let (_, err) = scene.expect(scene.command("other", &["--init", "nowhere"]), 1);
    assert!(err.contains("nowhere"), "{err}");
}

#[test]
fn another_configuration_is_not_resumed() {
    let scene = Scene::new();
    scene.expect(scene.command("run", &["--steps", "3"]), 0);
    for (set, key) in [
        ("optimizer.peak_lr=0.5", "optimizer.peak_lr"),
        ("training.batch=2", "training.batch"),
        ("model.d_state=16", "model.d_state"),
        ("data.phases=[{until=1.0,weights={one=1.0}}]", "data.phases"),
    ] {
        let (_, err) = scene.expect(scene.command("run", &["--steps", "6", "--set", set]), 2);
        assert!(err.contains("cannot resume") && err.contains(key), "{err}");
    }
    // Other shards of the same sources, and another vocabulary.
    std::fs::remove_dir_all(scene.path("data/one")).unwrap();
    write_shards(&scene.path("data/one"), VOCAB, 5);
    let (_, err) = scene.expect(scene.command("run", &["--steps", "6"]), 1);
    assert!(err.contains("`one`") || err.contains("source one") || err.contains("one"), "{err}");
    for source in ["one", "two"] {
        std::fs::remove_dir_all(scene.path("data").join(source)).unwrap();
        write_shards(&scene.path("data").join(source), 70, 5);
    }
    let (_, err) = scene.expect(scene.command("run", &["--steps", "6"]), 1);
    assert!(err.contains("70") && err.contains("model.vocab_size") && err.contains("64"), "{err}");
    assert_eq!(scene.checkpoints("run"), ["step-00000003"]);
}

/// What another run or person has put there is not written over.
#[test]
fn folders_of_others_are_refused() {
    let scene = Scene::new();
    scene.expect(scene.command("run", &["--steps", "3"]), 0);
    scene.expect(scene.command("other", &["--steps", "2"]), 0);
    let kept = std::fs::read(scene.path("other/final/model.safetensors")).unwrap();
    let (_, err) = scene.expect(scene.command("other", &["--resume", "run", "--steps", "6"]), 2);
    assert!(err.contains("other holds another run already") && err.contains("--out"), "{err}");
    scene.expect(scene.command("branch", &["--resume", "run", "--steps", "6"]), 0);
    assert_eq!(scene.losses("branch").len(), 3);
    // A branch that was stopped before its first checkpoint begins again; a model without its checkpoints stays.
    let checkpoints = scene.path("branch/checkpoints");
    std::fs::remove_dir_all(&checkpoints).unwrap();
    let (_, err) = scene.expect(scene.command("branch", &["--steps", "6"]), 2);
    assert!(err.contains("--out branch") && err.contains("`final`"), "{err}");
    for name in ["final", "final-swa"] {
        let _ = std::fs::remove_dir_all(scene.path("branch").join(name));
    }
    std::fs::create_dir(&checkpoints).unwrap();
    scene.expect(scene.command("branch", &["--resume", "run", "--steps", "6"]), 0);
    std::fs::create_dir(scene.path("mine")).unwrap();
    std::fs::write(scene.path("mine/config.toml"), "# mine\n[training]\nsteps = 2\n").unwrap();
    for resume in ["auto", "never"] {
        let args = ["--config", "mine/config.toml", "--out", "mine", "--resume", resume];
        let (_, err) = scene.expect(scene.bare(&args), 2);
        assert!(err.contains("--out mine") && err.contains("`config.toml`"), "{err}");
    }
    assert!(std::fs::read_to_string(scene.path("mine/config.toml")).unwrap().starts_with("# mine"));
    assert_eq!(std::fs::read(scene.path("other/final/model.safetensors")).unwrap(), kept);
}

/// A finished run is no answer to whoever asks for another one.
#[test]
fn a_finished_run_is_compared_first() {
    let scene = Scene::new();
    scene.expect(scene.command("run", &["--steps", "3"]), 0);
    for (args, key) in [(["--set", "model.d_state=16"], "model.d_state"), (["--seed", "99"], "training.seed")] {
        let (_, err) = scene.expect(scene.command("run", &[&["--steps", "3"], &args[..]].concat()), 2);
        assert!(err.contains("cannot resume") && err.contains(key), "{err}");
    }
    let (_, err) = scene.expect(scene.command("run", &["--steps", "3", "--init", "run/final"]), 0);
    assert!(err.contains("finished run") && err.contains("--init is not used"), "{err}");
    std::fs::remove_dir_all(scene.path("run/final")).unwrap();
    let (_, err) = scene.expect(scene.command("run", &["--steps", "2"]), 2);
    assert!(err.contains("training.steps is 2") && err.contains("step 3"), "{err}");
}

#[test]
fn wrong_usage_is_named_with_exit_code_2() {
    let scene = Scene::new();
    std::fs::write(scene.path("typo.toml"), "[training]\nstpes = 3\n").unwrap();
    std::fs::write(scene.path("broken.toml"), "[training\n").unwrap();
    for (args, parts) in [
        (&["--config", "typo.toml"][..], &["typo.toml", "training.stpes", "`steps`"][..]),
        (&["--config", "broken.toml"], &["broken.toml", "TOML"]),
        (&["--config", "absent.toml"], &["absent.toml"]),
        (&["--preset", "nona"], &["nona", "`nano`"]),
        (&["--set", "model.d_rope=7"], &["--set model.d_rope=7", "d_rope", "even"]),
        (&["--set", "training.batch=zero"], &["training.batch", "zero"]),
        (&["--set", "novalue"], &["key=value"]),
        (&["--steps", "0"], &["--steps"]),
        (&["--device", "tpu"], &["tpu", "cuda:N"]),
        (&["--device", "cuda:x"], &["cuda:x", "cuda:N"]),
        (&["--cuda-memory", "12GiB"], &["--dry-run"]),
        (&["--dry-run", "--cuda-memory", "12GiB"], &["--device cuda"]),
        (&["--threads", "2000"], &["--threads", "1024"]),
        (&["--set", "training.steps=-1"], &["--set training.steps=-1", "a whole number from 0 on"]),
        (&["--set", "optimizer.weight_decay=1e300"], &["optimizer.weight_decay", "1/peak_lr"]),
        (&["--dry-run", "--cuda-memory", "a lot"], &["12GiB"]),
        (&["--set", "cuda.product=bf16"], &["cuda.product", "`products`"]),
        (&["--set", "cuda.masters=f16"], &["cuda.masters", "float32"]),
        (&["--set", "training.checkpointing=some"], &["training.checkpointing", "auto"]),
        (&["--resume", "nowhere"], &["nowhere"]),
        (&["--preset", "mini"], &["--data", "cosmopedia", "elleci-data prepare"]),
        (&["--bogus"], &["--bogus"]),
    ] {
        let (_, err) = scene.expect(scene.bare(args), 2);
        for part in parts {
            assert!(err.contains(part), "{args:?}: `{part}` is not in: {err}");
        }
    }
}

/// On a machine without a card, which is what this can test: it is named with exit code 1 and what to do, nothing is written, and the plan
/// of a card can be had all the same.
#[test]
fn a_card_that_is_not_there_is_named() {
    if elleci_cuda::driver::probe(0).is_ok() {
        eprintln!("skipped: there is a card");
        return;
    }
    let scene = Scene::new();
    for device in ["cuda", "cuda:3"] {
        let (_, err) = scene.expect(scene.command("run", &["--device", device]), 1);
        assert!(err.contains("libcuda") || err.contains("libnvrtc") || err.contains("cuda:"), "{err}");
        assert!(!scene.path("run").exists(), "nothing was trained");
    }
    let (out, err) = scene.expect(scene.command("run", &["--device", "cuda", "--dry-run"]), 0);
    assert!(
        err.contains("no card") && out.contains("FLOPs in all") && out.contains("Not stepping: no card"),
        "{out}{err}"
    );
    let plan = ["--preset", "elleci-1.5b", "--device", "cuda", "--dry-run", "--cuda-memory"];
    let small = ["--set", "cuda.masters=bf16", "--set", "training.checkpointing=auto"];
    let (out, _) = scene.expect(scene.bare(&[&plan[..], &["11.5GiB"], &small].concat()), 0);
    for part in ["matrices bf16", "optimizer states", "in the host's memory", "total", "asks for the plan alone"] {
        assert!(out.contains(part), "`{part}` is not in: {out}");
    }
    assert!(out.contains("1,494,416,256 parameters"), "{out}");
    let (_, err) = scene.expect(scene.bare(&[&plan[..], &["11.5GiB"]].concat()), 1);
    assert!(err.contains("11.50 GiB are free") && err.contains("--set cuda.masters=bf16"), "{err}");
}

#[test]
fn faulty_data_is_named_with_exit_code_1() {
    let scene = Scene::new();
    let bare = ["--config", "run.toml", "--out", "run", "--data", "absent"];
    let (_, err) = scene.expect(scene.bare(&bare), 1);
    assert!(err.contains("absent/one") && err.contains("elleci-data prepare"), "{err}");
    std::fs::write(scene.path("tokenizer.json"), "{}").unwrap();
    let (_, err) = scene.expect(scene.command("run", &["--set", "data.tokenizer=tokenizer.json"]), 1);
    assert!(err.contains("tokenizer.json"), "{err}");
    let shard = std::fs::read_dir(scene.path("data/one")).unwrap().map(|e| e.unwrap().path());
    let shard = shard.filter(|p| p.extension().is_some_and(|e| e == "bin")).max_by_key(|p| p.metadata().unwrap().len());
    let mut bytes = std::fs::read(shard.as_ref().unwrap()).unwrap();
    bytes[40] ^= 1;
    std::fs::write(shard.as_ref().unwrap(), bytes).unwrap();
    let (_, err) = scene.expect(scene.command("run", &[]), 1);
    assert!(err.contains("data/one"), "{err}");
    assert!(data::shards::ShardSet::open(&scene.path("data/two")).is_ok());
}

#[test]
fn a_dry_run_plans_and_times_and_writes_nothing() {
    let scene = Scene::new();
    let (out, err) = scene.expect(scene.command("run", &["--dry-run", "--steps", "4"]), 0);
    for part in
        ["24 steps", "weights (float32)", "optimizer states", "activations", "checkpointed every layer", "4 steps"]
    {
        assert!(out.contains(part), "{part}: {out}");
    }
    assert!(err.contains("step 4/4"), "{err}");
    assert!(!scene.path("run").exists());
    let (out, err) = scene.expect(scene.bare(&["--preset", "nano", "--dry-run", "--steps", "1"]), 0);
    assert!(out.contains("5,937,672 parameters") && err.contains("random tokens"), "{out}{err}");
    // No machine holds this, terabytes: elleci-1.5b itself a machine of 24 GB holds or not, as it happens.
    let huge = ["--preset", "elleci-1.5b", "--dry-run", "--set", "model.n_layers=4000"];
    let (out, _) = scene.expect(scene.bare(&huge), 0);
    assert!(out.contains("parameters") && out.contains("Not stepping"), "{out}");
}

#[test]
fn one_step_for_another_framework() {
    let scene = Scene::new();
    scene.expect(scene.command("run", &["--steps", "1"]), 0);
    let integers = |name: &str, values: &[i64]| Tensor {
        name: name.into(),
        dtype: Dtype::I64,
        shape: vec![2, 3],
        bytes: Bytes::Ready(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into()),
    };
    let batch = |file: &str, tokens: &[i64], targets: &[i64]| {
        write(&scene.path(file), vec![integers("tokens", tokens), integers("targets", targets)]).unwrap();
    };
    batch("io.safetensors", &[1, 2, 3, 4, 5, 6], &[2, 3, -100, 5, 6, 7]);
    let step = |batch: &str, out: &str| scene.bare(&["step", "--init", "run/final", "--batch", batch, "--out", out]);
    let (out, _) = scene.expect(step("io.safetensors", "grads"), 0);
    let printed: serde_json::Value = serde_json::from_str(&out).unwrap();
    let file = TensorFile::open(&scene.path("grads/io.safetensors")).unwrap();
    let mut logits = vec![0.0; 6 * VOCAB];
    file.read_floats("logits", &[2, 3, VOCAB], &mut logits).unwrap();
    let loss = f64::from_le_bytes(file.bytes("loss").unwrap().try_into().unwrap());
    assert_eq!(printed["loss"].as_f64().unwrap(), loss);
    let mean = [(0, 2), (1, 3), (3, 5), (4, 6), (5, 7)].map(|(at, target): (usize, usize)| {
        let row: Vec<f64> = logits[at * VOCAB..][..VOCAB].iter().map(|&l| l.into()).collect();
        row.iter().map(|l| l.exp()).sum::<f64>().ln() - row[target]
    });
    // Logits of about 1 in float32: the softmax of one row is off by some 64 * 2^-24.
    assert!((loss - mean.iter().sum::<f64>() / 5.0).abs() < 1e-5, "{loss} {mean:?}");
    let grads = TensorFile::open(&scene.path("grads/grads.safetensors")).unwrap();
    let model = TensorFile::open(&scene.path("run/final/model.safetensors")).unwrap();
    assert_eq!(grads.entries().keys().collect::<Vec<_>>(), model.entries().keys().collect::<Vec<_>>());
    let mut emb = vec![0.0; VOCAB * 32];
    grads.read_floats("tok_emb.weight", &[VOCAB, 32], &mut emb).unwrap();
    let row = |t: usize| emb[t * 32..(t + 1) * 32].iter().any(|g| *g != 0.0);
    // Token 3 is the last of its sequence, and nothing is to be predicted there.
    assert!(row(1) && row(2) && !row(3) && row(6) && !row(7));

    for (name, tokens, targets, parts) in [
        ("a", [1, 2, 3, 4, 5, 64], [1; 6], &["tokens", "64", "vocab_size"][..]),
        ("b", [1; 6], [1, 1, 1, 1, 1, -1], &["targets", "-1"]),
        ("c", [1; 6], [-100; 6], &["-100", "no loss"]),
    ] {
        batch(name, &tokens, &targets);
        let (_, err) = scene.expect(step(name, "x"), 1);
        for part in parts {
            assert!(err.contains(part), "{part}: {err}");
        }
    }
    let (_, err) = scene.expect(step("absent.safetensors", "x"), 1);
    assert!(err.contains("absent.safetensors"), "{err}");
    write(&scene.path("d"), vec![integers("tokens", &[1; 6])]).unwrap();
    let (_, err) = scene.expect(step("d", "x"), 1);
    assert!(err.contains("`targets`"), "{err}");
}
