//! `elleci-train`: trains an Elleci model.
fn main() {}
