//! What machine a run used, for its page.

use std::fs;

use super::format::si;
use super::peak::Peak;

/// (What, value): the processor, its threads, memory, operating system, kernels and measured peak. What the system does not tell is left
/// out.
pub fn facts(peak: &Peak) -> Vec<(String, String)> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let available = std::thread::available_parallelism().map_or(0, |n| n.get());
    let mut out = Vec::new();
    let mut add = |what: &str, value: String| out.push((what.to_string(), value));
    if let Some(model) = field(&cpuinfo, "model name") {
        add("processor", model.split_whitespace().collect::<Vec<_>>().join(" "));
    }
    add("threads", format!("{} of {available}", peak.threads));
    if let Some(kib) = field(&meminfo, "MemTotal").and_then(|v| v.split(' ').next()?.parse::<f64>().ok()) {
        add("memory", format!("{:.1} GiB", kib / (1 << 20) as f64));
    }
    add("system", format!("{} {}", std::env::consts::OS, std::env::consts::ARCH));
    add("instruction set", peak.isa.name().to_string());
    add("float32 peak", format!("{}FLOP/s, measured", si_spaced(peak.gflops * 1e9)));
    out
}

/// `123 G`, as before a unit.
fn si_spaced(value: f64) -> String {
    let text = si(value);
    match text.find(|c: char| c.is_alphabetic()) {
        Some(at) => format!("{} {}", &text[..at], &text[at..]),
        None => format!("{text} "),
    }
}

/// The value of the first `key : value` line.
fn field<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let value = |line: &'a str| line.split_once(':').filter(|(k, _)| k.trim() == key).map(|(_, v)| v.trim());
    text.lines().find_map(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use elleci_core::simd::Isa;

    #[test]
    fn facts_name_the_peak_and_the_instruction_set() {
        let facts = facts(&Peak { gflops: 123.4, threads: 2, isa: Isa::Avx2 });
        let get = |what: &str| facts.iter().find(|f| f.0 == what).map(|f| f.1.as_str());
        assert_eq!(get("float32 peak"), Some("123 GFLOP/s, measured"));
        assert_eq!(get("instruction set"), Some("avx2"));
        assert!(get("threads").is_some_and(|t| t.starts_with("2 of ")));
    }

    #[test]
    fn fields_are_found_by_their_whole_key() {
        let text = "model\t\t: 143\nmodel name\t: Some CPU @ 2 GHz\nMemTotal:       24683112 kB\n";
        assert_eq!(field(text, "model name"), Some("Some CPU @ 2 GHz"));
        assert_eq!(field(text, "MemTotal"), Some("24683112 kB"));
        assert_eq!(field(text, "MemFree"), None);
    }
}
