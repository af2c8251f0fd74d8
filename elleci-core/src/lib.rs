//! The mathematics of Elleci: a ternary (BitNet b1.58) language model of Mamba-2 and multi-head latent attention.
//!
//! `no_std` + `alloc`. The feature `std` (default) adds run-time SIMD detection, threads and a faster dense product.
//! Core knows no file system and no clock. Threads are the caller's: work is spread over the rayon pool that the
//! call runs in, and stays on the calling thread outside of one (see [`par`]).
//!
//! Conventions: activations are row-major `[tokens, channels]` with `tokens = batch * seq`; weights are `[out, in]`
//! row-major; norms, scales and all accumulations are float32.
#![cfg_attr(not(feature = "std"), no_std)]
extern crate alloc;

pub mod archive;
#[cfg(feature = "capi-core")]
pub mod capi;
pub mod config;
pub mod generate;
pub mod inference;
pub mod init;
pub mod layers;
pub mod memory;
pub mod model;
pub mod ops;
pub mod optim;
pub mod par;
pub mod params;
pub mod sampler;
pub mod simd;
pub mod ternary;

/// The Rust of docs/embedding.md compiles and runs.
#[cfg(doctest)]
#[doc = include_str!("../../docs/embedding.md")]
pub struct Embedding;
