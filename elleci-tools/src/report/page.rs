//! One HTML page a run: what was trained, on what, and how it went. It asks the network for nothing.

use std::fmt::Write;

use super::format::{escape, thousands};
use super::metrics::{EvalRecord, Sample};

/// The contents of a page.
#[derive(Clone, Debug, Default)]
pub struct Page<'a> {
    /// The run's name.
    pub title: &'a str,
    /// A line below it: the state of the run, its date.
    pub subtitle: &'a str,
    /// The figures that matter, large: (what, value).
    pub figures: &'a [(String, String)],
    /// SVG documents of [`Plot::svg`](super::Plot::svg).
    pub plots: &'a [String],
    /// Evaluations, oldest first.
    pub evals: &'a [EvalRecord],
    /// Samples, oldest first.
    pub samples: &'a [Sample],
    /// The machine, its kernels and its measured peak: (what, value).
    pub machine: &'a [(String, String)],
    /// The effective configuration, as TOML.
    pub config: &'a str,
}

impl Page<'_> {
    /// The page as HTML.
    pub fn html(&self) -> String {
        let mut out = String::with_capacity(64 * 1024);
        let title = escape(self.title);
        _ = write!(
            out,
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n\
             <title>{title}</title>{STYLE}</head>\n<body><main>\n<h1>{title}</h1>\n<p class=\"sub\">{}</p>\n",
            escape(self.subtitle)
        );
        if !self.figures.is_empty() {
            out.push_str("<dl class=\"figures\">\n");
            for (what, value) in self.figures {
                _ = writeln!(out, "<div><dt>{}</dt><dd>{}</dd></div>", escape(what), escape(value));
            }
            out.push_str("</dl>\n");
        }
        for plot in self.plots {
            _ = writeln!(out, "<figure>{plot}</figure>");
        }
        self.evaluations(&mut out);
        self.sample_list(&mut out);
        if !self.machine.is_empty() {
            out.push_str("<h2>Machine</h2>\n<table class=\"facts\">\n");
            for (what, value) in self.machine {
                _ = writeln!(out, "<tr><th scope=\"row\">{}</th><td>{}</td></tr>", escape(what), escape(value));
            }
            out.push_str("</table>\n");
        }
        if !self.config.is_empty() {
            _ = writeln!(out, "<h2>Configuration</h2>\n<pre class=\"config\">{}</pre>", escape(self.config));
        }
        out.push_str("</main></body></html>\n");
        out
    }

    /// Bits a byte by step and source. A source that an evaluation lacks has an empty cell.
    fn evaluations(&self, out: &mut String) {
        if self.evals.is_empty() {
            return;
        }
        let mut names: Vec<&str> = Vec::new();
        for source in self.evals.iter().flat_map(|e| &e.sources) {
            if !names.contains(&source.name.as_str()) {
                names.push(&source.name);
            }
        }
        out.push_str(
            "<h2>Evaluations</h2>\n<p>Held-out text. Loss in nats a token; the other columns in bits a byte.</p>\n",
        );
        out.push_str("<div class=\"scroll\"><table class=\"numbers\">\n<tr><th>step</th><th>tokens</th><th>loss</th><th>all</th>");
        for name in &names {
            _ = write!(out, "<th>{}</th>", escape(name));
        }
        out.push_str("</tr>\n");
        for eval in self.evals {
            let (step, tokens) = (thousands(eval.step), thousands(eval.tokens));
            _ = write!(out, "<tr><td>{step}</td><td>{tokens}</td><td>{:.4}</td><td>{:.4}</td>", eval.loss, eval.bpb);
            for name in &names {
                match eval.sources.iter().find(|s| s.name == *name) {
                    Some(s) => _ = write!(out, "<td>{:.4}</td>", s.bpb),
                    None => out.push_str("<td></td>"),
                }
            }
            out.push_str("</tr>\n");
        }
        out.push_str("</table></div>\n");
    }

    /// The newest first: it is what a reader comes for.
    fn sample_list(&self, out: &mut String) {
        if self.samples.is_empty() {
            return;
        }
        out.push_str("<h2>Samples</h2>\n");
        for sample in self.samples.iter().rev() {
            let (step, prompt, text) = (thousands(sample.step), escape(&sample.prompt), escape(&sample.text));
            _ = writeln!(out, "<div class=\"sample\"><span>step {step}</span><p><b>{prompt}</b>{text}</p></div>");
        }
    }
}

const STYLE: &str = "<style>
:root{--bg:#f6f8fa;--paper:#fff;--ink:#1f2328;--muted:#57606a;--rule:#d8dee4;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--bg:#0d1117;--paper:#161b22;--ink:#e6edf3;--muted:#9aa4af;--rule:#2b323b}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}
main{max-width:920px;margin:0 auto;padding:32px 20px 64px}
h1{margin:0;font-size:28px;line-height:1.2}
h2{margin:36px 0 10px;font-size:19px}
p{margin:0 0 10px}
.sub{margin:6px 0 22px;color:var(--muted)}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:10px;margin:0 0 20px}
.figures div,figure,.sample,.scroll,.facts,pre{background:var(--paper);border:1px solid var(--rule);border-radius:8px}
.figures div{padding:10px 14px}
dt{color:var(--muted);font-size:13px}
dd{margin:0;font-size:20px;font-weight:600;overflow-wrap:anywhere}
figure{margin:0 0 16px;overflow:hidden}
figure svg{display:block;width:100%;height:auto}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%}
.facts{border-spacing:0;border-collapse:separate}
th,td{padding:6px 12px;text-align:left;border-bottom:1px solid var(--rule)}
tr:last-child>*{border-bottom:0}
th{color:var(--muted);font-weight:500}
.facts th{width:12em}
.numbers th,.numbers td{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.sample{padding:12px 16px;margin-bottom:10px}
.sample span{color:var(--muted);font-size:13px}
.sample p{margin:4px 0 0;white-space:pre-wrap;overflow-wrap:anywhere}
pre{margin:0;padding:14px 16px;overflow-x:auto;font:13px/1.45 ui-monospace,'DejaVu Sans Mono',monospace}
</style>";

#[cfg(test)]
mod tests {
    use super::super::metrics::SourceEval;
    use super::*;

    fn eval(step: u64, sources: &[&str]) -> EvalRecord {
        let sources = sources.iter().map(|n| SourceEval { name: n.to_string(), loss: 3.0, bpb: 1.25 }).collect();
        EvalRecord { step, tokens: step * 2048, loss: 3.5, bpb: 1.5, sources }
    }

    #[test]
    fn everything_is_on_the_page_and_nothing_given_becomes_markup() {
        let evil = "</pre><script>alert('x')</script>";
        let pairs = [(evil.to_string(), evil.to_string())];
        let samples = [1, 2].map(|step| Sample { step, prompt: evil.into(), text: format!("{evil}\nseconda riga") });
        let evals = [eval(1000, &["wiki"]), eval(2000, &["wiki", evil])];
        let page = Page {
            title: evil,
            subtitle: evil,
            figures: &pairs,
            plots: &["<svg>drawn</svg>".into()],
            evals: &evals,
            samples: &samples,
            machine: &pairs,
            config: evil,
        };
        let html = page.html();
        assert!(!html.contains("<script") && !html.contains("alert('"), "text became markup");
        // Title twice, subtitle, figure and machine in pairs, config, a table head, and prompt and text of two samples.
        assert_eq!(html.matches("&lt;script&gt;").count(), 2 + 1 + 2 + 2 + 1 + 1 + 4);
        assert!(html.contains("<svg>drawn</svg>") && html.contains("2,048,000") && html.contains("1.2500"));
        assert!(html.find("step 2<").unwrap() < html.find("step 1<").unwrap(), "the newest sample comes first");
        assert!(html.contains("<td></td>"), "the first evaluation lacks a source");
        for outside in ["http:", "https:", "src=", "href=", "url(", "@import"] {
            assert!(!html.contains(outside), "{outside}");
        }
    }

    #[test]
    fn an_empty_run_has_no_empty_sections() {
        let html = Page { title: "nano", ..Page::default() }.html();
        assert!(!html.contains("<h2>") && !html.contains("<table") && html.contains("<h1>nano</h1>"));
    }
}
