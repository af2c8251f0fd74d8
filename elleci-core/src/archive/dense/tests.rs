//! Formats keep what they promise, and products are what the definition says, however many tokens there are.

use super::*;

#[test]
fn every_finite_half_has_its_value() {
    for bits in 0..=u16::MAX {
        let want = f16::from_bits(bits);
        if want.is_finite() {
            assert_eq!(f16_value(bits).to_bits(), want.to_f32().to_bits(), "{bits:#x}");
        }
    }
}

#[test]
fn what_is_too_large_for_binary16_stays_finite() {
    let mut bytes = [0; ALIGNMENT];
    DenseFormat::F16.encode(&[1e6, -1e6, 65504.0, 1.0], 4, &mut bytes);
    let read: Vec<f32> = bytes[..8].chunks(2).map(|b| f16_value(u16::from_le_bytes([b[0], b[1]]))).collect();
    assert_eq!(read, [65504.0, -65504.0, 65504.0, 1.0]);
}

/// Values above the largest bf16 are halfway to the next at most, and would round to infinity.
#[test]
fn what_is_too_large_for_bf16_stays_finite() {
    let mut bytes = [0; ALIGNMENT];
    DenseFormat::Bf16.encode(&[f32::MAX, f32::MIN, 3.4e38, 1.0], 4, &mut bytes);
    let read: Vec<f32> = bytes[..8].chunks(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
    assert_eq!(read, [bf16::MAX.to_f32(), bf16::MIN.to_f32(), bf16::MAX.to_f32(), 1.0]);
}

#[test]
fn what_is_largest_stays_finite_in_int8() {
    let mut bytes = super::super::AlignedBytes::zeroed(DenseFormat::Int8.bytes(2, 2).unwrap());
    DenseFormat::Int8.encode(&[f32::MAX, 0.0, 3.4e38, f32::MIN], 2, bytes.as_mut_slice());
    let matrix = DenseMatrix::new(DenseFormat::Int8, 2, 2, bytes.as_ref());
    let mut row = [0.0; 2];
    for (r, want) in [[f32::MAX, 0.0], [f32::MAX, f32::MIN]].iter().enumerate() {
        matrix.row(r, &mut row);
        // A scale one unit in the last place lower: 2^-23 of it, and half a code.
        assert!(row.iter().zip(want).all(|(a, b)| (a - b).abs() <= f32::MAX / 254.0), "{row:?}");
    }
}

#[test]
fn products_in_every_format() {
    // Several strips of columns for several groups of rows; few tokens and many, in groups that are whole and that are not; vectors
    // and cache lines of columns, with and without a rest.
    const TOKENS: usize = 20;
    let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
    let shapes = [
        (1, 1),
        (9, 1),
        (7, 15),
        (8, 16),
        (6, 17),
        (13, 37),
        (5, 63),
        (4, 64),
        (11, 65),
        (300, 100),
        (10, 257),
        (13, 530),
    ];
    for (rows, cols) in shapes {
        let value = |i: usize| ((i * 37 % 101) as f32 - 50.0) / 50.0;
        let w: Vec<f32> = (0..rows * cols).map(value).collect();
        for format in DenseFormat::ALL {
            let mut bytes = super::super::AlignedBytes::zeroed(format.bytes(rows, cols).unwrap());
            format.encode(&w, cols, bytes.as_mut_slice());
            let matrix = DenseMatrix::new(format, rows, cols, bytes.as_ref());
            let mut read = vec![0.0; cols];
            // Half a unit in the last place of |w| <= 1: 2^-12 for binary16, 2^-9 for bf16, half of amax/127 for int8,
            // with the roundings of the two multiplications on top.
            let bound = match format {
                DenseFormat::F32 => 0.0,
                DenseFormat::F16 => 1.0 / 4096.0,
                DenseFormat::Bf16 => 1.0 / 512.0,
                DenseFormat::Int8 => 0.5 / 127.0 * (1.0 + 1e-5),
            };
            for (r, row) in w.chunks(cols).enumerate() {
                matrix.row(r, &mut read);
                assert!(read.iter().zip(row).all(|(a, b)| (a - b).abs() <= bound), "{format:?}");
            }
            let x: Vec<f32> = (0..TOKENS * cols).map(|i| value(i * 7 + 3)).collect();
            let (mut y, mut alone) = (vec![0.0; TOKENS * rows], vec![0.0; rows]);
            matrix.forward(&x, TOKENS, &mut y);
            for tokens in 2..TOKENS {
                let mut fewer = vec![0.0; tokens * rows];
                matrix.forward(&x[..tokens * cols], tokens, &mut fewer);
                assert_eq!(bits(&fewer), bits(&y[..fewer.len()]), "nor on how many they are");
            }
            // Nor on how weights are stored, as long as they are floats: the additions are those of the same weights as float32.
            if format != DenseFormat::Int8 {
                let mut floats = vec![0.0; rows * cols];
                floats.chunks_exact_mut(cols).enumerate().for_each(|(r, row)| matrix.expand(r, row));
                let mut want = vec![0.0; TOKENS * rows];
                DenseMatrix { rows, cols, values: Values::F32(&floats) }.forward(&x, TOKENS, &mut want);
                assert_eq!(bits(&want), bits(&y), "{format:?} {rows} {cols}");
            }
            for t in 0..TOKENS {
                let x = &x[t * cols..(t + 1) * cols];
                matrix.forward(x, 1, &mut alone);
                assert_eq!(
                    bits(&y[t * rows..(t + 1) * rows]),
                    bits(&alone),
                    "a token's bits do not depend on its company"
                );
                for r in 0..rows {
                    matrix.row(r, &mut read);
                    let want: f64 = read.iter().zip(x).map(|(w, x)| *w as f64 * *x as f64).sum();
                    // cols products of at most 1, each addition off by 2^-24 of a sum of at most cols. For int8 three roundings of
                    // such a sum, two of each activation, and half a step of it, the largest of which is 1.
                    let rounded = if format == DenseFormat::Int8 { cols as f64 * 0.5 / 32_767.0 } else { 0.0 };
                    let bound = ((cols + 2) * cols) as f64 * 2f64.powi(-24) + rounded;
                    assert!((alone[r] as f64 - want).abs() <= bound, "{format:?} {rows} {cols}");
                }
            }
        }
    }
}
