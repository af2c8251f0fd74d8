//! The forms of a step that only a device has: who multiplies, e4m3, and the residual stream in bf16.

use elleci_core::model::Checkpointing;
use elleci_core::optim::StatePrecision;
use elleci_core::params::Params;
use elleci_cuda::device::Ability;
use elleci_cuda::ops::Products;
use elleci_cuda::ops::product::Gemm;
use elleci_cuda::plan::Options;
use elleci_cuda::trainer::{Error, Rates, Trainer};
use elleci_cuda_emulation::Emulated;
use half::bf16;

use crate::machine::{device, distance};
use crate::step::{Core, Data, config, core, options, trainer, weights, worst};

/// Loss and gradients of one micro-batch taken twice, as an accumulation is.
fn twice(o: Options, data: &Data) -> (f64, Params) {
    let c = config();
    let mut t = trainer(&c, &weights(&c), o, 3);
    for _ in 0..2 {
        t.accumulate(&data.batch(), 0.02).unwrap();
    }
    (t.last_loss().unwrap(), t.gradients().unwrap())
}

/// On the emulated device both add by k from the first to the last, so that they give the same bits: every operand is what it should be,
/// in all products of a step. On a card the order differs. (A library's first step is not recorded, the second is.)
#[test]
fn the_library_multiplies_what_our_own_kernels_do() {
    let data = Data::new(2, 1, 65);
    let on_card = std::env::var("ELLECI_CUDA_TEST").as_deref() == Ok("card");
    let fits = |products| !on_card || products != Products::Fp8 || device(0).offers(Ability::Fp8).is_ok();
    for products in [Products::Bf16, Products::Fp8].into_iter().filter(|p| fits(*p)) {
        for bf16_stream in [false, true] {
            let o = Options { bf16_stream, ..options(products, Checkpointing::EveryKth(2), 1, 65) };
            let (own_loss, own) = twice(o, &data);
            let (loss, grads) = twice(Options { gemm: Gemm::Library, ..o }, &data);
            if on_card {
                let (distance, name) = worst(&grads, &own);
                assert!(distance <= 0.05 && (loss - own_loss).abs() <= 1e-3 * own_loss, "{name}: {distance:e}");
            } else {
                assert!(grads.data() == own.data(), "{products:?}: {:?}", worst(&grads, &own));
                assert_eq!(loss, own_loss);
            }
        }
    }
}

/// Operands that are kept are derived once a step, and are what is laid out for every product otherwise: weights after two steps are
/// the same bits.
#[test]
fn operands_that_are_kept_change_no_bit() {
    let c = config();
    let fits = |products| products != Products::Fp8 || device(0).offers(Ability::Fp8).is_ok();
    for products in [Products::F32, Products::Bf16, Products::Fp8].into_iter().filter(|p| fits(*p)) {
        let after = |unpacked| {
            let o = Options { unpacked, ..options(products, Checkpointing::EveryLayer, 1, 17) };
            let mut t = trainer(&c, &weights(&c), o, 3);
            for seed in 0..2 {
                t.accumulate(&Data::new(seed, 1, 17).batch(), 0.02).unwrap();
                // A rate at which many codes change
                t.update(&Rates { lr_of: &|_| 3e-2, weight_decay: 0.0, clip: 0.0, weight: 1.0 }).unwrap();
            }
            t.weights().unwrap()
        };
        let (packed, kept) = (after(false), after(true));
        assert!(kept.data() == packed.data(), "{products:?}: {:?}", worst(&kept, &packed));
    }
}

/// A residual stream of bf16 rounds it once after the embedding and once after every addition, seven times in three layers. What one
/// rounding does to the gradients (codes of the int8 quantiser flip for it), the core tells: with its embeddings rounded to bf16. Seven
/// roundings and the bf16 products do no more than the sum of what each does.
#[test]
fn a_residual_stream_of_bf16_costs_no_more_than_its_roundings() {
    let (c, data) = (config(), Data::new(2, 1, 65));
    let w = weights(&c);
    let Core { loss: want_loss, grads: want, .. } = core(&c, &w, &data, 0.02);
    let mut rounded = w.clone();
    let embedding = rounded.layout().tok_emb();
    rounded[embedding].iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32());
    let once = distance(core(&c, &rounded, &data, 0.02).grads.data(), want.data());
    let from_core = |bf16_stream| {
        let o = Options { bf16_stream, ..options(Products::Bf16, Checkpointing::EveryLayer, 1, 65) };
        let mut t = trainer(&c, &w, o, 0);
        t.accumulate(&data.batch(), 0.02).unwrap();
        let loss = t.last_loss().unwrap();
        assert!((loss - want_loss).abs() <= 1e-2 * want_loss, "{loss} {want_loss}");
        distance(t.gradients().unwrap().data(), want.data())
    };
    let (products, all) = (from_core(false), from_core(true));
    println!("one rounding {once:.1e}, products alone {products:.1e}, all {all:.1e}");
    assert!(all <= products + 7.0 * once, "{all:e}, {products:e} + 7 x {once:e}");
    assert!(all > products, "nothing was rounded");
}

/// Losses of the steps of a training in the smallest form.
fn curve(products: Products, gemm: Gemm) -> Vec<f64> {
    let c = config();
    let data = Data::new(4, 2, 33);
    let o = Options {
        bf16_masters: true,
        bf16_gradients: true,
        states: StatePrecision::Block8,
        average: false,
        gemm,
        ..options(products, Checkpointing::EveryLayer, 2, 33)
    };
    let mut t = trainer(&c, &weights(&c), o, 0);
    let step = |t: &mut Trainer| {
        t.accumulate(&data.batch(), 0.02).unwrap();
        t.update(&Rates { lr_of: &|_| 5e-3, weight_decay: 0.0, clip: 0.0, weight: 1.0 }).unwrap();
        t.outcome().unwrap().unwrap().loss
    };
    (0..6).map(|_| step(&mut t)).collect()
}

/// A training with gradients in e4m3 falls as one with bf16 does. The first loss is the same to the bit: the forward has no e4m3. Then
/// each token's gradient is 0.036 of its norm away (see `kernels::products`), at random; three layers make 0.06 of it, and Adam turns
/// that into as much of a step at most. What a step changes the loss by differs by no more, and errors of opposite sign cancel: after
/// all steps the losses are within 0.06 of what they fell by.
#[test]
fn a_training_in_e4m3_follows_that_in_bf16() {
    if device(0).offers(Ability::Fp8).is_err() {
        println!("the card has no e4m3: not tested");
        return;
    }
    let want = curve(Products::Bf16, Gemm::Own);
    for gemm in [Gemm::Own, Gemm::Library] {
        let got = curve(Products::Fp8, gemm);
        println!("{want:.4?}\n{got:.4?}");
        assert!((got[0] - want[0]).abs() <= 1e-6 * want[0], "{got:?} {want:?}");
        let fell = want[0] - want[5];
        assert!(fell > 0.2 * want[0], "{want:?}");
        for (step, (a, b)) in got.iter().zip(&want).enumerate() {
            assert!((a - b).abs() <= 0.06 * fell, "step {step}: {got:?} {want:?}");
        }
    }
}

/// What a device lacks is said before anything is allocated.
#[test]
fn a_device_that_lacks_something_says_so() {
    let c = config();
    let asked = [
        (Ability::Fp8, options(Products::Fp8, Checkpointing::None, 1, 8)),
        (Ability::Library, Options { gemm: Gemm::Library, ..options(Products::Bf16, Checkpointing::None, 1, 8) }),
    ];
    for (ability, o) in asked {
        let device = Box::new(Emulated::new(0).without(ability));
        let made = Trainer::new(device, &weights(&c), &c, Default::default(), o, 1);
        match made.err().expect("it cannot") {
            Error::Device(e) => assert!(e.to_string().contains(&format!("without {ability:?}")), "{e}"),
            other => panic!("{other}"),
        }
    }
}
