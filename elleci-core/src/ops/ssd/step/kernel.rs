//! The steps of some channels.
//!
//! The state is kept in tiles of [`TILE`] channels, and some vectors of a tile take all steps before the next: the sums of a block's outputs
//! stay in registers, and the tile in the first-level cache. A single step goes through the tiles in the order of memory.

use alloc::vec;
use alloc::vec::Vec;
use core::array::from_fn;
use core::ops::Range;

use pulp::{Simd, WithSimd};

use super::{BLOCK, ScanState};
use crate::simd::{prefetch_later, prefetch_run};

/// Channels whose state is together: of a hundred rows as many bytes as the first-level cache has room for beside the rest.
const TILE: usize = 32;

/// Values of a state that no cache keeps until the next step, as other layers have theirs: what a single step reads is asked for ahead. Of a
/// small model, whose states stay in the second level, that costs 4 % of the throughput.
pub const FAR: usize = 1 << 18;

/// The steps of some channels.
pub struct Steps<'a> {
    /// `[d_state, TILE]` after `[d_state, TILE]`, the last with the channels that are left
    pub state: ScanState<'a>,
    /// What is left of the state, and of dt x of the block's steps: `[channels]` each
    pub left: Vec<&'a mut [f32]>,
    pub run: Run<'a>,
}

/// What they take and give.
pub struct Run<'a> {
    /// Whether the state comes from memory
    pub is_far: bool,
    /// Steps that the first block has before these
    pub begin: usize,
    /// `[steps, channels]`: of each step alone
    pub decay: &'a [f32],
    pub u: &'a [f32],
    /// `[d_state]` each
    pub bs: &'a [&'a [f32]],
    pub cs: &'a [&'a [f32]],
    pub products: &'a [f32],
    /// `[steps, channels]`: d x, to which the rest is added
    pub y: &'a mut [f32],
}

impl WithSimd for Steps<'_> {
    type Output = ();
    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let (len, d_state) = (self.run.cs.len(), self.run.cs[0].len());
        let channels = self.run.y.len() / len;
        let tiles =
            (0..channels).step_by(TILE).map(|first| Tile { channels, first, width: TILE.min(channels - first) });
        if len == 1 {
            self.step::<S>(simd);
            for tile in tiles.clone() {
                match S::F32_LANES {
                    16 => self.single::<S, 2>(simd, tile),
                    _ => self.single::<S, 4>(simd, tile),
                }
            }
        } else {
            // Where a state goes on that stays as it is.
            let passes = matches!(self.state, ScanState::Passed(_)) && self.run.begin + len > BLOCK;
            let mut spare = vec![0.0; if passes { d_state * TILE.min(channels) } else { 0 }];
            for tile in tiles.clone() {
                self.all::<S>(simd, tile, &mut spare);
            }
        }
        for tile in tiles {
            for i in tile.width / S::F32_LANES * S::F32_LANES..tile.width {
                self.channel(tile, i);
            }
        }
    }
}

/// Channels whose state is together.
#[derive(Clone, Copy)]
struct Tile {
    /// All there are
    channels: usize,
    first: usize,
    width: usize,
}

impl Tile {
    /// Its part of a row of all channels.
    #[inline(always)]
    fn of(self, rows: &[f32], row: usize) -> &[f32] {
        &rows[row * self.channels + self.first..][..self.width]
    }

    #[inline(always)]
    fn of_mut(self, rows: &mut [f32], row: usize) -> &mut [f32] {
        &mut rows[row * self.channels + self.first..][..self.width]
    }

    /// Its part of the state.
    #[inline(always)]
    fn state(self, d_state: usize) -> Range<usize> {
        self.first * d_state..(self.first + self.width) * d_state
    }
}

impl Steps<'_> {
    /// Of a single step: what is left after it, and what steps of the block add to the outputs.
    #[inline(always)]
    fn step<S: Simd>(&mut self, simd: S) {
        let (place, products) = (self.run.begin, self.run.products);
        let (decay, u) = (S::as_simd_f32s(self.run.decay).0, S::as_simd_f32s(self.run.u).0);
        for (v, y) in S::as_mut_simd_f32s(self.run.y).0.iter_mut().enumerate() {
            let (decay, p) = (decay[v], &mut S::as_mut_simd_f32s(self.left[0]).0[v]);
            *p = if place == 0 { decay } else { simd.mul_f32s(*p, decay) };
            for (product, row) in products[..place].iter().zip(&mut self.left[1..]) {
                let left = &mut S::as_mut_simd_f32s(row).0[v];
                *left = simd.mul_f32s(*left, decay);
                *y = simd.mul_add_e_f32s(simd.splat_f32s(*product), *left, *y);
            }
            S::as_mut_simd_f32s(self.left[1 + place]).0[v] = u[v];
            *y = simd.mul_add_e_f32s(simd.splat_f32s(products[place]), u[v], *y);
        }
    }

    /// Of a single step: what the state of a tile adds to the outputs, and the end of the block.
    #[inline(always)]
    fn single<S: Simd, const J: usize>(&mut self, simd: S, tile: Tile) {
        let vectors = tile.width / S::F32_LANES;
        let together = vectors / J * J;
        for v in (0..together).step_by(J) {
            self.add_state::<S, J>(simd, tile, v);
        }
        for v in together..vectors {
            self.add_state::<S, 1>(simd, tile, v);
        }
        if self.run.begin + 1 == BLOCK
            && let ScanState::Kept(state) = &mut self.state
        {
            let state = &mut state[tile.state(self.run.cs[0].len())];
            for v in 0..vectors {
                let mut left =
                    Left { p: pick::<S, 1>(tile.of(self.left[0], 0), v), u: [[simd.splat_f32s(0.0)]; BLOCK] };
                for k in 0..BLOCK {
                    left.u[k] = pick::<S, 1>(tile.of(self.left[1 + k], 0), v);
                }
                self.run.update(simd, At { place: self.run.begin, first: 0, tile, v }, state, &left);
            }
        }
    }

    /// Of a single step: `y += p (S C)`.
    #[inline(always)]
    fn add_state<S: Simd, const J: usize>(&mut self, simd: S, tile: Tile, v: usize) {
        let state = &self.state.values()[tile.state(self.run.cs[0].len())];
        let [sums] = self.run.sums::<S, 1, J>(simd, At { place: self.run.begin, first: 0, tile, v }, state);
        let p = some::<S>(tile.of(self.left[0], 0), v, J);
        let y = some_mut::<S>(tile.of_mut(self.run.y, 0), v, J);
        for j in 0..J {
            y[j] = simd.mul_add_e_f32s(p[j], sums[j], y[j]);
        }
    }

    /// All steps of a tile.
    #[inline(always)]
    fn all<S: Simd>(&mut self, simd: S, tile: Tile, spare: &mut [f32]) {
        let vectors = tile.width / S::F32_LANES;
        let together = vectors / 2 * 2;
        for v in (0..together).step_by(2) {
            self.vectors::<S, 2>(simd, tile, v, spare);
        }
        for v in together..vectors {
            self.vectors::<S, 1>(simd, tile, v, spare);
        }
    }

    /// All steps of `J` vectors of a tile.
    #[inline(always)]
    fn vectors<S: Simd, const J: usize>(&mut self, simd: S, tile: Tile, v: usize, spare: &mut [f32]) {
        let d_state = self.run.cs[0].len();
        let run = &mut self.run;
        let (len, begin) = (run.cs.len(), run.begin);
        let own = tile.state(d_state);
        let mut state = match &mut self.state {
            ScanState::Kept(state) => ScanState::Kept(&mut state[own]),
            ScanState::Passed(state) if spare.is_empty() => ScanState::Passed(&state[own]),
            ScanState::Passed(state) => {
                let rows = state[own].chunks_exact(tile.width).zip(spare.chunks_exact_mut(tile.width));
                for (from, to) in rows {
                    some_mut::<S>(to, v, J).copy_from_slice(some::<S>(from, v, J));
                }
                ScanState::Kept(spare)
            }
        };
        let mut left = Left { p: [simd.splat_f32s(0.0); J], u: [[simd.splat_f32s(0.0); J]; BLOCK] };
        let mut first = 0;
        if begin > 0 {
            left.p = pick::<S, J>(tile.of(self.left[0], 0), v);
            for (u, row) in left.u.iter_mut().zip(&self.left[1..=begin]) {
                *u = pick::<S, J>(tile.of(row, 0), v);
            }
            first = len.min(BLOCK - begin);
            run.part(simd, At { place: begin, first: 0, tile, v }, first, &mut state, &mut left);
        }
        while first + BLOCK <= len {
            run.block::<S, J>(simd, At { place: 0, first, tile, v }, &mut state);
            first += BLOCK;
        }
        if first < len {
            run.part(simd, At { place: 0, first, tile, v }, len - first, &mut state, &mut left);
        }
        let end = (begin + len) % BLOCK;
        if end > 0 {
            some_mut::<S>(tile.of_mut(self.left[0], 0), v, J).copy_from_slice(&left.p);
            for (u, row) in left.u.iter().zip(&mut self.left[1..=end]) {
                some_mut::<S>(tile.of_mut(row, 0), v, J).copy_from_slice(u);
            }
        }
    }

    /// All steps of a channel that is in no whole vector.
    fn channel(&mut self, tile: Tile, i: usize) {
        let Run { begin, decay, u, bs, cs, products, y, .. } = &mut self.run;
        let (d_state, place_of) = (cs[0].len(), |t: usize| (*begin + t) % BLOCK);
        let (own, at) = (tile.state(d_state), tile.first + i);
        let column = self.state.values()[own.clone()].iter().skip(i).step_by(tile.width);
        let mut column: Vec<f32> = column.copied().collect();
        let (mut p, mut left) = (self.left[0][at], [0.0; BLOCK]);
        for (left, row) in left.iter_mut().zip(&self.left[1..]) {
            *left = row[at];
        }
        for (t, c) in cs.iter().enumerate() {
            let place = place_of(t);
            let decay = tile.of(decay, t)[i];
            p = if place == 0 { decay } else { p * decay };
            left[..place].iter_mut().for_each(|left| *left *= decay);
            left[place] = tile.of(u, t)[i];
            let sum = c.iter().zip(&column).fold(0.0, |sum, (c, s)| sum + c * s);
            let y = &mut tile.of_mut(y, t)[i];
            for (product, left) in products[t * BLOCK..].iter().zip(&left[..=place]) {
                *y += product * left;
            }
            *y += p * sum;
            if place + 1 == BLOCK {
                for (n, s) in column.iter_mut().enumerate() {
                    *s *= p;
                    for (b, left) in bs[*begin + t - place..].iter().zip(&left) {
                        *s += b[n] * left;
                    }
                }
            }
        }
        if let ScanState::Kept(state) = &mut self.state {
            state[own].iter_mut().skip(i).step_by(tile.width).zip(column).for_each(|(to, s)| *to = s);
        }
        self.left[0][at] = p;
        for (left, row) in left.iter().zip(&mut self.left[1..]) {
            row[at] = *left;
        }
    }
}

/// Where steps are.
#[derive(Clone, Copy)]
struct At {
    /// Of the first in its block
    place: usize,
    first: usize,
    tile: Tile,
    /// First vector in the tile
    v: usize,
}

impl Run<'_> {
    /// `len` steps that are not all of a block. They are so few that what is left of them may be in memory.
    #[inline(always)]
    fn part<S: Simd, const J: usize>(
        &mut self,
        simd: S,
        at: At,
        len: usize,
        state: &mut ScanState<'_>,
        left: &mut Left<S, J>,
    ) {
        let mut done = 0;
        while done < len {
            let at = At { place: at.place + done, first: at.first + done, ..at };
            done += match len - done {
                4.. => self.steps::<S, 4, J>(simd, at, state, left),
                2.. => self.steps::<S, 2, J>(simd, at, state, left),
                _ => self.steps::<S, 1, J>(simd, at, state, left),
            };
        }
        if at.place + len == BLOCK
            && let ScanState::Kept(state) = state
        {
            self.update(simd, at, state, left);
        }
    }

    /// `T` steps of a part. Returns `T`.
    #[inline(always)]
    fn steps<S: Simd, const T: usize, const J: usize>(
        &mut self,
        simd: S,
        at: At,
        state: &ScanState<'_>,
        left: &mut Left<S, J>,
    ) -> usize {
        let sums = self.sums::<S, T, J>(simd, at, state.values());
        for (t, sums) in sums.iter().enumerate() {
            self.step(simd, At { place: at.place + t, first: at.first + t, ..at }, sums, left);
        }
        T
    }

    /// All steps of a block. Two vectors of eight sums, or of what is left of eight dt x, are half of the registers of AVX-512 and NEON.
    #[inline(always)]
    fn block<S: Simd, const J: usize>(&mut self, simd: S, at: At, state: &mut ScanState<'_>) {
        let mut sums = [[simd.splat_f32s(0.0); J]; BLOCK];
        if S::F32_LANES == 8 {
            // Of the sixteen registers of AVX2 the sums may take half.
            let (first, last) = sums.split_at_mut(BLOCK / 2);
            first.copy_from_slice(&self.sums::<S, { BLOCK / 2 }, J>(simd, at, state.values()));
            let at = At { first: at.first + BLOCK / 2, ..at };
            last.copy_from_slice(&self.sums::<S, { BLOCK / 2 }, J>(simd, at, state.values()));
        } else {
            sums = self.sums::<S, BLOCK, J>(simd, at, state.values());
        }
        let mut left = Left { p: [simd.splat_f32s(0.0); J], u: [[simd.splat_f32s(0.0); J]; BLOCK] };
        let of = |place| At { place, first: at.first + place, ..at };
        // One by one: what is left of each stays in registers if the compiler knows the places.
        self.step(simd, of(0), &sums[0], &mut left);
        self.step(simd, of(1), &sums[1], &mut left);
        self.step(simd, of(2), &sums[2], &mut left);
        self.step(simd, of(3), &sums[3], &mut left);
        self.step(simd, of(4), &sums[4], &mut left);
        self.step(simd, of(5), &sums[5], &mut left);
        self.step(simd, of(6), &sums[6], &mut left);
        self.step(simd, of(7), &sums[7], &mut left);
        if let ScanState::Kept(state) = state {
            self.update(simd, at, state, &left);
        }
    }

    /// `S C` of `T` steps.
    #[inline(always)]
    fn sums<S: Simd, const T: usize, const J: usize>(&self, simd: S, at: At, state: &[f32]) -> [[S::f32s; J]; T] {
        let d_state = self.cs[0].len();
        let mut c: [&[f32]; T] = [&[]; T];
        for t in 0..T {
            c[t] = &self.cs[at.first + t][..d_state];
        }
        let mut sums = [[simd.splat_f32s(0.0); J]; T];
        for (n, row) in (0..d_state).zip(state.chunks_exact(at.tile.width)) {
            let row = some::<S>(row, at.v, J);
            if T == 1 && self.is_far {
                for line in 0..(J * size_of::<S::f32s>()).div_ceil(64) {
                    prefetch_run(row.as_ptr().cast::<u8>().wrapping_add(64 * line));
                }
            }
            for t in 0..T {
                let c = simd.splat_f32s(c[t][n]);
                for j in 0..J {
                    sums[t][j] = simd.mul_add_e_f32s(c, row[j], sums[t][j]);
                }
            }
        }
        sums
    }

    /// A step, of which `sums` is `S C`.
    #[inline(always)]
    fn step<S: Simd, const J: usize>(&mut self, simd: S, at: At, sums: &[S::f32s; J], left: &mut Left<S, J>) {
        let (place, decay) = (at.place, pick::<S, J>(at.tile.of(self.decay, at.first), at.v));
        for j in 0..J {
            left.p[j] = if place == 0 { decay[j] } else { simd.mul_f32s(left.p[j], decay[j]) };
            for k in 0..place {
                left.u[k][j] = simd.mul_f32s(left.u[k][j], decay[j]);
            }
        }
        left.u[place] = pick::<S, J>(at.tile.of(self.u, at.first), at.v);
        let products = &self.products[at.first * BLOCK..][..BLOCK];
        let y = some_mut::<S>(at.tile.of_mut(self.y, at.first), at.v, J);
        for j in 0..J {
            let mut out = y[j];
            for k in 0..=place {
                out = simd.mul_add_e_f32s(simd.splat_f32s(products[k]), left.u[k][j], out);
            }
            y[j] = simd.mul_add_e_f32s(left.p[j], sums[j], out);
        }
    }

    /// The block that `at` is in is over: the state takes it in.
    #[inline(always)]
    fn update<S: Simd, const J: usize>(&self, simd: S, at: At, state: &mut [f32], left: &Left<S, J>) {
        if S::F32_LANES != 8 {
            return self.update_all(simd, at, state, left.p, left.u);
        }
        // See `block`.
        for j in 0..J {
            let mut u = [[simd.splat_f32s(0.0)]; BLOCK];
            for k in 0..BLOCK {
                u[k] = [left.u[k][j]];
            }
            self.update_all(simd, At { v: at.v + j, ..at }, state, [left.p[j]], u);
        }
    }

    #[inline(always)]
    fn update_all<S: Simd, const J: usize>(
        &self,
        simd: S,
        at: At,
        state: &mut [f32],
        p: [S::f32s; J],
        u: [[S::f32s; J]; BLOCK],
    ) {
        let (begin, d_state) = (self.begin + at.first - at.place, self.cs[0].len());
        let mut b: [&[f32]; BLOCK] = [&[]; BLOCK];
        for k in 0..BLOCK {
            b[k] = &self.bs[begin + k][..d_state];
        }
        for (n, row) in (0..d_state).zip(state.chunks_exact_mut(at.tile.width)) {
            let row = some_mut::<S>(row, at.v, J);
            if self.is_far {
                prefetch_later(row.as_ptr().cast::<u8>().wrapping_add(4 * d_state * at.tile.width));
            }
            let mut s = [simd.splat_f32s(0.0); J];
            for j in 0..J {
                s[j] = simd.mul_f32s(p[j], row[j]);
            }
            for k in 0..BLOCK {
                let b = simd.splat_f32s(b[k][n]);
                for j in 0..J {
                    s[j] = simd.mul_add_e_f32s(b, u[k][j], s[j]);
                }
            }
            row.copy_from_slice(&s);
        }
    }
}

/// What is left in some vectors of channels, of the state and of a block's steps.
struct Left<S: Simd, const J: usize> {
    p: [S::f32s; J],
    u: [[S::f32s; J]; BLOCK],
}

/// `n` vectors of a row.
#[inline(always)]
fn some<S: Simd>(row: &[f32], v: usize, n: usize) -> &[S::f32s] {
    &S::as_simd_f32s(row).0[v..v + n]
}

/// See [`some`].
#[inline(always)]
fn some_mut<S: Simd>(row: &mut [f32], v: usize, n: usize) -> &mut [S::f32s] {
    &mut S::as_mut_simd_f32s(row).0[v..v + n]
}

/// The same as values.
#[inline(always)]
fn pick<S: Simd, const J: usize>(row: &[f32], v: usize) -> [S::f32s; J] {
    let row = some::<S>(row, v, J);
    from_fn(
        #[inline(always)]
        |j| row[j],
    )
}
