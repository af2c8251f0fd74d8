//! Where models go, and what else is there.

use std::fs;
use std::process::{Command, Stdio};

use elleci_core::init::initialise;
use elleci_tools::hf;
use elleci_tools::train::backend::param_tensors;

use crate::scene::{Scene, stderr, tiny};

/// Conversions of two models to one place, at once: all succeed, and one of the two is there, whole. Where names cannot be exchanged in one
/// step, one of several conversions to a folder may fail instead.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[test]
fn two_at_once() {
    let scene = Scene::new();
    for (name, seed) in [("one", 3), ("two", 4)] {
        hf::write(&scene.path(name), &tiny(), param_tensors(&initialise(&tiny(), seed)), None).unwrap();
        scene.ok(&[name, &format!("{name}.elleci"), "--pack", "t5"]);
    }
    let read = |name: &str| fs::read(scene.path(name)).unwrap();
    let before = scene.names();
    for _ in 0..5 {
        for (to, file) in [("m", "m/model.safetensors"), ("m.elleci", "m.elleci")] {
            let start = |from: &str| {
                let mut command = Command::new(env!("CARGO_BIN_EXE_elleci-convert"));
                command.current_dir(scene.dir.path()).args([from, to, "--force", "--threads", "1"]);
                if to == "m.elleci" {
                    command.args(["--pack", "t5"]);
                }
                command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
            };
            let running: Vec<_> = ["one", "two", "one", "two"].map(start).into_iter().collect();
            for child in running {
                let output = child.wait_with_output().unwrap();
                assert!(output.status.success(), "{to}: {}", stderr(&output));
            }
            let end = file.strip_prefix('m').unwrap();
            assert!([format!("one{end}"), format!("two{end}")].iter().any(|whole| read(whole) == read(file)), "{to}");
        }
        fs::remove_dir_all(scene.path("m")).unwrap();
        fs::remove_file(scene.path("m.elleci")).unwrap();
        assert_eq!(scene.names(), before);
    }
}

#[test]
fn what_is_the_users_stays() {
    let scene = Scene::new();
    fs::create_dir(scene.path(".m.tmp")).unwrap();
    fs::write(scene.path(".m.tmp/thesis.txt"), "years of work").unwrap();
    fs::write(scene.path(".m.elleci.tmp"), "years of work").unwrap();
    scene.ok(&["run", "m"]);
    scene.ok(&["run", "m", "--force"]);
    scene.ok(&["run", "m.elleci"]);
    assert!(scene.path(".m.tmp/thesis.txt").is_file() && scene.path(".m.elleci.tmp").is_file());

    // A source inside of what would be replaced.
    scene.fails(&["m/model.safetensors", "m", "--force"], 2, &["the source lies in it"]);
    assert!(scene.path("m/model.safetensors").is_file());
    // A folder with nothing but a tokenizer: it is kept, or nothing is done.
    hf::write(&scene.path("bare"), &tiny(), param_tensors(&scene.params), None).unwrap();
    scene.tokenizer.save(&scene.path("t/tokenizer.json")).unwrap();
    let config = fs::read(scene.path("t/tokenizer.config.json")).unwrap();
    scene.fails(&["bare", "t", "--force"], 2, &["t/tokenizer.json would be lost", "--tokenizer t/tokenizer.json"]);
    assert!(scene.path("t/tokenizer.json").is_file());
    scene.ok(&["bare", "t", "--force", "--tokenizer", "t/tokenizer.json"]);
    assert_eq!(fs::read(scene.path("t/tokenizer.json")).unwrap(), scene.tokenizer.json());
    assert_eq!(fs::read(scene.path("t/tokenizer.config.json")).unwrap(), config);
    assert!(scene.path("t/model.safetensors").is_file());
}

/// What a process left that was killed between two renames of --force.
#[test]
fn a_folder_that_was_moved_aside_comes_back() {
    let scene = Scene::new();
    scene.ok(&["run", "m"]);
    let before = scene.names();
    fs::rename(scene.path("m"), scene.path(".m.123-0123456789abcdef.old")).unwrap();
    let output = scene.run(&["run", "m"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("it is back from .m.123-0123456789abcdef.old"), "{}", stderr(&output));
    assert_eq!(scene.names(), before);
    scene.ok(&["run", "m", "--force"]);
    assert_eq!(scene.names(), before);
}

#[test]
fn names_in_capitals_and_new_directories() {
    let scene = Scene::new();
    scene.ok(&["run", "deep/er/X.ELLECI"]);
    assert!(scene.path("deep/er/X.ELLECI").is_file());
    scene.ok(&["inspect", "deep/er/X.ELLECI"]);
    scene.fails(&["run", "x.PTH"], 2, &["files are not written"]);
    let mut params = scene.params.clone();
    params.data_mut()[5] = f32::NAN;
    hf::write(&scene.path("nan"), &tiny(), param_tensors(&params), None).unwrap();
    for to in ["new/deep/m", "new/deep/m.elleci"] {
        scene.fails(&["nan", to], 1, &["not finite"]);
    }
}

#[cfg(unix)]
#[test]
fn links_stay_and_devices_are_no_models() {
    let scene = Scene::new();
    scene.ok(&["run", "m.elleci", "--dense", "f16"]);
    // Of two conversions the same bytes: `auto` chooses by measured speed.
    let with = ["--pack", "i2", "--dense", "f32"];
    std::os::unix::fs::symlink("m.elleci", scene.path("link.elleci")).unwrap();
    scene.ok(&[&["run", "link.elleci", "--force"][..], &with].concat());
    assert!(scene.path("link.elleci").symlink_metadata().unwrap().is_symlink());
    assert_eq!(
        scene.json(&[&["run", "again.elleci", "--json"][..], &with].concat())["bytes"],
        fs::metadata(scene.path("m.elleci")).unwrap().len()
    );
    scene.fails(&["/dev/zero", "x.elleci"], 2, &["a device or a pipe"]);
    scene.fails(&["inspect", "/dev/zero"], 2, &["a device or a pipe"]);
}
