//! `elleci-train` as a whole under faults: killed, interrupted, out of disk, with damaged files.

use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::scene::Scene;

/// Splitmix64: moments that are arbitrary, and the same in every run of the test.
fn arbitrary(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[test]
fn killed_at_any_moment_a_run_ends_with_the_same_losses() {
    let scene = Scene::new();
    let started = Instant::now();
    scene.expect(scene.command("whole", &[]), 0);
    let whole = started.elapsed();
    // What a run takes changes with the machine's speed: where it was over too soon, another begins, to be killed sooner.
    let (mut time, mut state) = (whole, 11);
    loop {
        let kills = kill_until_over(&scene, time, &mut state);
        if kills >= 2 {
            break;
        }
        assert!(time > whole / 32, "killed {kills} times only");
        std::fs::remove_dir_all(scene.path("killed")).unwrap();
        time /= 2;
    }
    scene.expect(scene.command("killed", &[]), 0);
    assert_eq!(scene.losses("killed"), scene.losses("whole"));
    let model = |run: &str| std::fs::read(scene.path(run).join("final/model.safetensors")).unwrap();
    assert!(model("killed") == model("whole"), "the final weights differ");
    assert_eq!(scene.checkpoints("killed"), scene.checkpoints("whole"));
}

/// Starts the run again and again, and kills it after some part of `time`, until one is over before; how often it was killed.
fn kill_until_over(scene: &Scene, time: Duration, state: &mut u64) -> usize {
    let mut kills = 0;
    let mut patience = time / 4;
    loop {
        let mut child = scene.spawn(scene.command("killed", &[]));
        std::thread::sleep(patience + Duration::from_micros(arbitrary(state) % time.as_micros() as u64) / 3);
        let over = child.try_wait().unwrap().is_some();
        child.kill().unwrap();
        child.wait().unwrap();
        if over {
            return kills;
        }
        kills += 1;
        // A process that is always killed before its first checkpoint would never end.
        patience += time / 20;
    }
}

/// Ctrl-C, `kill` and a closed terminal: the step that runs is finished and saved.
#[test]
fn signals_save_and_exit_130() {
    let scene = Scene::new();
    scene.expect(scene.command("whole", &["--steps", "400"]), 0);
    for signal in ["INT", "TERM", "HUP"] {
        let child = scene.spawn(scene.command(signal, &["--steps", "400"]));
        while scene.checkpoints(signal).is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status().unwrap();
        let output = child.wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(130), "{signal}: {text}");
        assert!(text.contains("stopped and saved after step"), "{signal}: {text}");
        let last = scene.losses(signal).last().unwrap().0;
        assert!(last < 400);
        assert_eq!(scene.checkpoints(signal).last().unwrap(), &format!("step-{last:08}"));
        let (_, text) = scene.expect(scene.command(signal, &["--steps", "400"]), 0);
        assert!(text.contains("resuming from"), "{signal}: {text}");
        assert_eq!(scene.losses(signal), scene.losses("whole"), "{signal}");
    }
}

/// A file system of `kilobytes` of its own under `run`, for as long as the script runs: in a user namespace, which most
/// systems allow. `None`, said on standard error, where this one does not.
fn on_a_small_disk(scene: &Scene, kilobytes: u64, script: &str) -> Option<(i32, String)> {
    std::fs::create_dir_all(scene.path("run")).unwrap();
    let mount = format!("mount -t tmpfs -o size={kilobytes}k none run");
    let within = |script: &str| {
        let mut command = Command::new("unshare");
        command.args(["--map-root-user", "--mount", "bash", "-c", script]).current_dir(scene.path("")).output()
    };
    let refused = match within(&mount) {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(String::from_utf8_lossy(&output.stderr).into_owned()),
        Err(error) => Some(error.to_string()),
    };
    if let Some(reason) = refused {
        // Not `eprintln`, which the harness keeps to itself when a test passes.
        let _ = writeln!(std::io::stderr(), "SKIPPED, no full disk was tested: `unshare`, `{mount}`: {reason}");
        return None;
    }
    let output = within(&format!("{mount} && {script}")).unwrap();
    Some((output.status.code().unwrap_or(-1), String::from_utf8_lossy(&output.stderr).into_owned()))
}

/// Kilobytes of all files in a directory, each in whole pages as a tmpfs counts them.
fn kilobytes(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap());
    let size = |e: std::fs::DirEntry| match e.file_type().unwrap().is_dir() {
        true => kilobytes(&e.path()),
        false => e.metadata().unwrap().len().div_ceil(4096) * 4,
    };
    entries.map(size).sum()
}

#[test]
fn a_full_disk_leaves_the_checkpoint_before_it() {
    let scene = Scene::new();
    scene.expect(scene.command("whole", &[]), 0);
    scene.expect(scene.command("three", &["--steps", "3", "--set", "swa.start=1.0"]), 0);
    let size = |path: &str| kilobytes(&scene.path("three").join(path));
    let checkpoint = size("checkpoints");
    let logs = size("") - checkpoint - size("final");
    let train = format!("{} --config run.toml --data data --out run", env!("CARGO_BIN_EXE_elleci-train"));
    // Room for one checkpoint and more or less of the next, down to hardly any: some part of it is the one that fails.
    for share in [90, 50, 10] {
        let after = format!("after{share}");
        let script = format!("{train}; code=$?; cp -a run {after}; exit $code");
        let Some((code, text)) = on_a_small_disk(&scene, logs + checkpoint + checkpoint * share / 100, &script) else {
            return;
        };
        assert_eq!(code, 1, "{text}");
        for part in ["step 6 not saved to run/checkpoints", "earlier ones are untouched", "No space left", "free space"]
        {
            assert!(text.contains(part), "{share} %: {part}: {text}");
        }
        assert_eq!(scene.checkpoints(&after), ["step-00000003"]);
        // With room again, the same command goes on, and nothing shows that anything happened.
        let (_, text) = scene.expect(scene.command(&after, &[]), 0);
        assert!(text.contains(&format!("resuming from {after}/checkpoints/step-00000003")), "{text}");
        assert_eq!(scene.losses(&after), scene.losses("whole"));
        let model = |run: &str| std::fs::read(scene.path(run).join("final/model.safetensors")).unwrap();
        assert!(model(&after) == model("whole"), "the final weights differ");
    }
}

/// The limit on the size of files fails a write in the middle of a tensor, as a full disk does, on systems too where the
/// test above cannot have a disk of its own.
#[test]
fn a_failed_write_leaves_the_checkpoint_before_it() {
    let scene = Scene::new();
    scene.expect(scene.command("run", &["--steps", "3"]), 0);
    let before = scene.checkpoints("run");
    assert_eq!(before, ["step-00000003"]);
    let size = std::fs::metadata(scene.path("run").join("checkpoints/step-00000003/model.safetensors")).unwrap().len();
    let binary = env!("CARGO_BIN_EXE_elleci-train");
    // `ulimit -f` counts kilobytes in bash. Without the trap the signal of the limit would end the process itself.
    let script = format!(
        "trap '' XFSZ; ulimit -f {}; exec {binary} --config run.toml --data data --out run --steps 6",
        size / 2048
    );
    let mut limited = Command::new("bash");
    limited.args(["-c", &script]).current_dir(scene.path(""));
    let (_, text) = scene.expect(limited, 1);
    assert!(text.contains("not saved") && text.contains("earlier ones are untouched"), "{text}");
    assert_eq!(scene.checkpoints("run"), before);
    // With room again, the run goes on as if nothing had happened.
    scene.expect(scene.command("run", &["--steps", "6"]), 0);
    scene.expect(scene.command("branch", &["--resume", "run/checkpoints/step-00000003", "--steps", "6"]), 0);
    assert_eq!(scene.losses("run")[3..], scene.losses("branch"));
}

#[test]
fn a_damaged_checkpoint_is_reported_and_the_one_before_is_used() {
    let scene = Scene::new();
    scene.expect(scene.command("whole", &[]), 0);
    scene.expect(scene.command("run", &[]), 0);
    std::fs::remove_dir_all(scene.path("run").join("final")).unwrap();
    for (step, file) in [(24, "model.safetensors"), (21, "state.json")] {
        let path = scene.path("run").join(format!("checkpoints/step-{step:08}/{file}"));
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        std::fs::write(&path, bytes).unwrap();
    }
    let (_, text) = scene.expect(scene.command("run", &[]), 0);
    for part in ["step-00000024 is damaged", "step-00000021 is damaged", "resuming from run/checkpoints/step-00000018"]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert_eq!(scene.losses("run"), scene.losses("whole"));
    // With all of them damaged nothing is trained over.
    for name in scene.checkpoints("run") {
        std::fs::write(scene.path("run").join("checkpoints").join(name).join("state.json"), "{}").unwrap();
    }
    let (_, text) = scene.expect(scene.command("run", &[]), 1);
    assert!(text.contains("none of the 3 checkpoints"), "{text}");
}

#[test]
fn two_processes_do_not_share_a_run() {
    let scene = Scene::new();
    let mut first = scene.spawn(scene.command("run", &["--steps", "100000"]));
    while scene.checkpoints("run").is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    let (_, text) = scene.expect(scene.command("run", &["--steps", "100000"]), 1);
    assert!(text.contains("another process"), "{text}");
    first.kill().unwrap();
    first.wait().unwrap();
}
