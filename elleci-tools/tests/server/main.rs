//! `elleci-run serve` as its clients meet it: the whole binary over loopback, with a tiny random model.

mod answers;
mod limits;
mod scene;
#[path = "../tiny/mod.rs"]
mod tiny;
