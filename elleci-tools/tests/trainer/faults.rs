//! `elleci-train` as a whole under faults: killed, interrupted, out of disk, with damaged files.

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
    let (mut kills, mut state) = (0, 11);
    // Between the start of the process and its end, whatever the speed of this machine is at the moment.
    let mut patience = whole / 4;
    loop {
        let mut child = scene.spawn(scene.command("killed", &[]));
        std::thread::sleep(patience + Duration::from_micros(arbitrary(&mut state) % whole.as_micros() as u64) / 3);
        let over = child.try_wait().unwrap().is_some();
        child.kill().unwrap();
        child.wait().unwrap();
        if over {
            break;
        }
        kills += 1;
        // A process that is always killed before its first checkpoint would never end.
        patience += whole / 20;
    }
    assert!(kills >= 2, "killed {kills} times only");
    scene.expect(scene.command("killed", &[]), 0);
    assert_eq!(scene.losses("killed"), scene.losses("whole"));
    let model = |run: &str| std::fs::read(scene.path(run).join("final/model.safetensors")).unwrap();
    assert!(model("killed") == model("whole"), "the final weights differ");
    assert_eq!(scene.checkpoints("killed"), scene.checkpoints("whole"));
}

#[test]
fn an_interrupt_saves_and_exits_130() {
    let scene = Scene::new();
    scene.expect(scene.command("whole", &["--steps", "400"]), 0);
    let child = scene.spawn(scene.command("stopped", &["--steps", "400"]));
    while scene.checkpoints("stopped").is_empty() {
        std::thread::sleep(Duration::from_millis(5));
    }
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(130), "{text}");
    assert!(text.contains("stopped and saved after step"), "{text}");
    let last = scene.losses("stopped").last().unwrap().0;
    assert!(last < 400);
    assert_eq!(scene.checkpoints("stopped").last().unwrap(), &format!("step-{last:08}"));
    let (_, text) = scene.expect(scene.command("stopped", &["--steps", "400"]), 0);
    assert!(text.contains("resuming from"), "{text}");
    assert_eq!(scene.losses("stopped"), scene.losses("whole"));
}

/// The limit on the size of files stands in for a full disk: both fail a write in the middle of a tensor.
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
