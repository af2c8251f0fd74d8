#![doc = include_str!("../README.md")]

pub mod arena;
pub mod device;
pub mod driver;
pub mod nvrtc;
pub mod ops;
pub mod plan;
pub mod source;
pub mod step;
pub mod trainer;
