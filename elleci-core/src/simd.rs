//! Which instruction sets the machine has, and running plain loops compiled for the best of them.
//!
//! Detection happens at run time, never at compile time. The environment variable `ELLECI_ISA`
//! (`portable`, `avx2`, `avx512`, `avx512vnni`, `avx512vbmi`; on ARM `neon`, `neondot`) lowers the ceiling, for tests and for telling an ISA's fault from others.

use core::hint::black_box;

/// Instruction-set levels. Those of one architecture include one another, in this order; those of another are none of a machine's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, whatever the target's baseline is.
    Portable,
    /// AArch64 with NEON, which nearly every one has.
    Neon,
    /// AArch64 with NEON and the dot product instructions (`sdot`).
    NeonDot,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64-v4: AVX-512 F, BW, CD, DQ, VL.
    Avx512,
    /// x86-64-v4 with AVX-512 VNNI.
    Avx512Vnni,
    /// x86-64-v4 with AVX-512 VNNI and VBMI.
    Avx512Vbmi,
}

impl Isa {
    /// All levels that a machine of this architecture may have, lowest first.
    #[cfg(not(target_arch = "aarch64"))]
    pub const ALL: [Isa; 5] = [Isa::Portable, Isa::Avx2, Isa::Avx512, Isa::Avx512Vnni, Isa::Avx512Vbmi];
    /// All levels that a machine of this architecture may have, lowest first.
    #[cfg(target_arch = "aarch64")]
    pub const ALL: [Isa; 3] = [Isa::Portable, Isa::Neon, Isa::NeonDot];

    /// The name used by `ELLECI_ISA` and in logs.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Neon => "neon",
            Isa::NeonDot => "neondot",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512vnni",
            Isa::Avx512Vbmi => "avx512vbmi",
        }
    }

    /// Parses [`Isa::name`].
    pub fn from_name(name: &str) -> Option<Isa> {
        Isa::ALL.into_iter().find(|isa| isa.name() == name)
    }

    /// The best level of this machine, at most what `ELLECI_ISA` allows. Without `std`: what the build was made for, portable or
    /// NEON.
    pub fn detect() -> Isa {
        #[cfg(feature = "std")]
        {
            static DETECTED: std::sync::OnceLock<Isa> = std::sync::OnceLock::new();
            *DETECTED.get_or_init(|| {
                let ceiling = std::env::var("ELLECI_ISA").ok().and_then(|v| Isa::from_name(&v));
                Isa::machine().min(ceiling.unwrap_or(Isa::Avx512Vbmi))
            })
        }
        #[cfg(not(feature = "std"))]
        Isa::machine()
    }

    /// The best level of this machine, whatever the environment says.
    pub fn machine() -> Isa {
        #[cfg(all(feature = "std", target_arch = "x86_64"))]
        {
            use std::arch::is_x86_feature_detected as has;
            if pulp::x86::V4::try_new().is_some() {
                return match (has!("avx512vnni"), has!("avx512vbmi")) {
                    (true, true) => Isa::Avx512Vbmi,
                    (true, false) => Isa::Avx512Vnni,
                    _ => Isa::Avx512,
                };
            }
            if pulp::x86::V3::try_new().is_some() {
                return Isa::Avx2;
            }
        }
        #[cfg(all(target_arch = "aarch64", target_endian = "little", target_feature = "neon"))]
        {
            #[cfg(feature = "std")]
            if std::arch::is_aarch64_feature_detected!("dotprod") {
                return Isa::NeonDot;
            }
            Isa::Neon
        }
        #[cfg(not(all(target_arch = "aarch64", target_endian = "little", target_feature = "neon")))]
        Isa::Portable
    }
}

/// Runs `f` compiled for the detected instruction set: loops inside that the compiler can vectorise are vectorised
/// for it. `f` and what it calls must be `#[inline(always)]` for that to take effect, a closure too
/// (`vectorize(#[inline(always)] || ..)`): what is not inlined is compiled for the target's baseline, and runs several
/// times slower without a warning.
#[inline(always)]
pub fn vectorize<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(all(feature = "std", target_arch = "x86_64"))]
    {
        let isa = Isa::detect();
        if isa >= Isa::Avx512
            && let Some(v4) = pulp::x86::V4::try_new()
        {
            return v4.vectorize(Call(f));
        }
        if isa >= Isa::Avx2
            && let Some(v3) = pulp::x86::V3::try_new()
        {
            return v3.vectorize(Call(f));
        }
    }
    f()
}

/// Twelve independent chains of multiply-adds in registers, `rounds` long, with the vectors of the detected instruction set; the
/// number of operations, two a multiply-add. What the machine does of these a second is its float32 peak. They are fused where there
/// is an instruction for that.
pub fn multiply_adds(rounds: usize) -> usize {
    crate::ops::lanes::dispatch(Chains(rounds))
}

struct Chains(usize);

impl pulp::WithSimd for Chains {
    type Output = usize;
    #[inline(always)]
    fn with_simd<S: pulp::Simd>(self, simd: S) -> usize {
        // As many as hide the latency of two units. Fixed point 1: the values neither grow, nor vanish, nor become subnormal.
        let mut sums = [simd.splat_f32s(black_box(0.75)); 12];
        let (a, b) = (simd.splat_f32s(black_box(0.5)), simd.splat_f32s(black_box(0.5)));
        for _ in 0..self.0 {
            // A closure would be compiled without the instruction set's features.
            for i in 0..12 {
                sums[i] = simd.mul_add_e_f32s(sums[i], a, b);
            }
        }
        black_box(sums);
        2 * 12 * self.0 * S::F32_LANES
    }
}

/// Asks for memory that will be read soon. The machine's own prefetcher follows one run of addresses to the end of its page of
/// 4 KiB; this is for reading across many pages, or many runs.
#[inline(always)]
pub fn prefetch<T>(values: &[T]) {
    for at in (0..size_of_val(values)).step_by(64) {
        prefetch_line(values.as_ptr().cast::<u8>().wrapping_add(at));
    }
}

/// [`prefetch`] of one cache line. The address may be any.
#[inline(always)]
pub fn prefetch_line(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    #[allow(unused_unsafe, reason = "newer compilers take this intrinsic for safe")]
    // SAFETY: SSE is part of x86-64, and prefetching never faults.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast())
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: prefetching never faults, and changes nothing but the cache.
    unsafe {
        core::arch::asm!("prfm pldl1keep, [{at}]", at = in(reg) at, options(readonly, nostack, preserves_flags))
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

/// [`prefetch_line`] for later: no nearer than the second-level cache, which has more places for lines on their way.
#[inline(always)]
pub fn prefetch_later(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    #[allow(unused_unsafe, reason = "newer compilers take this intrinsic for safe")]
    // SAFETY: SSE is part of x86-64, and prefetching never faults.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(at.cast())
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as in `prefetch_line`.
    unsafe {
        core::arch::asm!("prfm pldl2keep, [{at}]", at = in(reg) at, options(readonly, nostack, preserves_flags))
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

/// How far ahead [`prefetch_run`] asks for what comes soon, in bytes.
pub const SOON: usize = 16 * 64;
/// How far ahead it asks for what comes later.
pub const LATER: usize = 128 * 64;

/// For a run of memory that is read line by line, called once a line: asks for what comes soon, and for what comes later. The address
/// may be any.
#[inline(always)]
pub fn prefetch_run(at: *const u8) {
    prefetch_line(at.wrapping_add(SOON));
    prefetch_later(at.wrapping_add(LATER));
}

#[cfg(all(feature = "std", target_arch = "x86_64"))]
use pulp::NullaryFnOnce;

#[cfg(all(feature = "std", target_arch = "x86_64"))]
struct Call<F>(F);

#[cfg(all(feature = "std", target_arch = "x86_64"))]
impl<R, F: FnOnce() -> R> NullaryFnOnce for Call<F> {
    type Output = R;
    #[inline(always)]
    fn call(self) -> R {
        (self.0)()
    }
}
