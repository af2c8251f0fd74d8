//! The instruction-set level that was asked for is the one that runs: otherwise a pass under `ELLECI_ISA` proves nothing.

use elleci_core::simd::Isa;

#[test]
fn the_level_asked_for_runs() {
    match std::env::var("ELLECI_ISA") {
        Ok(name) => assert_eq!(Isa::detect().name(), name, "this machine has {:?} at most", Isa::machine()),
        Err(_) => assert_eq!(Isa::detect(), Isa::machine()),
    }
}
