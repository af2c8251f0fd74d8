//! The matrix-vector product over 1e9 ternary weights, far out of cache, in this project's packings and in the layout of
//! bitnet.cpp's I2_S, which is written here from its published description (AVX2: blocks of 128 weights in 32 bytes, 2 bits each;
//! the products of 32 blocks summed up in 16 bits, as the original does). Beside them, plain reading. With TOKENS, the same of so
//! many rows of activations at once, as a batch of sessions makes them: Gweight/s then counts a weight once for each.
//!
//!     cargo bench -p elleci-core --bench matvec -- [THREADS [TOKENS]]

use std::hint::black_box;
use std::time::Instant;

use elleci_core::simd::Isa;
use elleci_core::ternary::packed::{Line, PackedTernary, Packing};
use memmap2::MmapMut;
use rayon::prelude::*;

/// The feed-forward of `elleci-1.5b`.
const ROWS: usize = 5632;
const COLS: usize = 2048;
const WEIGHTS: usize = 1_000_000_000;
const ROUNDS: usize = 7;

fn main() {
    let numbers: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    let (threads, tokens) = (*numbers.first().unwrap_or(&2), *numbers.get(1).unwrap_or(&1));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
    let matrices = WEIGHTS.div_ceil(ROWS * COLS);
    let weights = (matrices * ROWS * COLS) as f64;
    let level = Isa::detect();
    let pages = if std::env::args().any(|a| a == "small") { Pages::Small } else { Pages::Huge };
    println!(
        "{threads} threads, {level:?}, {matrices} matrices of {ROWS} x {COLS}, {tokens} tokens, {pages:?} pages, best of {ROUNDS}"
    );

    let mut memory = pages.map(50_000_000 * 8);
    let words: &mut [u64] = bytemuck::cast_slice_mut(&mut memory);
    words.iter_mut().enumerate().for_each(|(i, word)| *word = i as u64);
    let read = || words.par_chunks(1 << 15).map(|c| c.iter().fold(0, |a, b| a ^ b)).reduce(|| 0, |a: u64, b| a ^ b);
    let reading = words.len() as f64 * 8.0 / best(|| _ = black_box(pool.install(read))) / 1e9;
    println!("| | Gweight/s | GB/s | of reading |\n|---|---|---|---|\n| reading | | {reading:.1} | |");
    drop(memory);
    let report = |name: &str, seconds: f64, bytes: usize| {
        let rate = bytes as f64 / seconds / 1e9;
        let products = tokens as f64 * weights / seconds / 1e9;
        println!("| {name} | {products:.1} | {rate:.1} | {:.0} % |", 100.0 * rate / reading);
    };

    for packing in Packing::ALL {
        let per = packing.bytes(ROWS, COLS).expect("it fits") / 64;
        let mut lines = pages.map(matrices * per * 64);
        let lines: &mut [Line] = bytemuck::cast_slice_mut(&mut lines);
        lines.iter_mut().enumerate().for_each(|(i, line)| *line = Line([(i * 7 % 243) as u8; 64]));
        let views = lines.chunks(per).map(|l| PackedTernary::new(packing, ROWS, COLS, 0.1, l).expect("it fits"));
        let views: Vec<PackedTernary> = views.collect();
        let (q, mut y) = (vec![3i8; tokens * COLS], vec![0.0; tokens * ROWS]);
        let scales = vec![0.1; tokens];
        let mut all = || views.iter().for_each(|v| v.forward(&q, &scales, &mut y));
        let seconds = best(|| pool.install(|| elleci_core::par::together(&mut all)));
        report(packing.name(), seconds, lines.len() * 64);
    }
    #[cfg(target_arch = "x86_64")]
    if level >= Isa::Avx2 && tokens == 1 {
        let mut lines = pages.map(matrices * ROWS * COLS / 4);
        lines.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 7 % 171) as u8 & 0b1010_1010);
        let (q, mut y) = (vec![3i8; COLS], vec![0.0f32; ROWS]);
        let seconds = best(|| {
            pool.install(|| {
                for matrix in lines.chunks(ROWS * COLS / 4) {
                    let rows = matrix.par_chunks(COLS / 4).zip(y.par_iter_mut()).with_min_len(ROWS / 64);
                    // SAFETY: AVX2 was detected.
                    rows.for_each(|(row, y)| *y = unsafe { i2_s::dot(row, &q) } as f32);
                }
            });
            black_box(&mut y);
        });
        report("I2_S", seconds, lines.len());
    }
}

/// The pages that weights lie in.
#[derive(Clone, Copy, Debug)]
enum Pages {
    Small,
    Huge,
}

impl Pages {
    /// Memory in such pages, as far as the system has them.
    fn map(self, bytes: usize) -> MmapMut {
        let map = MmapMut::map_anon(bytes).expect("memory");
        #[cfg(target_os = "linux")]
        let _ = map.advise(match self {
            Pages::Small => memmap2::Advice::NoHugePage,
            Pages::Huge => memmap2::Advice::HugePage,
        });
        map
    }
}

fn best(mut run: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..ROUNDS).map(time).fold(f64::MAX, f64::min)
}

#[cfg(target_arch = "x86_64")]
mod i2_s {
    use std::arch::x86_64::*;

    /// Blocks of 128 weights that are summed up in 16 bits.
    const FOLD: usize = 32;

    /// `Σ (code + 1) · q` of one row; 16-bit sums wrap where the original's do.
    #[target_feature(enable = "avx2")]
    pub fn dot(row: &[u8], q: &[i8]) -> i32 {
        let mask = _mm256_set1_epi8(3);
        let mut total = _mm256_setzero_si256();
        for (row, q) in row.chunks(32 * FOLD).zip(q.chunks(128 * FOLD)) {
            let mut sum = _mm256_setzero_si256();
            for (block, q) in row.as_chunks::<32>().0.iter().zip(q.as_chunks::<128>().0) {
                // SAFETY: a block is 32 bytes, its activations 128.
                let (x, q) = unsafe { (_mm256_loadu_si256(block.as_ptr().cast()), q.as_ptr().cast::<__m256i>()) };
                let codes = [
                    _mm256_and_si256(_mm256_srli_epi16::<6>(x), mask),
                    _mm256_and_si256(_mm256_srli_epi16::<4>(x), mask),
                    _mm256_and_si256(_mm256_srli_epi16::<2>(x), mask),
                    _mm256_and_si256(x, mask),
                ];
                for (g, codes) in codes.into_iter().enumerate() {
                    // SAFETY: four vectors of activations a block.
                    let q = unsafe { _mm256_loadu_si256(q.add(g)) };
                    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, q));
                }
            }
            total = _mm256_add_epi32(total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
        }
        let mut lanes = [0; 8];
        // SAFETY: eight int32.
        unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), total) };
        lanes.iter().sum()
    }
}
