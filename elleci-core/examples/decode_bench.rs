//! temp
use elleci_core::archive::*;
use elleci_core::config::ModelConfig;
use elleci_core::inference::*;
use elleci_core::ternary::packed::Packing;
use std::time::Instant;
fn rss() -> f64 {
    std::fs::read_to_string("/proc/self/status")
        .unwrap()
        .lines()
        .find(|l| l.starts_with("VmRSS"))
        .unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<f64>()
        .unwrap()
        / 1024.0
}
fn main() {
    let threads: usize = std::env::args().nth(1).map_or(2, |a| a.parse().unwrap());
    let packing = if std::env::args().nth(2).as_deref() == Some("i2") { Packing::I2 } else { Packing::T5 };
    let path = format!("/work/tmp/random-{}.elleci", packing.name());
    if !std::path::Path::new(&path).exists() {
        let c = ModelConfig::preset("elleci-1.5b").unwrap();
        let mut w = ArchiveWriter::new(&c, None, PackOptions { packing, dense: DenseFormat::Int8 }).unwrap();
        let mut file = AlignedBytes::zeroed(w.header_bytes());
        let mut s = 1u64;
        while let Some(p) = w.next() {
            let n = p.len();
            let norm = matches!(p.kind, elleci_core::params::ParamKind::Norm);
            let v: Vec<f32> = (0..n)
                .map(|_| {
                    s = s.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    if norm { 1.0 } else { ((s >> 40) as f32 / (1 << 23) as f32 - 1.0) * 0.03 }
                })
                .collect();
            file.extend_from_slice(&w.pack(&v));
        }
        let h = w.finish();
        file.as_mut_slice()[..h.len()].copy_from_slice(&h);
        std::fs::write(&path, file.as_ref()).unwrap();
    }
    let f = std::fs::read(&path).unwrap();
    let bytes = AlignedBytes::from(&f[..]);
    drop(f);
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let t = Instant::now();
        let a = Archive::open(bytes).unwrap();
        println!("open {:.1} ms", t.elapsed().as_secs_f64() * 1e3);
        let m = a.model();
        let mut s = Session::new(m).unwrap();
        let t = Instant::now();
        s.extend(m, &[5]).unwrap();
        println!("first {:.1} ms", t.elapsed().as_secs_f64() * 1e3);
        let mut best = f64::MAX;
        let n = if std::env::args().nth(3).is_some() { 100 } else { 24 };
        for _ in 0..3 {
            let t = Instant::now();
            for i in 0..n {
                s.extend(m, &[i * 3 + 1]).unwrap();
            }
            best = best.min(t.elapsed().as_secs_f64() / n as f64);
        }
        println!("decode {:.1} ms, {:.1} tok/s; rss {:.0}", best * 1e3, 1.0 / best, rss());
        if std::env::args().nth(3).is_some() {
            return;
        }
        let toks: Vec<u32> = (0..256).map(|i| i * 17 + 3).collect();
        let mut best = f64::MAX;
        for _ in 0..2 {
            let mut s = Session::new(m).unwrap();
            let t = Instant::now();
            s.extend(m, &toks).unwrap();
            best = best.min(t.elapsed().as_secs_f64());
        }
        println!("prefill 256: {:.2} s, {:.1} tok/s; rss {:.0}", best, 256.0 / best, rss());
    });
}
