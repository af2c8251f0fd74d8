//! `elleci-convert` as a user meets it: forms, exit codes, messages, and what is left behind.

mod places;
mod scene;
mod told;

use std::fs;
use std::process::Command;

use elleci_core::config::ModelConfig;
use elleci_core::init::initialise;
use elleci_core::params::{Id, ParamKind};
use elleci_core::ternary::TernaryMatrix;
use elleci_tools::hf;
use elleci_tools::train::backend::param_tensors;
use serde_json::Value;

use crate::scene::{Scene, fixture, stderr, tiny};

#[test]
fn a_checkpoint_becomes_a_folder() {
    let scene = Scene::new();
    scene.ok(&["run/checkpoints/step-00000007", "model"]);
    let (config, params) = hf::read(&scene.path("model")).unwrap();
    assert_eq!(config, tiny());
    assert_eq!(params.data(), scene.params.data());
    assert_eq!(fs::read(scene.path("model/tokenizer.json")).unwrap(), scene.tokenizer.json());
    // The run stands for its newest checkpoint.
    let report = scene.json(&["run", "mean", "--weights", "swa", "--json"]);
    assert_eq!(hf::read(&scene.path("mean")).unwrap().1.data(), scene.average.data());
    assert_eq!(report["weights"], "swa");
    assert_eq!(report["parameters"], scene.params.data().len());
}

#[test]
fn an_archive_holds_what_the_quantiser_gives() {
    let scene = Scene::new();
    let report = scene.json(&["run", "a.elleci", "--pack", "t5", "--dense", "f32", "--json"]);
    assert_eq!((&report["dense"], report["packing"]["t5"].as_u64()), (&"f32".into(), Some(22)));
    assert_eq!(report["bytes"], fs::metadata(scene.path("a.elleci")).unwrap().len());
    let archive = scene.archive("a.elleci");
    let model = archive.model();
    assert_eq!(model.config(), &tiny());
    assert_eq!(model.tokenizer(), Some(scene.tokenizer.json()));
    for (i, p) in scene.params.layout().params().iter().enumerate() {
        let (want, mut got) = (&scene.params[Id(i)], vec![0.0; p.len()]);
        model.read(Id(i), &mut got).unwrap();
        if p.kind == ParamKind::Ternary {
            let matrix = TernaryMatrix::from_weights(want, p.shape[0], p.shape[1]);
            let code = |j: usize| f32::from(matrix.code(j / p.shape[1], j % p.shape[1]));
            assert!(got.iter().enumerate().all(|(j, v)| *v == matrix.gamma() * code(j)), "{}", p.name);
        } else {
            assert_eq!(got, want, "{}", p.name);
        }
    }

    // Packed again, an archive keeps codes and scales to the bit: there and back is the same file.
    scene.ok(&["a.elleci", "b.elleci", "--pack", "i2", "--dense", "f32"]);
    scene.ok(&["b.elleci", "c.elleci", "--pack", "t5", "--dense", "f32"]);
    let bytes = |name: &str| fs::read(scene.path(name)).unwrap();
    assert!(bytes("a.elleci") != bytes("b.elleci"));
    assert!(bytes("a.elleci") == bytes("c.elleci"));

    // As a folder it is γ·W₃, and that is said.
    let text = scene.ok(&["a.elleci", "model"]);
    assert!(text.contains("γ·W₃"), "{text}");
    let (config, floats) = hf::read(&scene.path("model")).unwrap();
    assert_eq!(config, tiny());
    for i in 0..floats.layout().params().len() {
        let mut packed = vec![0.0; floats[Id(i)].len()];
        model.read(Id(i), &mut packed).unwrap();
        assert_eq!(floats[Id(i)], packed);
    }
}

/// The source's form makes no difference.
#[test]
fn every_form_gives_the_same_archive() {
    let scene = Scene::new();
    scene.ok(&["run", "folder"]);
    fs::create_dir(scene.path("alone")).unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        fs::copy(scene.path("folder").join(name), scene.path("alone").join(name)).unwrap();
    }
    let flags = ["--pack", "i2", "--dense", "f16"];
    for (from, to) in [("run", "1"), ("folder", "2"), ("alone/model.safetensors", "3")] {
        scene.ok(&[&[from, &format!("{to}.elleci")], &flags[..]].concat());
    }
    let bytes = |name: &str| fs::read(scene.path(name)).unwrap();
    assert!(bytes("1.elleci") == bytes("2.elleci") && bytes("1.elleci") == bytes("3.elleci"));
    // --pack auto measures; whatever it chooses is one of the two.
    let auto = scene.json(&["run", "auto.elleci", "--json"]);
    assert_eq!(auto["packing"].as_object().unwrap().values().map(|n| n.as_u64().unwrap()).sum::<u64>(), 22);
}

#[test]
fn pytorch_files() {
    let scene = Scene::new();
    let weights: Value = serde_json::from_str(&fs::read_to_string(fixture("model.json")).unwrap()).unwrap();
    // Their sizes stand in config.json beside them.
    for (name, flags, add) in [
        ("model.pth", &[][..], 0.0),
        ("model_reference.pth", &[], 0.0),
        ("model_average.pth", &[], 0.0),
        ("training.pth", &[], 0.0),
        ("training.pth", &["--weights", "swa"], 1.0),
    ] {
        scene.ok(&[&[&fixture(name), "out", "--force"], flags].concat());
        let (_, params) = hf::read(&scene.path("out")).unwrap();
        for (i, p) in params.layout().params().iter().enumerate() {
            let want: Vec<f32> = weights[&p.name]["values"]
                .as_array()
                .unwrap()
                .iter()
                .map(|v| v.as_f64().unwrap() as f32 + add)
                .collect();
            assert_eq!(params[Id(i)], want, "{name} {}", p.name);
        }
    }
    scene.fails(&[&fixture("model.pth"), "new", "--weights", "swa"], 2, &["no running mean"]);
    scene.fails(
        &[&fixture("model.pth"), "new", "--config", "nano"],
        1,
        &["of another shape", "final_norm.weight is [6], must be [256]"],
    );
    scene.fails(&[&fixture("model.pth"), "new", "--config", "huge"], 2, &["neither a file nor a preset", "nano"]);
    scene.fails(&[&fixture("views.pth"), "new"], 1, &["tok_emb.weight", "transposed [6, 4]"]);
    scene.fails(&[&fixture("refused_module.pth"), "new"], 1, &["state_dict()"]);
    scene.fails(&[&fixture("refused_tar.pth"), "new"], 1, &["tar archive"]);
    fs::copy(fixture("model.pth"), scene.path("moved.pth")).unwrap();
    scene.fails(&["moved.pth", "new"], 1, &["does not say the sizes", "--config"]);
    scene.ok(&["moved.pth", "new", "--config", &fixture("config.json")]);
}

#[test]
fn wrong_usage() {
    let scene = Scene::new();
    for (args, parts) in [
        (&["run"][..], &["destination"][..]),
        (&["nowhere", "a.elleci"], &["nowhere", "no such file"]),
        (&["run/final", "a.elleci"], &["run/final", "neither"]),
        (&["run", "a.pth"], &[".pth files are not written"]),
        (&["run", "a.safetensors"], &["not written"]),
        (&["run", "folder", "--pack", "i2"], &["--pack", "folder"]),
        (&["run", "folder", "--dense", "int8"], &["--dense"]),
        (&["run", "a.elleci", "--dense", "int4"], &["f32, f16, bf16, int8"]),
        (&["run", "a.elleci", "--pack", "i3"], &["--pack"]),
        (&["run", "a.elleci", "--config", "mini"], &["--config", "others"]),
        (&[&fixture("model.pth"), "a.elleci", "--weights", "swa"], &["no running mean"]),
        (&["run", "a.elleci", "--tokenizer", "none.json"], &["--tokenizer", "none.json"]),
        (&["run", "a.elleci", "--text", "none.txt"], &["--text", "none.txt"]),
        (&["run", "text.txt"], &["text.txt", "--force"]),
        (&["run", "run", "--force"], &["same"]),
        (&["run", ".."], &["not a name"]),
        (&["inspect"], &["FILE"]),
        (&["inspect", "nowhere"], &["no such file"]),
    ] {
        scene.fails(args, 2, parts);
    }
    // --force replaces models, and nothing else.
    scene.ok(&["run", "model"]);
    scene.fails(&["model", "a.elleci", "--weights", "swa"], 2, &["one set of weights"]);
    scene.ok(&["run", "model", "--force"]);
    fs::write(scene.path("model/thesis.txt"), "years of work").unwrap();
    scene.fails(&["run", "model", "--force"], 2, &["thesis.txt", "left alone"]);
    assert!(scene.path("model/thesis.txt").is_file() && scene.path("model/model.safetensors").is_file());
    scene.fails(&["run", "text.txt", "--force"], 2, &["no folder"]);
    fs::create_dir(scene.path("d.elleci")).unwrap();
    scene.fails(&["run", "d.elleci", "--force"], 2, &["no file"]);
}

#[test]
fn damage_is_refused_and_nothing_is_left() {
    let scene = Scene::new();
    scene.ok(&["run", "model"]);
    scene.ok(&["run", "a.elleci", "--pack", "t5"]);
    // A flipped byte of a checkpoint, of an archive; a cut; weights that are no numbers; a tokenizer of another model.
    let flip = |name: &str, at: usize| {
        let mut bytes = fs::read(scene.path(name)).unwrap();
        let at = at.min(bytes.len() - 1);
        bytes[at] ^= 0x40;
        fs::write(scene.path(name), bytes).unwrap();
    };
    flip("a.elleci", 50_000);
    scene.fails(&["a.elleci", "new"], 1, &["a.elleci", "damaged"]);
    scene.fails(&["inspect", "a.elleci"], 1, &["damaged"]);
    let sound: Value = serde_json::from_slice(&scene.run(&["inspect", "a.elleci", "--json"]).stdout).unwrap();
    assert_eq!(sound["sound"], false);
    let checkpoint = "run/checkpoints/step-00000007/model.safetensors";
    let whole = fs::read(scene.path(checkpoint)).unwrap();
    flip(checkpoint, whole.len() / 2);
    scene.fails(&["run/checkpoints/step-00000007", "new"], 1, &["damaged", "BLAKE3"]);
    scene.fails(&["run", "new.elleci"], 1, &["none of the 1 checkpoints", "copy the run again"]);
    fs::write(scene.path("model/model.safetensors"), &whole[..whole.len() - 1]).unwrap();
    scene.fails(&["model", "new"], 1, &["model.safetensors", "damaged"]);

    let mut params = scene.params.clone();
    params.data_mut()[5] = f32::NAN;
    hf::write(&scene.path("nan"), &tiny(), param_tensors(&params), None).unwrap();
    for to in ["new", "new.elleci"] {
        scene.fails(&["nan", to], 1, &["tok_emb.weight", "1 values that are not finite"]);
    }
    scene.fails(&["inspect", "nan"], 1, &["not finite"]);

    hf::write(&scene.path("small"), &ModelConfig { vocab_size: 100, ..tiny() }, Vec::new(), None).unwrap();
    let config = ModelConfig { vocab_size: 100, ..tiny() };
    fs::remove_dir_all(scene.path("small")).unwrap();
    hf::write(&scene.path("small"), &config, param_tensors(&initialise(&config, 1)), None).unwrap();
    let tokenizer = "run/final/tokenizer.json";
    scene.fails(&["small", "new", "--tokenizer", tokenizer], 1, &["280 tokens", "`vocab_size` is 100"]);
    scene.fails(&["small", "new", "--tokenizer", "text.txt"], 1, &["tokenizer is unusable"]);
    scene.fails(&["small", "new.elleci", "--text", "text.txt"], 2, &["--tokenizer"]);
    fs::write(scene.path("small/config.json"), "{}").unwrap();
    scene.fails(&["small", "new"], 1, &["config.json", "model_type"]);
}

#[test]
fn inspect_tells_what_is_there() {
    let scene = Scene::new();
    scene.ok(&["run", "folder"]);
    scene.ok(&["run", "a.elleci", "--pack", "t5", "--dense", "int8"]);
    for (path, form) in [
        ("run", "training checkpoint"),
        ("folder", "Hugging Face folder"),
        ("folder/model.safetensors", "safetensors file"),
        ("a.elleci", "deployment archive"),
        (&fixture("model.pth"), "PyTorch file"),
    ] {
        let report = scene.json(&["inspect", path, "--json"]);
        assert_eq!((report["form"].as_str(), report["sound"].as_bool()), (Some(form), Some(true)), "{path}");
        let tensors = report["tensors"].as_array().unwrap();
        let gamma = |t: &&Value| t.get("gamma").is_some();
        let expected = if form == "PyTorch file" { (30, 12) } else { (60, 22) };
        assert_eq!((tensors.len(), tensors.iter().filter(gamma).count()), expected, "{path}");
        let table = scene.ok(&["inspect", path]);
        assert!(table.contains("tok_emb.weight") && table.trim_end().ends_with("sound"), "{table}");
    }
    // Scale and share of zeros are the same before and after packing.
    let of = |path: &str| {
        let report = scene.json(&["inspect", path, "--json"]);
        let find = |t: &&Value| t["name"] == "layers.3.mla.q.weight";
        let row = report["tensors"].as_array().unwrap().iter().find(find).unwrap().clone();
        (row["gamma"].as_f64(), row["zero"].as_f64())
    };
    assert_eq!(of("folder"), of("a.elleci"));
    // What is of no model is listed, and is not sound.
    let output = scene.run(&["inspect", &fixture("views.pth"), "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["tensors"].as_array().unwrap().len(), 9);
    let output = scene.run(&["inspect", &fixture("views.pth"), "--config", &fixture("config.json")]);
    assert!(String::from_utf8_lossy(&output.stdout).contains("not of this model"));
    assert!(stderr(&output).contains("30 missing"), "{}", stderr(&output));
}

#[cfg(target_os = "linux")]
#[test]
fn a_reader_that_goes_away_ends_nothing_and_a_full_disk_is_named() {
    let scene = Scene::new();
    let inspect = |stdout: std::process::Stdio| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_elleci-convert"));
        command.current_dir(scene.dir.path()).args(["inspect", "run"]).stdout(stdout).output().unwrap()
    };
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = inspect(writer.into());
    assert_eq!((output.status.code(), stderr(&output)), (Some(0), String::new()));
    let output = inspect(fs::File::options().write(true).open("/dev/full").unwrap().into());
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("standard output: ") && stderr(&output).contains("free space"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn bits_per_byte() {
    let scene = Scene::new();
    let report = scene.json(&["run", "a.elleci", "--pack", "i2", "--text", "text.txt", "--json"]);
    let scores = &report["bits_per_byte"]["by_dense"];
    let of = |format: &str| scores[format].as_f64().unwrap();
    // An untrained model of 300 tokens spends about log2(300) = 8.23 bits a token; init 0.02 moves that by hundredths.
    let per_token =
        report["bits_per_byte"]["bytes"].as_f64().unwrap() / report["bits_per_byte"]["tokens"].as_f64().unwrap();
    assert!((of("f32") * per_token - 8.23).abs() < 0.2, "{report}");
    for format in ["f16", "bf16", "int8"] {
        // Rounding to 8 bits moves logits by up to 2^-8 of their size, which is below 1: 0.004 nats, here of 8.
        assert!(of(format) != of("f32") && (of(format) / of("f32") - 1.0).abs() < 0.005, "{format}: {report}");
    }
    // The archive itself scores as its choice promised: same weights, same arithmetic, same bits.
    let compared = scene.json(&["compare", "run", "a.elleci", "--text", "text.txt", "--json"]);
    assert_eq!(compared["models"][0]["bits_per_byte"], scores["f32"]);
    assert_eq!(compared["models"][1]["bits_per_byte"], scores["int8"]);
    assert!(scene.ok(&["compare", "run", "run", "--text", "text.txt"]).contains("+0.0000 %"));
}

#[cfg(unix)]
#[test]
fn an_interrupt_or_a_full_disk_leaves_nothing() {
    use std::time::{Duration, Instant};
    let scene = Scene::new();
    // Large enough that a signal finds it at work: 60 million values, of which the file system stores few.
    let config = ModelConfig { vocab_size: 1 << 20, tie_embeddings: false, ..tiny() };
    let folder = scene.path("large");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("config.json"), hf::config_json(&config).unwrap()).unwrap();
    let layout = elleci_core::params::ParamLayout::new(&config);
    let entries: Vec<String> = layout
        .params()
        .iter()
        .map(|p| {
            let (start, end) = (p.range.start * 4, p.range.end * 4);
            format!("\"{}\":{{\"dtype\":\"F32\",\"shape\":{:?},\"data_offsets\":[{start},{end}]}}", p.name, p.shape)
        })
        .collect();
    let header = format!("{{{}}}", entries.join(","));
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    let length = (bytes.len() + layout.len() * 4) as u64;
    fs::write(folder.join("model.safetensors"), bytes).unwrap();
    let file = fs::File::options().write(true).open(folder.join("model.safetensors")).unwrap();
    file.set_len(length).unwrap();

    let before = scene.names();
    for to in ["new", "new.elleci"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_elleci-convert"));
        let piped = std::process::Stdio::piped();
        let child = command.current_dir(scene.dir.path()).args(["large", to]).stderr(piped).spawn().unwrap();
        let began = Instant::now();
        let hidden = format!(".{to}.");
        while !scene.names().iter().any(|name| name.starts_with(&hidden) && name.ends_with(".tmp")) {
            assert!(began.elapsed() < Duration::from_secs(60), "nothing is being written");
            std::thread::sleep(Duration::from_millis(1));
        }
        Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(130), "{to}: {}", stderr(&output));
        assert_eq!(scene.names(), before, "{to}");
    }
    // A limit on the size of files stands for a full disk: both end a write with an error.
    for (to, trap) in [("new", ""), ("new.elleci", ""), ("new", "trap '' XFSZ; ")] {
        let program = env!("CARGO_BIN_EXE_elleci-convert");
        let script = format!("{trap}ulimit -f 20; exec '{program}' run {to} --dense f32");
        let script = if to == "new" { script.replace(" --dense f32", "") } else { script };
        let output = Command::new("sh").current_dir(scene.dir.path()).args(["-c", &script]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{to}: {}", stderr(&output));
        assert!(stderr(&output).contains("writing"), "{to}: {}", stderr(&output));
        assert_eq!(scene.names(), before, "{to}");
    }
}
