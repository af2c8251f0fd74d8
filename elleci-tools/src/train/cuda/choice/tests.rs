//! What is chosen, for cards of every size; the budgets of the largest preset.

use super::*;
use crate::train::layers::{Layer, load};

const GIB: u64 = 1 << 30;

fn config(preset: &str, settings: &[&str]) -> RunConfig {
    let layers: Vec<Layer> = settings.iter().map(|s| Layer::assignment(s).unwrap()).collect();
    load(Some(preset), &layers).unwrap()
}

fn schedule(config: &RunConfig) -> Plan {
    Plan::new(config, &config.data.sources.keys().cloned().collect::<Vec<_>>())
}

fn chosen(config: &RunConfig, room: u64) -> Choice {
    choose(config, &schedule(config), room).unwrap()
}

const SMALL: [&str; 2] = ["cuda.masters=bf16", "cuda.gradients=bf16"];

/// Budgets of the largest preset, through the configuration: bf16 masters and 8-bit states in 10.0 GiB, and in 11.5 GiB with
/// accumulation; float32 masters in 14 GiB, sixteen sequences in 40 GiB.
#[test]
fn the_reference_run_fits_its_budgets() {
    let with = |batch, accumulation, more: &[&'static str]| {
        let settings = [batch, accumulation, "training.checkpointing=layer", "swa.start=1.0"];
        config("elleci-1.5b", &[&settings[..], more].concat())
    };
    let (one, many) = ("training.batch=1", "training.batch=16");
    for (config, budget) in [
        (with(one, "training.accumulation=1", &SMALL), 10.0),
        (with(one, "training.accumulation=64", &SMALL), 11.5),
        (with(one, "training.accumulation=1", &["cuda.masters=float32"]), 14.0),
        (with(many, "training.accumulation=4", &["cuda.rows=16"]), 40.0),
        (with(many, "training.accumulation=4", &[&SMALL[..], &["cuda.rows=16"]].concat()), 40.0),
    ] {
        let choice = chosen(&config, (budget * GIB as f64) as u64);
        println!("{:.3} GiB of {budget}", gib(choice.bytes));
        assert!(gib(choice.bytes) <= budget, "{:.3} GiB of {budget}", gib(choice.bytes));
        assert_eq!(choice.options.batch, config.training.batch);
        assert_eq!(choice.options.whole_step, config.training.accumulation == 1);
        assert_eq!(choice.arena.lent_to(Use::Activations) > 0, choice.options.whole_step);
        assert_eq!(choice.options.checkpointing, Checkpointing::EveryLayer);
    }
}

/// The reference run on a 12 GB card: one or a few sequences at once, and the running mean in the host's memory.
#[test]
fn the_reference_run_fits_a_12_gb_card_whatever_its_micro_batch() {
    let settings = [&SMALL[..], &["training.checkpointing=auto"]].concat();
    let config = config("elleci-1.5b", &settings);
    let choice = chosen(&config, 11 * GIB);
    assert!(choice.bytes <= 11 * GIB && choice.mean == Mean::Host, "{choice:?}");
    assert!(config.training.batch.is_multiple_of(choice.options.batch));
    let text = describe(&config, &choice);
    assert!(
        text.contains("in the host's memory") && text.contains(&format!("{:.3} GiB", gib(choice.arena.bytes()))),
        "{text}"
    );
}

/// More memory never means more layers computed twice, and what is chosen fits.
#[test]
fn more_memory_is_never_slower() {
    let config = config("elleci-1.5b", &["training.checkpointing=auto", "swa.start=1.0"]);
    let n = config.model.n_layers;
    let mut last = usize::MAX;
    for room in [16, 24, 32, 48, 80, 139] {
        let choice = chosen(&config, room * GIB);
        assert!(choice.bytes <= room * GIB);
        let again = recomputed(n, choice.options.checkpointing.segment(n));
        println!(
            "{room} GiB: {} sequences, {:?}, {:.1} GiB",
            choice.options.batch,
            choice.options.checkpointing,
            gib(choice.bytes)
        );
        assert!(again <= last, "{room} GiB");
        last = again;
    }
    assert_eq!(last, 0, "a large card computes nothing twice");
}

/// Operands of ternary products are kept where there is room beside what saves more time; two bits a weight otherwise, or as asked.
#[test]
fn operands_are_kept_where_there_is_room() {
    let with = |ternary| config("elleci-1.5b", &["training.checkpointing=auto", "swa.start=1.0", ternary]);
    let (auto, packed, unpacked) =
        (with("cuda.ternary=auto"), with("cuda.ternary=packed"), with("cuda.ternary=unpacked"));
    let large = chosen(&auto, 139 * GIB);
    assert!(large.options.unpacked && large.options.checkpointing == Checkpointing::None, "{:?}", large.options);
    let without = chosen(&packed, 139 * GIB);
    assert!(!without.options.unpacked);
    // int8 and bf16 of 1.35e9 weights
    let kept = large.arena.bytes_of(Use::Ternary) - without.arena.bytes_of(Use::Ternary);
    assert!((3.7..3.9).contains(&gib(kept)), "{}", gib(kept));
    let small = chosen(&auto, 16 * GIB);
    assert!(!small.options.unpacked);
    assert!(chosen(&unpacked, 24 * GIB).options.unpacked);
    let text = choose(&unpacked, &schedule(&unpacked), 16 * GIB).unwrap_err().to_string();
    assert!(text.ends_with("it fits with --set cuda.ternary=auto"), "{text}");
}

#[test]
fn segments_that_recompute_no_less_are_left_out() {
    assert_eq!(segments(24), [24, 12, 8, 6, 4, 3, 2, 1]);
    assert_eq!(segments(1), [1]);
    for n in 1..40 {
        let all = segments(n);
        assert!(all.windows(2).all(|w| recomputed(n, w[0]) < recomputed(n, w[1]) && w[0] > w[1]), "{n}: {all:?}");
        assert_eq!((all[0], recomputed(n, n)), (n, 0));
    }
    assert_eq!(forms(4), [Checkpointing::None, Checkpointing::EveryKth(2), Checkpointing::EveryLayer]);
}

#[test]
fn passes_are_equal_parts_of_a_micro_batch() {
    assert_eq!(pass_rows(16, 1024, 4096), 4);
    assert_eq!(pass_rows(16, 1024, 7000), 4);
    assert_eq!(pass_rows(16, 256, 4096), 16);
    assert_eq!(pass_rows(6, 1024, 4096), 3);
    assert_eq!(pass_rows(7, 1024, 4096), 1);
    assert_eq!(pass_rows(3, 4096, 1), 1, "one sequence goes through whole");
}

#[test]
fn a_card_that_is_too_small_is_told_what_fits() {
    let config = config("elleci-1.5b", &["swa.start=1.0", "training.checkpointing=layer"]);
    let message = |room| choose(&config, &schedule(&config), room).unwrap_err().to_string();
    let text = message(11 * GIB);
    assert!(text.contains("11.00 GiB are free") && text.ends_with("it fits with --set cuda.masters=bf16"), "{text}");
    // And it does.
    let mut followed = config.clone();
    followed.cuda.masters = CudaFloat::Bf16;
    assert!(chosen(&followed, 11 * GIB).bytes <= 11 * GIB);
    let text = message(4 * GIB);
    assert!(text.contains("no setting makes it fit") && text.contains("GiB with all that save memory"), "{text}");
    let wide =
        super::tests::config("elleci-1.5b", &["swa.start=1.0", "cuda.gradients=float32", "optimizer.states=f32"]);
    let text = choose(&wide, &schedule(&wide), 11 * GIB).unwrap_err().to_string();
    assert!(text.contains("--set cuda.gradients=bf16 --set optimizer.states=8bit --set cuda.masters=bf16"), "{text}");
}

#[test]
fn what_the_kernels_do_not_cover_is_refused_by_name() {
    let config = config("nano", &["model.d_state=200"]);
    let text = choose(&config, &schedule(&config), u64::MAX).unwrap_err().to_string();
    assert!(text.contains("`d_state` 200"), "{text}");
}

/// What a card lacks is named with what to set; `auto` goes on without cuBLASLt, and says why.
#[test]
fn what_a_card_lacks_is_refused_or_done_without() {
    let missing = |ability| match ability {
        Ability::Fp8 => Err(DeviceError::Lacks { what: "cuda.products=fp8", reason: "too old".into() }),
        Ability::Library => Err(DeviceError::Missing { library: "libcublasLt", reason: "none".into() }),
    };
    let (plain, fp8, asked) =
        (config("nano", &[]), config("nano", &["cuda.products=fp8"]), config("nano", &["cuda.gemm=cublaslt"]));
    let (settled, text) = settle(&plain, missing).unwrap();
    assert!(
        settled.cuda.gemm == CudaGemm::Own && text.contains("own kernels") && text.contains("libcublasLt"),
        "{text}"
    );
    assert!(settle(&fp8, missing).unwrap_err().to_string().contains("too old"));
    assert!(settle(&asked, missing).unwrap_err().to_string().contains("cuda.gemm=own"));
    let (settled, text) = settle(&fp8, |_| Ok(())).unwrap();
    assert!(settled.cuda.gemm == CudaGemm::Cublaslt && text.contains("cuBLASLt"), "{text}");
    // Without the library's workspace a plan is no larger.
    let (own, library) = (settle(&plain, missing).unwrap().0, settle(&plain, |_| Ok(())).unwrap().0);
    assert!(chosen(&own, u64::MAX).bytes <= chosen(&library, u64::MAX).bytes);
}
