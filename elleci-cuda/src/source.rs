//! The kernels' sources, which are compiled where they run: by NVRTC for a device, by a C++ compiler for the emulation.

/// A file of kernels: its name, and its text with the headers it includes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// File name, e.g. `norm.cu`.
    pub name: &'static str,
    text: &'static str,
}

const HEADERS: [(&str, &str); 2] =
    [("platform.cuh", include_str!("../kernels/platform.cuh")), ("tile.cuh", include_str!("../kernels/tile.cuh"))];

/// All files of kernels. Each is compiled by itself.
pub const SOURCES: [Source; 10] = [
    Source { name: "norm.cu", text: include_str!("../kernels/norm.cu") },
    Source { name: "ternary.cu", text: include_str!("../kernels/ternary.cu") },
    Source { name: "gemm.cu", text: include_str!("../kernels/gemm.cu") },
    Source { name: "operands.cu", text: include_str!("../kernels/operands.cu") },
    Source { name: "matmul.cu", text: include_str!("../kernels/matmul.cu") },
    Source { name: "mamba.cu", text: include_str!("../kernels/mamba.cu") },
    Source { name: "attention.cu", text: include_str!("../kernels/attention.cu") },
    Source { name: "ssd.cu", text: include_str!("../kernels/ssd.cu") },
    Source { name: "loss.cu", text: include_str!("../kernels/loss.cu") },
    Source { name: "optim.cu", text: include_str!("../kernels/optim.cu") },
];

impl Source {
    /// A file that is not one of the step's: the emulation's own checks.
    pub const fn for_tests(name: &'static str, text: &'static str) -> Source {
        Source { name, text }
    }

    /// The text with every header put in where it is first included; NVRTC then needs no files.
    pub fn expanded(&self) -> String {
        let mut included = Vec::new();
        let mut out = String::new();
        expand(self.text, &mut included, &mut out);
        out
    }

    /// The kernels of the file, in order.
    pub fn kernels(&self) -> Vec<String> {
        // A macro stands for a family: `PRODUCTS(F32, f32)` defines what its lines with `##suffix` name.
        let mut names = Vec::new();
        let mut family: Vec<&str> = Vec::new();
        let mut last_macro = "";
        for line in self.text.lines() {
            if let Some(rest) = line.strip_prefix("#define ") {
                last_macro = rest.split('(').next().unwrap_or_default().trim();
                family.clear();
            } else if let Some(rest) = line.trim_start().strip_prefix("KERNEL(") {
                let name = rest.split([',', ')']).nth(1).unwrap_or_default().trim();
                if line.starts_with("KERNEL(") { names.push(name.to_string()) } else { family.push(name) }
            } else if !last_macro.is_empty()
                && let Some(arguments) = line.strip_prefix(last_macro).and_then(|r| r.strip_prefix('('))
            {
                let arguments: Vec<&str> = arguments.trim_end_matches(')').split(',').map(str::trim).collect();
                names.extend(family.iter().map(|member| instance(member, &arguments)));
            }
        }
        names
    }
}

/// The name of a macro's kernel: `dense_dx_##suffix` takes the last argument of the macro, plain `name` the first.
fn instance(member: &str, arguments: &[&str]) -> String {
    match member.strip_suffix("##suffix") {
        Some(stem) => format!("{stem}{}", arguments.last().unwrap_or(&"")),
        None => arguments.first().unwrap_or(&"").to_string(),
    }
}

fn expand(text: &str, included: &mut Vec<String>, out: &mut String) {
    for line in text.lines() {
        let header = line.strip_prefix("#include \"").and_then(|r| r.strip_suffix('"'));
        match header.and_then(|h| HEADERS.iter().find(|(name, _)| *name == h)) {
            Some((name, text)) if !included.iter().any(|i| i == name) => {
                included.push((*name).to_string());
                expand(text, included, out);
            }
            Some(_) => {}
            None if line == "#pragma once" => {}
            None => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_found_in_macros_too() {
        let of = |name: &str| SOURCES.iter().find(|s| s.name == name).unwrap().kernels();
        assert_eq!(of("ternary.cu"), ["ternary_sum", "ternary_gamma", "ternary_pack"]);
        assert_eq!(of("norm.cu")[..3], ["norm_plain", "norm_gated", "norm_squared"]);
        assert!(of("norm.cu").iter().any(|k| k == "column_sum"));
        assert!(of("gemm.cu").iter().any(|k| k == "ternary_dw_f32"));
        assert_eq!(of("matmul.cu").len(), 10);
        assert_eq!(of("ssd.cu").iter().filter(|k| k.starts_with("ssd_backward_")).count(), 4);
    }

    #[test]
    fn headers_are_put_in_once() {
        for source in SOURCES {
            let text = source.expanded();
            assert_eq!(text.matches("struct Floats {").count(), 1, "{}", source.name);
        }
    }
}
