//! The `std` side of the proof in `tests/no-std`: prints what the C program there takes as its arguments.
extern crate alloc;

#[path = "../../tests/no-std/src/probe.rs"]
mod probe;

fn main() {
    let p = probe::run();
    println!("{:016x} {:.9} {:.9} {:.9}", p.codes, p.before, p.after, p.decoded);
}
