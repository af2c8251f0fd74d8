//! Prints the instruction-set levels below this machine's own, one a line: those that `ELLECI_ISA` can select.

use elleci_core::simd::Isa;

fn main() {
    for isa in Isa::ALL.into_iter().filter(|isa| *isa < Isa::machine()) {
        println!("{}", isa.name());
    }
}
