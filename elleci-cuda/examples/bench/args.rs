//! What is to be measured.

use elleci_cuda::ops::Products;
use elleci_cuda::ops::product::Gemm;

use super::Result;

/// What the command line asks for.
pub struct Args {
    pub preset: String,
    pub seq: usize,
    pub batches: Vec<usize>,
    pub products: Vec<Products>,
    pub gemm: Vec<Gemm>,
    pub bf16_stream: bool,
    pub masters: Option<bool>,
    pub steps: usize,
    pub seconds: f64,
    pub int8: f64,
    pub bf16: f64,
    pub check: bool,
    pub out: Option<String>,
}

/// Reads the command line.
///
/// # Errors
/// A word that is not known, or a value that is none.
pub fn args() -> Result<Args> {
    let mut a = Args {
        preset: "elleci-1.5b".into(),
        seq: 1024,
        batches: vec![1, 4, 16],
        products: vec![Products::Bf16, Products::F32],
        gemm: Vec::new(),
        bf16_stream: false,
        masters: None,
        steps: 10,
        seconds: 600.0,
        int8: f64::NAN,
        bf16: f64::NAN,
        check: false,
        out: None,
    };
    let mut words = std::env::args().skip(1);
    while let Some(name) = words.next() {
        if name == "--check" {
            a.check = true;
            continue;
        }
        let value = words.next().ok_or_else(|| format!("{name}: a value is missing"))?;
        let product = |p: &str| match p {
            "bf16" => Ok(Products::Bf16),
            "float32" => Ok(Products::F32),
            "fp8" => Ok(Products::Fp8),
            other => Err(format!("{name} {other}: bf16, float32 or fp8")),
        };
        let bf16 = |p: &str| match product(p) {
            Ok(Products::Fp8) | Err(_) => Err(format!("{name} {p}: bf16 or float32")),
            Ok(p) => Ok(p == Products::Bf16),
        };
        let gemm = |g: &str| match g {
            "own" => Ok(Gemm::Own),
            "cublaslt" => Ok(Gemm::Library),
            other => Err(format!("{name} {other}: cublaslt or own")),
        };
        match name.as_str() {
            "--preset" => a.preset = value,
            "--seq" => a.seq = value.parse()?,
            "--batch" => a.batches = value.split(',').map(str::parse).collect::<std::result::Result<_, _>>()?,
            "--products" => a.products = value.split(',').map(product).collect::<std::result::Result<_, _>>()?,
            "--gemm" => a.gemm = value.split(',').map(gemm).collect::<std::result::Result<_, _>>()?,
            "--stream" => a.bf16_stream = bf16(&value)?,
            "--masters" => a.masters = Some(bf16(&value)?),
            "--steps" => a.steps = value.parse::<usize>()?.max(1),
            "--seconds" => a.seconds = value.parse()?,
            "--int8" => a.int8 = value.parse()?,
            "--bf16" => a.bf16 = value.parse()?,
            "--out" => a.out = Some(value),
            other => return Err(format!("{other} is not known; see the head of examples/bench/main.rs").into()),
        }
    }
    Ok(a)
}
