//! T5 and C5 with many tokens on VBMI: nine columns of a run of twenty by look-up, the others by multiply-adds, at the same time.
//!
//! `vpdpbusd` does 64 products, and two units of a core share its work; on the machines that were measured they do one a cycle, which is
//! what bounds long prompts. Another unit permutes. With the sums that three activations can make with three ternary weights (27, so
//! that 32 int16 are one register) as a table of a token, one `vpermw` with three weights of 32 rows as indices yields 96 products,
//! and one addition, which every unit does, takes them in. Six of those beside twelve multiply-adds fill all units:
//! 21 columns, of which T5's bytes give 20.
//!
//! The tables are of tokens, and the indices and codes of a panel are made from its bytes, once for all tokens. Both are made for some
//! columns at a time, so that the tables of all tokens stay in the second cache and a panel's part in the first. The integers are the
//! same as everywhere.

use alloc::vec;
use alloc::vec::Vec;
use core::arch::x86_64::*;
use core::mem::MaybeUninit;
use core::ops::Range;
use core::slice;
use std::sync::OnceLock;
use std::time::Instant;

use ndarray::{ArrayViewMut2, Axis};

use super::super::kernel::{Kernel, Line, ROWS, TOKENS};
use super::super::vnni::Vnni;
use super::avx512::{LOW_BITS, LOWER, Vbmi, add_vnni, apart, indices_vbmi, load, store, tables, trits_vbmi};
use super::columns::{PANELS, QUAD, Quad, column_lines};
use super::columns_avx512::packed_lines;
use super::{Finish, LINES, PackedTernary, Packing, RowPacking};
use crate::ops::matmul::mat_mut;
use crate::par;
use crate::simd::{prefetch, prefetch_later};

/// Columns of a run.
const COLUMNS: usize = 20;
/// Groups of three columns of a run that are looked up: c, c + 4 and c + 8 for c of 0, 1, 2.
const LOOKED_UP: usize = 3;
/// Runs of a part: its 14 KB stay in the first cache beside the tables of a pair, which come from the second. Three look-ups a run, each
/// at most 384 in magnitude, fit an int16.
const RUNS: usize = 16;
/// Tokens that meet a panel's part together: their sums fill 12 registers. With three, the compilers that were tried spill.
const PAIR: usize = 2;
/// Tokens whose tables are made together: those of a part take 400 KB.
const CHUNK: usize = 128;
/// Panels of a band at least: making the tables of its tokens takes a tenth of the time or less.
const BAND: usize = 16;
/// Tokens and rows from which on tables pay for themselves.
const MANY: usize = 32;
const TALL: usize = 512;

/// A run of a panel.
#[derive(Clone, Copy)]
#[repr(C)]
struct Run {
    /// Of rows 0..32 and 32..64, those of sixteen beside those of the next: in 16 bits a row the indices of the three groups of columns
    /// `c, c + 4, c + 8`, five bits each.
    indices: [Line; 2],
    /// Code lines of columns 3, 7, 11 (and none), of 12..16, and of 16..20.
    codes: [[Line; LINES]; 3],
}

const EMPTY_RUN: Run = Run { indices: [Line([0; 64]); 2], codes: [[Line([0; 64]); LINES]; 3] };

/// Of one token and run.
type Tables = [Line; LOOKED_UP];
/// The activations of one token and run that [`Run::codes`] meet, and a word that is not read. Apart from the tables, so that lines that
/// come from the second cache are full.
type Words = [i32; 4];
/// Of a pair of tokens with a panel.
type Sums = [[i32; ROWS]; PAIR];

const EMPTY: Tables = [Line([0; 64]); LOOKED_UP];

/// The kernel, where the machine has what it takes, is faster with it, and there are tasks for all threads.
pub(super) fn detect(matrix: &PackedTernary, tokens: usize) -> Option<Vbmi> {
    let worth = tokens >= MANY && matrix.out_dim >= TALL && matrix.packing != Packing::I2;
    let kernel = if worth { Vbmi::detect() } else { None };
    let busy = || cut(tokens, matrix.out_dim.div_ceil(ROWS), par::threads()).is_some();
    kernel.filter(|kernel| busy() && faster(*kernel))
}

/// Whether tables beat multiply-adds on this machine, measured once, in some hundred microseconds. Both give the same integers.
fn faster(kernel: Vbmi) -> bool {
    static FASTER: OnceLock<bool> = OnceLock::new();
    *FASTER.get_or_init(|| {
        let Some(vnni) = Vnni::detect() else { return false };
        let runs = vec![EMPTY_RUN; RUNS];
        let (tables, words) = (vec![[EMPTY; PAIR]; RUNS], vec![[[1; 4]; PAIR]; RUNS]);
        let panel = vec![Line([0; 64]); RUNS * COLUMNS / 4 * LINES];
        let q = vec![1i8; TOKENS * RUNS * COLUMNS];
        let (mut sums, mut block) = ([[0; ROWS]; PAIR], [[0; ROWS]; TOKENS]);
        let time = |run: &mut dyn FnMut()| {
            let start = Instant::now();
            run();
            start.elapsed()
        };
        let times = (0..64).map(|_| {
            let ours = time(&mut || (0..TOKENS / PAIR).for_each(|_| add(kernel, &runs, &tables, &words, &mut sums)));
            let theirs = time(&mut || vnni.block(&panel, &q, RUNS * COLUMNS, &mut block));
            core::hint::black_box((&sums, &block));
            (ours, theirs)
        });
        let (ours, theirs): (Vec<_>, Vec<_>) = times.unzip();
        // The least of each: what else the machine does can only make them slower.
        ours.iter().min() < theirs.iter().min()
    })
}

/// `W₃ · q` for `q` `[tokens, in]`, finished into `out` `[tokens, out]`.
///
/// A task is some tokens with some panels, from their tables to their outputs: threads make what they read, each in its own cache, and
/// wait for nobody in between. Tables that another thread had made cost more than making them twice (docs/LOG.md).
pub(super) fn product<T: Send>(
    kernel: Vbmi,
    matrix: &PackedTernary,
    q: &[i8],
    out: &mut [T],
    finish: &Finish<impl Fn(usize, &[i32], i32, &mut [T]) + Sync>,
) {
    let (in_dim, out_dim) = (matrix.in_dim, matrix.out_dim);
    let (tokens, panels) = (q.len() / in_dim, out_dim.div_ceil(ROWS));
    let (token_parts, bands) = cut(tokens, panels, par::threads()).unwrap_or((tokens.div_ceil(CHUNK), 1));
    let (chunk, band) = (tokens.div_ceil(token_parts).next_multiple_of(PAIR), panels.div_ceil(bands));
    let mut items = Vec::new();
    for (c, (q, out)) in q.chunks(chunk * in_dim).zip(out.chunks_mut(chunk * out_dim)).enumerate() {
        let mut out = mat_mut(out, q.len() / in_dim, out_dim);
        while out.ncols() > 0 {
            let first_panel = (out_dim - out.ncols()) / ROWS;
            let columns = out.ncols().min(band * ROWS);
            let (here, right) = out.split_at(Axis(1), columns);
            items.push(Task { q, first_token: c * chunk, first_panel, out: here });
            out = right;
        }
    }
    par::for_each_init(items, Room::default, |room, task| task.run(kernel, matrix, finish, room));
}

/// Parts of tokens and of panels that make the tasks for `threads`: as few of tokens as keep all of them at work, as each unpacks the panels
/// again, then as few of panels, as each makes the tables again. `None` if some would be idle.
pub(super) fn cut(tokens: usize, panels: usize, threads: usize) -> Option<(usize, usize)> {
    // At most an eighth of the threads' time is waiting.
    let even = |tasks: usize| tasks.next_multiple_of(threads) * 7 <= tasks * 8;
    let fewest = tokens.div_ceil(CHUNK);
    let (most, bands) = ((tokens / MANY).max(fewest), (panels / BAND).max(1));
    let mut cuts = (fewest..=most).flat_map(|parts| (1..=bands).map(move |bands| (parts, bands)));
    cuts.find(|(parts, bands)| even(parts * bands))
}

/// Tokens with a band of panels.
struct Task<'a, T> {
    /// `[tokens, in]`
    q: &'a [i8],
    first_token: usize,
    first_panel: usize,
    /// `[tokens, rows of the band]`
    out: ArrayViewMut2<'a, T>,
}

/// What a task works in, kept for a thread's next.
#[derive(Default)]
struct Room {
    tables: Vec<[Tables; PAIR]>,
    words: Vec<[Words; PAIR]>,
    /// Of a panel's part, or of those of a slab: `[panels, runs]`
    runs: Vec<Run>,
    /// Of every pair with every panel: `[panels, pairs]`
    sums: Vec<MaybeUninit<Sums>>,
}

impl<T> Task<'_, T> {
    fn run(
        mut self,
        kernel: Vbmi,
        matrix: &PackedTernary,
        finish: &Finish<impl Fn(usize, &[i32], i32, &mut [T])>,
        room: &mut Room,
    ) {
        let in_dim = matrix.in_dim;
        let runs = in_dim.div_ceil(COLUMNS);
        let part = runs.div_ceil(runs.div_ceil(RUNS));
        let pairs = (self.q.len() / in_dim).div_ceil(PAIR);
        room.tables.resize(pairs * part, [EMPTY; PAIR]);
        room.words.resize(pairs * part, [[0; 4]; PAIR]);
        let slab = if matrix.packing == Packing::C5 { PANELS } else { 1 };
        room.runs.resize(slab * part, EMPTY_RUN);
        // Zeros are written where they are added to, not before: these are the most.
        let sums = pairs * self.out.ncols().div_ceil(ROWS);
        room.sums.clear();
        room.sums.reserve(sums);
        // SAFETY: there is room for so many, and they need not be initialised.
        unsafe { room.sums.set_len(sums) };
        // Σ q of the columns that are looked up, where a weight is itself and not its code.
        let mut offsets = vec![[0i32; PAIR]; pairs];
        for from in (0..runs).step_by(part) {
            let part = part.min(runs - from);
            let columns = from * COLUMNS..in_dim.min((from + part) * COLUMNS);
            let made = room.tables.chunks_mut(part).zip(room.words.chunks_mut(part)).zip(&mut offsets);
            for (q, ((tables, words), offsets)) in self.q.chunks(PAIR * in_dim).zip(made) {
                for (t, q) in q.chunks(in_dim).enumerate() {
                    offsets[t] += make_tables(kernel, &q[columns.clone()], t, tables, words);
                }
            }
            let last = from + part == runs;
            let ahead = (part * LINES).div_ceil(pairs);
            let views = self.out.axis_chunks_iter_mut(Axis(1), ROWS);
            for (panel, (sums, mut out)) in room.sums.chunks_mut(pairs).zip(views).enumerate() {
                let place = (self.first_panel + panel) % slab;
                if matrix.packing == Packing::T5 {
                    let lines = matrix.panel(RowPacking::T5, self.first_panel + panel);
                    unpack(kernel, &lines[from * LINES..(from + part) * LINES], &mut room.runs);
                } else if place == 0 || panel == 0 {
                    unpack_columns(
                        kernel,
                        matrix,
                        (self.first_panel + panel) / PANELS,
                        columns.clone(),
                        &mut room.runs[..PANELS * part],
                    );
                }
                let runs = &room.runs[place * part..][..part];
                let mut next = next_lines(matrix, self.first_panel + panel, from..from + part);
                for pair in 0..pairs {
                    for line in next.by_ref().take(ahead) {
                        prefetch_later((line as *const Line).cast());
                    }
                    // What the next pair will write: in between there is time for it to come.
                    if let Some(sums) = sums.get(pair + 1) {
                        prefetch(slice::from_ref(sums));
                    }
                    if last {
                        for t in (pair + 1) * PAIR..((pair + 2) * PAIR).min(out.nrows()) {
                            prefetch(out.row(t).to_slice().expect("rows of the output are contiguous"));
                        }
                    }
                    if from == 0 {
                        sums[pair].write([[0; ROWS]; PAIR]);
                    }
                    // SAFETY: it was written with the first part.
                    let sums = unsafe { sums[pair].assume_init_mut() };
                    let its = pair * part..(pair + 1) * part;
                    add(kernel, runs, &room.tables[its.clone()], &room.words[its], sums);
                    if !last {
                        continue;
                    }
                    for (t, sums) in (pair * PAIR..).zip(sums).take(out.nrows() - pair * PAIR) {
                        let mut out = out.row_mut(t);
                        let out = out.as_slice_mut().expect("rows of the output are contiguous");
                        let token = self.first_token + t;
                        let offset = finish.offsets[token] - offsets[t / PAIR][t % PAIR];
                        (finish.finish)(token, &sums[..out.len()], offset, out);
                    }
                }
            }
        }
    }
}

/// What is unpacked after the runs of a panel: those of the next. (The machine's own prefetcher begins anew with every panel.) C5 asks for
/// its own.
fn next_lines<'a>(matrix: &PackedTernary<'a>, panel: usize, runs: Range<usize>) -> slice::Iter<'a, Line> {
    let next = panel + 1;
    if matrix.packing == Packing::T5 && next * ROWS < matrix.out_dim {
        matrix.panel(RowPacking::T5, next)[runs.start * LINES..runs.end * LINES].iter()
    } else {
        [].iter()
    }
}

/// Makes a token's tables of the runs of `q`, the last of which may be cut short; returns the sum of what is looked up.
#[inline(always)]
fn make_tables(kernel: Vbmi, q: &[i8], t: usize, tables: &mut [[Tables; PAIR]], words: &mut [[Words; PAIR]]) -> i32 {
    /// Where entry i finds `digit(i) · q` among 16 activations, 0 and their negatives: `[c][k]`.
    static ENTRIES: [[Line; 3]; LOOKED_UP] = {
        let mut entries = [[Line([0; 64]); 3]; LOOKED_UP];
        let mut c = 0;
        while c < LOOKED_UP {
            let mut i = 0;
            while i < 32 {
                let mut k = 0;
                while k < 3 {
                    // What no weights mean is three zeros.
                    let digit = if i < 27 { i / [1, 3, 9][k] % 3 } else { 1 };
                    let column = (4 * k + c) as u8;
                    // Activations 0 to 19, then nothing to 31; their negatives from 32 on.
                    entries[c][k].0[2 * i] = [32 + column, 31, column][digit];
                    k += 1;
                }
                i += 1;
            }
            c += 1;
        }
        entries
    };

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
    fn run(q: &[i8], t: usize, tables: &mut [[Tables; PAIR]], words: &mut [[Words; PAIR]]) -> i32 {
        // Columns 3, 7, 11 and nothing, 12 to 15, 16 to 19.
        const WORDS: [i8; 16] = [3, 7, 11, 31, 12, 13, 14, 15, 16, 17, 18, 19, 31, 31, 31, 31];
        const IS_LOOKED_UP: [i8; 16] = [1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0];
        // SAFETY: arrays of 16 bytes.
        let (places, looked_up) =
            unsafe { (_mm_loadu_si128(WORDS.as_ptr().cast()), _mm_loadu_si128(IS_LOOKED_UP.as_ptr().cast())) };
        let (places, mut sum) = (_mm256_castsi128_si256(places), _mm_setzero_si128());
        for ((q, tables), words) in q.chunks(COLUMNS).zip(tables).zip(words) {
            // SAFETY: the mask has as many bits as there are activations.
            let q = unsafe { _mm256_maskz_loadu_epi8((1u32 << q.len()) - 1, q.as_ptr()) };
            sum = _mm_dpbusd_epi32(sum, looked_up, _mm256_castsi256_si128(q));
            // SAFETY: four int32.
            unsafe {
                let found = _mm256_castsi256_si128(_mm256_permutexvar_epi8(places, q));
                _mm_storeu_si128(words[t].as_mut_ptr().cast(), found);
            }
            let wide = _mm512_cvtepi8_epi16(q);
            let negative = _mm512_sub_epi16(_mm512_setzero_si512(), wide);
            let part = |entries: &Line| _mm512_permutex2var_epi16(wide, load(entries), negative);
            for (table, [a, b, c]) in tables[t].iter_mut().zip(&ENTRIES) {
                store(table, _mm512_add_epi16(_mm512_add_epi16(part(a), part(b)), part(c)));
            }
        }
        let sum = _mm_add_epi32(sum, _mm_shuffle_epi32::<0b01_00_11_10>(sum));
        _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32::<0b10_11_00_01>(sum)))
    }
    let _ = kernel;
    // SAFETY: a `Vbmi` exists only where the features were detected.
    unsafe { run(q, t, tables, words) }
}

/// What of a panel all tokens meet.
#[inline(always)]
fn unpack(kernel: Vbmi, lines: &[Line], runs: &mut [Run]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
    fn run(lines: &[Line], runs: &mut [Run]) {
        let ([upper, .., t4], low_bits, lower) = (tables(), load(&LOW_BITS), load(&LOWER));
        for (lines, run) in lines.as_chunks::<LINES>().0.iter().zip(runs) {
            let mut indices = [_mm512_setzero_si512(); LINES];
            for (j, line) in lines.iter().enumerate() {
                let [found, index, bits] = indices_vbmi(load(line), upper);
                store(&mut run.codes[1][j], _mm512_and_si512(found, _mm512_set1_epi8(3)));
                store(&mut run.codes[2][j], _mm512_permutexvar_epi8(bits, t4));
                // The last byte of every row: its trits become bytes.
                let row = _mm512_srli_epi32::<24>(_mm512_permutexvar_epi8(index, lower));
                let [a, b, c] = apart(row);
                let bytes = _mm512_ternarylogic_epi32::<0xfe>(a, _mm512_slli_epi32::<6>(b), _mm512_slli_epi32::<12>(c));
                store(&mut run.codes[0][j], bytes);
                indices[j] = row_indices(_mm512_permutexvar_epi8(index, low_bits));
            }
            store_indices(indices, run);
        }
    }
    let _ = kernel;
    // SAFETY: a `Vbmi` exists only where the features were detected.
    unsafe { run(lines, runs) }
}

/// Of 16 rows with a byte a column: `c0 + 32 c1 + 1024 c2`, an int32 each.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn row_indices(bytes: __m512i) -> __m512i {
    // c0 + 32 c1, and c2; then the whole.
    let pairs = _mm512_maddubs_epi16(bytes, _mm512_set1_epi32(0x00_01_20_01));
    _mm512_madd_epi16(pairs, _mm512_set1_epi32(1 | 1024 << 16))
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
fn store_indices(indices: [__m512i; LINES], run: &mut Run) {
    for (h, to) in run.indices.iter_mut().enumerate() {
        store(to, _mm512_or_si512(indices[2 * h], _mm512_slli_epi32::<16>(indices[2 * h + 1])));
    }
}

/// [`unpack`] of some columns in the five panels of a slab of C5: `runs` `[PANELS][runs]`.
///
/// # Panics
/// When the columns lie outside of the matrix or are more than the runs.
#[inline(always)]
fn unpack_columns(kernel: Vbmi, matrix: &PackedTernary, slab: usize, columns: Range<usize>, runs: &mut [Run]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
    fn run(lines: &[Line], per: usize, slab: usize, columns: Range<usize>, runs: &mut [Run]) {
        let tables = tables();
        let part = runs.len() / PANELS;
        let last = columns.end - 1;
        for (r, first) in columns.step_by(COLUMNS).enumerate() {
            // What will be read two runs later.
            for column in first + 2 * COLUMNS..first + 3 * COLUMNS {
                prefetch_later(lines.as_ptr().wrapping_add(column * per + slab).cast());
            }
            let mut packed = [[_mm512_setzero_si512(); LINES]; COLUMNS / QUAD];
            for (g, packed) in packed.iter_mut().enumerate() {
                let quad: Quad = [0, 1, 2, 3].map(|c| (first + g * QUAD + c).min(last) as u32);
                *packed = packed_lines(lines, per, slab, &quad);
            }
            let mut indices = [[_mm512_setzero_si512(); LINES]; PANELS];
            for j in 0..LINES {
                let mut trits = [[_mm512_setzero_si512(); PANELS]; COLUMNS / QUAD];
                for (packed, trits) in packed.iter().zip(&mut trits) {
                    *trits = trits_vbmi(packed[j], &tables);
                }
                for k in 0..PANELS {
                    let [a, b, c, d, e] = trits.map(|trits| trits[k]);
                    let codes = &mut runs[k * part + r].codes;
                    store(&mut codes[1][j], d);
                    store(&mut codes[2][j], e);
                    // The last byte of every row.
                    let (a3, b3, c3) =
                        (_mm512_srli_epi32::<24>(a), _mm512_srli_epi32::<24>(b), _mm512_srli_epi32::<24>(c));
                    let bytes =
                        _mm512_ternarylogic_epi32::<0xfe>(a3, _mm512_slli_epi32::<8>(b3), _mm512_slli_epi32::<16>(c3));
                    store(&mut codes[0][j], bytes);
                    // a + 3 (b + 3 c)
                    let upper = _mm512_add_epi8(b, _mm512_add_epi8(c, _mm512_add_epi8(c, c)));
                    let low = _mm512_add_epi8(a, _mm512_add_epi8(upper, _mm512_add_epi8(upper, upper)));
                    indices[k][j] = row_indices(low);
                }
            }
            for k in 0..PANELS {
                store_indices(indices[k], &mut runs[k * part + r]);
            }
        }
    }
    let per = column_lines(matrix.out_dim);
    let _ = kernel;
    // SAFETY: a `Vbmi` exists only where the features were detected.
    unsafe { run(matrix.lines, per, slab, columns, runs) }
}

/// Adds the products of a panel's part with a pair of tokens.
///
/// # Panics
/// When there are more runs than an int16 has room for.
#[inline(always)]
fn add(kernel: Vbmi, runs: &[Run], tables: &[[Tables; PAIR]], words: &[[Words; PAIR]], sums: &mut Sums) {
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx512vbmi")]
    fn run(runs: &[Run], tables: &[[Tables; PAIR]], words: &[[Words; PAIR]], sums: &mut Sums) {
        let mut looked_up = [[_mm512_setzero_si512(); 2]; PAIR];
        let mut acc = [[_mm512_setzero_si512(); LINES]; PAIR];
        for t in 0..PAIR {
            for j in 0..LINES {
                // SAFETY: 16 of 64 int32.
                acc[t][j] = unsafe { _mm512_loadu_si512(sums[t].as_ptr().add(16 * j).cast()) };
            }
        }
        for ((run, tables), words) in runs.iter().zip(tables).zip(words) {
            let mut indices = [load(&run.indices[0]), load(&run.indices[1])];
            for g in 0..3 {
                let table = [load(&tables[0][g]), load(&tables[1][g])];
                // Two multiply-adds, a look-up and an addition, again and again: the order that fills the units best (docs/LOG.md).
                for j in 0..LINES {
                    let codes = load(&run.codes[g][j]);
                    for t in 0..PAIR {
                        acc[t][j] = add_vnni(acc[t][j], codes, _mm512_set1_epi32(words[t][g]));
                    }
                    let (t, h) = (j % 2, j / 2);
                    let found = _mm512_permutexvar_epi16(indices[h], table[t]);
                    looked_up[t][h] = _mm512_add_epi16(looked_up[t][h], found);
                }
                for h in 0..2 {
                    indices[h] = _mm512_srli_epi16::<5>(indices[h]);
                }
            }
        }
        for t in 0..PAIR {
            for j in 0..LINES {
                // One of the two in every 32 bits, as an int32.
                let half = _mm512_set1_epi32(if j % 2 == 0 { 1 } else { 1 << 16 });
                let sum = _mm512_dpwssd_epi32(acc[t][j], looked_up[t][j / 2], half);
                // SAFETY: 16 of 64 int32.
                unsafe { _mm512_storeu_si512(sums[t].as_mut_ptr().add(16 * j).cast(), sum) };
            }
        }
    }
    const { assert!(3 * 384 * RUNS <= i16::MAX as usize) };
    assert!(runs.len() <= RUNS, "{} runs", runs.len());
    let _ = kernel;
    // SAFETY: a `Vbmi` exists only where the features were detected.
    unsafe { run(runs, tables, words, sums) }
}
