//! Line plots as SVG: enough for the curves of a run, small, readable on light and dark backgrounds.
//!
//! A curve of any length is drawn by at most four points a pixel column (its first, lowest, highest and last), which gives
//! the same picture as all of its points.

use std::fmt::Write;

use super::format::{escape, sci, si};
use super::metrics::Record;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 62.0;
const TOP: f64 = 62.0;
const BOTTOM: f64 = 48.0;

/// How a series is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// A line.
    Line,
    /// A pale line, for raw values behind a smoothed one.
    Pale,
    /// A dashed line, for the second axis.
    Dashed,
    /// Points joined by a thin line.
    Points,
}

/// The vertical axis of a series.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The first.
    Left,
    /// The second.
    Right,
}

/// Where an axis begins and ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fit {
    /// At its data.
    Data,
    /// At the ticks around its data.
    Ticks,
    /// At 0, and at the tick above its data: lengths can be compared.
    Zero,
}

/// One curve.
#[derive(Clone, Debug)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// (x, y), x ascending. Points that are not finite are left out.
    pub points: Vec<(f64, f64)>,
    /// How it is drawn.
    pub mark: Mark,
    /// Which axis it reads on.
    pub side: Side,
    /// 0 to 5: one of the palette's colours.
    pub colour: usize,
}

/// A plot: a title, axes and curves.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Above the plot.
    pub title: String,
    /// Below the horizontal axis.
    pub x_label: String,
    /// Of the left axis.
    pub left_label: String,
    /// Where the vertical axes begin and end.
    pub fit: Fit,
    /// Of the right axis, drawn if a series reads on it.
    pub right_label: String,
    /// Drawn in this order.
    pub series: Vec<Series>,
}

impl Plot {
    /// Training loss raw and smoothed, validation loss, and the learning rate on the second axis.
    pub fn loss(title: &str, records: &[Record]) -> Plot {
        let of_steps = |value: fn(&super::StepRecord) -> f64| steps(records, value);
        let loss = of_steps(|s| s.loss);
        let evals = records.iter().filter_map(|r| match r {
            Record::Eval(e) => Some((e.step as f64, e.loss)),
            Record::Step(_) | Record::Sample(_) => None,
        });
        let series = |name: &str, points, mark, side, colour| Series { name: name.into(), points, mark, side, colour };
        Plot {
            title: title.into(),
            x_label: "optimiser steps".into(),
            left_label: "loss (nats a token)".into(),
            right_label: "learning rate".into(),
            fit: Fit::Ticks,
            series: vec![
                series("learning rate", of_steps(|s| s.lr), Mark::Dashed, Side::Right, 2),
                series("loss", loss.clone(), Mark::Pale, Side::Left, 0),
                series("loss, smoothed", smooth(&loss), Mark::Line, Side::Left, 0),
                series("validation", evals.collect(), Mark::Points, Side::Left, 1),
            ],
        }
    }

    /// Gradient norm, and tokens a second (smoothed) on the second axis.
    pub fn health(title: &str, records: &[Record]) -> Plot {
        let norm = steps(records, |s| s.grad_norm);
        let series = |name: &str, points, mark, side, colour| Series { name: name.into(), points, mark, side, colour };
        Plot {
            title: title.into(),
            x_label: "optimiser steps".into(),
            left_label: "gradient norm".into(),
            right_label: "tokens a second".into(),
            fit: Fit::Zero,
            series: vec![
                series("tokens a second", smooth(&steps(records, |s| s.tokens_per_s)), Mark::Dashed, Side::Right, 2),
                series("gradient norm", norm.clone(), Mark::Pale, Side::Left, 3),
                series("gradient norm, smoothed", smooth(&norm), Mark::Line, Side::Left, 3),
            ],
        }
    }

    /// Bits a byte on held-out text, by source.
    pub fn bits_per_byte(title: &str, records: &[Record]) -> Plot {
        let mut series: Vec<Series> = Vec::new();
        for record in records {
            let Record::Eval(eval) = record else { continue };
            let all = std::iter::once(("all", eval.bpb));
            for (name, bpb) in all.chain(eval.sources.iter().map(|s| (s.name.as_str(), s.bpb))) {
                let at = series.iter().position(|s| s.name == name).unwrap_or_else(|| {
                    let colour = series.len() % 6;
                    series.push(Series {
                        name: name.into(),
                        points: vec![],
                        mark: Mark::Points,
                        side: Side::Left,
                        colour,
                    });
                    series.len() - 1
                });
                series[at].points.push((eval.step as f64, bpb));
            }
        }
        Plot {
            title: title.into(),
            x_label: "optimiser steps".into(),
            left_label: "bits a byte".into(),
            right_label: String::new(),
            fit: Fit::Ticks,
            series,
        }
    }

    /// The plot as a complete SVG document, which can also stand inside HTML.
    pub fn svg(&self) -> String {
        let clean: Vec<Series> = self.series.iter().map(finite).filter(|s| !s.points.is_empty()).collect();
        let has_right = clean.iter().any(|s| s.side == Side::Right);
        let right = if has_right { 78.0 } else { 20.0 };
        let area = Area { left: LEFT, right: WIDTH - right, top: TOP, bottom: HEIGHT - BOTTOM };
        let mut out = String::new();
        let title = escape(&self.title);
        _ = write!(
            out,
            r#"<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title}">{STYLE}<rect class="paper" width="{WIDTH}" height="{HEIGHT}" rx="6"/><text class="title" x="{LEFT}" y="26">{title}</text>"#
        );
        if clean.is_empty() {
            _ = write!(
                out,
                r#"<text x="{}" y="{}" text-anchor="middle">no data yet</text></svg>"#,
                WIDTH / 2.0,
                HEIGHT / 2.0
            );
            return out;
        }
        let x = Axis::over(clean.iter().flat_map(|s| s.points.iter().map(|p| p.0)), 8, Fit::Data);
        let of_side = |side: Side| {
            let values = clean.iter().filter(move |s| s.side == side).flat_map(|s| s.points.iter().map(|p| p.1));
            Axis::over(values, 6, self.fit)
        };
        let (y, y2) = (of_side(Side::Left), of_side(Side::Right));
        self.grid(&mut out, &area, (&x, &y, has_right.then_some(&y2)));
        for series in &clean {
            let y = if series.side == Side::Left { &y } else { &y2 };
            draw(&mut out, &area, series, &x, y);
        }
        legend(&mut out, &clean);
        out.push_str("</svg>");
        out
    }

    fn grid(&self, out: &mut String, area: &Area, (x, y, y2): (&Axis, &Axis, Option<&Axis>)) {
        let Area { left, right, top, bottom } = *area;
        for tick in y.ticks() {
            let py = area.y(y, tick);
            _ = write!(out, r#"<path class="grid" d="M{left} {py:.1}H{right}"/>"#);
            _ = write!(
                out,
                r#"<text x="{}" y="{:.1}" text-anchor="end">{}</text>"#,
                left - 8.0,
                py + 4.0,
                y.label(tick)
            );
        }
        for tick in x.ticks() {
            let px = area.x(x, tick);
            _ = write!(out, r#"<path class="axis" d="M{px:.1} {bottom}v5"/>"#);
            _ = write!(out, r#"<text x="{px:.1}" y="{}" text-anchor="middle">{}</text>"#, bottom + 19.0, x.label(tick));
        }
        let middle = (top + bottom) / 2.0;
        if let Some(y2) = y2 {
            for tick in y2.ticks() {
                let (px, py) = (right + 8.0, area.y(y2, tick) + 4.0);
                _ = write!(out, r#"<text x="{px}" y="{py:.1}">{}</text>"#, y2.label(tick));
            }
            let px = WIDTH - 12.0;
            let label = escape(&self.right_label);
            _ = write!(
                out,
                r#"<text transform="translate({px} {middle}) rotate(-90)" text-anchor="middle">{label}</text>"#
            );
        }
        let (x_label, left_label) = (escape(&self.x_label), escape(&self.left_label));
        let centre = (left + right) / 2.0;
        _ = write!(out, r#"<path class="axis" d="M{left} {bottom}H{right}"/>"#);
        _ = write!(out, r#"<text x="{centre}" y="{}" text-anchor="middle">{x_label}</text>"#, HEIGHT - 10.0);
        _ = write!(
            out,
            r#"<text transform="translate(16 {middle}) rotate(-90)" text-anchor="middle">{left_label}</text>"#
        );
    }
}

fn steps(records: &[Record], value: fn(&super::StepRecord) -> f64) -> Vec<(f64, f64)> {
    let point = |r: &Record| match r {
        Record::Step(s) => Some((s.step as f64, value(s))),
        Record::Eval(_) | Record::Sample(_) => None,
    };
    records.iter().filter_map(point).collect()
}

/// The mean over a hundredth of the points on either side. Near the start the window shrinks on both sides, so that the curve keeps
/// to the steep fall of a run's first steps; near the end only on the right, so that its last value is not one step's.
pub fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let finite: Vec<_> = points.iter().filter(|p| p.1.is_finite()).collect();
    let mut sums = vec![0.0];
    for p in &finite {
        sums.push(sums[sums.len() - 1] + p.1);
    }
    let mean = |i: usize| {
        let left = i.min(finite.len() / 100);
        let right = left.min(finite.len() - 1 - i);
        (finite[i].0, (sums[i + right + 1] - sums[i - left]) / (left + right + 1) as f64)
    };
    (0..finite.len()).map(mean).collect()
}

fn finite(series: &Series) -> Series {
    let points = series.points.iter().copied().filter(|p| p.0.is_finite() && p.1.is_finite()).collect();
    Series { points, ..series.clone() }
}

/// The rectangle of the curves, in SVG units.
struct Area {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

impl Area {
    fn x(&self, axis: &Axis, value: f64) -> f64 {
        self.left + (self.right - self.left) * axis.share(value)
    }

    fn y(&self, axis: &Axis, value: f64) -> f64 {
        self.bottom - (self.bottom - self.top) * axis.share(value)
    }
}

/// An axis whose lowest value is below this share of its highest starts at 0.
const ZERO_WITHIN: f64 = 0.2;

struct Axis {
    low: f64,
    high: f64,
    /// Distance of ticks: 1, 2 or 5 times a power of ten.
    step: f64,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64>, most_ticks: usize, fit: Fit) -> Axis {
        let (mut low, mut high) = values.fold((f64::MAX, f64::MIN), |(l, h), v| (l.min(v), h.max(v)));
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        if high - low <= 1e-9 * high.abs().max(low.abs()) {
            let around = if high == 0.0 { 1.0 } else { 0.1 * high.abs() };
            (low, high) = (low - around, high + around);
        }
        if low > 0.0 && (fit == Fit::Zero || low < ZERO_WITHIN * high) {
            low = 0.0;
        }
        let raw = (high - low) / most_ticks as f64;
        let unit = 10f64.powf(raw.log10().floor());
        let step = unit * [1.0, 2.0, 5.0].into_iter().find(|m| raw <= m * unit).unwrap_or(10.0);
        if fit != Fit::Data {
            (low, high) = ((low / step).floor() * step, (high / step).ceil() * step);
        }
        Axis { low, high, step }
    }

    fn share(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + use<> {
        // A tick that rounding put just past an end still counts.
        let (first, last) =
            ((self.low / self.step - 1e-6).ceil() as i64, (self.high / self.step + 1e-6).floor() as i64);
        let step = self.step;
        (first..=last).map(move |i| i as f64 * step)
    }

    fn label(&self, tick: f64) -> String {
        let largest = self.high.abs().max(self.low.abs());
        if tick == 0.0 {
            "0".into()
        } else if largest >= 1e4 {
            let text = si(tick);
            let digits = text.trim_end_matches(|c: char| c.is_alphabetic());
            let prefix = &text[digits.len()..];
            let short = if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits };
            format!("{short}{prefix}")
        } else if largest < 1e-2 {
            sci(tick)
        } else {
            let decimals = (-self.step.log10().floor()).max(0.0) as usize;
            format!("{tick:.decimals$}")
        }
    }
}

fn draw(out: &mut String, area: &Area, series: &Series, x: &Axis, y: &Axis) {
    let pixels: Vec<(f64, f64)> = series.points.iter().map(|p| (area.x(x, p.0), area.y(y, p.1))).collect();
    let class = match series.mark {
        Mark::Line => "line",
        Mark::Pale => "pale",
        Mark::Dashed => "dashed",
        Mark::Points => "thin",
    };
    let line = decimate(&pixels);
    _ = write!(out, r#"<path class="{class} c{}" d=""#, series.colour % 6);
    for (i, (px, py)) in line.iter().enumerate() {
        _ = write!(out, "{}{px:.1} {py:.1}", if i == 0 { 'M' } else { 'L' });
    }
    out.push_str(r#""/>"#);
    // A curve of one point has no line to be seen.
    if series.mark == Mark::Points || pixels.len() == 1 {
        let mut column = f64::MIN;
        for &(px, py) in pixels.iter().rev() {
            if (px.floor() - column).abs() >= 2.0 {
                column = px.floor();
                _ = write!(out, r#"<circle class="f{}" cx="{px:.1}" cy="{py:.1}" r="3"/>"#, series.colour % 6);
            }
        }
    }
}

/// The first, lowest, highest and last point of every pixel column, in order. A point that is several of them comes once.
fn decimate(pixels: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut out = Vec::new();
    for column in pixels.chunk_by(|a, b| a.0.floor() == b.0.floor()) {
        let by_height = |a: &usize, b: &usize| column[*a].1.total_cmp(&column[*b].1);
        let lowest = (0..column.len()).min_by(by_height).unwrap_or(0);
        let highest = (0..column.len()).max_by(by_height).unwrap_or(0);
        let mut picks = vec![0, lowest, highest, column.len() - 1];
        picks.sort_unstable();
        picks.dedup();
        out.extend(picks.into_iter().map(|i| column[i]));
    }
    out
}

/// Names from left to right under the title, each with a sample of its mark.
fn legend(out: &mut String, series: &[Series]) {
    let mut x = LEFT;
    for s in series {
        let colour = s.colour % 6;
        let (middle, y) = (x + 10.0, 44.0);
        match s.mark {
            Mark::Points => _ = write!(out, r#"<circle class="f{colour}" cx="{middle}" cy="{y}" r="3.5"/>"#),
            Mark::Line => _ = write!(out, r#"<path class="line c{colour}" d="M{x} {y}h20"/>"#),
            Mark::Dashed => _ = write!(out, r#"<path class="dashed c{colour}" d="M{x} {y}h20"/>"#),
            // As a band, which is what raw values look like.
            Mark::Pale => _ = write!(out, r#"<path class="pale c{colour}" style="stroke-width:6" d="M{x} {y}h20"/>"#),
        }
        _ = write!(out, r#"<text x="{}" y="{}">{}</text>"#, x + 26.0, y + 4.0, escape(&s.name));
        // 6.4 units a character at this size, on average.
        x += 26.0 + 6.4 * s.name.chars().count() as f64 + 20.0;
    }
}

/// The palette is Okabe and Ito's, told apart by colour-blind readers too, a little lighter in the dark. Plain rules and no CSS
/// variables, which SVG renderers outside of browsers do not know.
const STYLE: &str = concat!(
    "<style>.plot{font:12px system-ui,-apple-system,'Segoe UI',Roboto,'DejaVu Sans',sans-serif}",
    ".plot .paper{fill:#fff}.plot text{fill:#57606a}.plot .title{fill:#1f2328;font-size:16px;font-weight:600}",
    ".plot path{fill:none;stroke-linejoin:round}.plot .grid{stroke:#e4e7eb}.plot .axis{stroke:#57606a}",
    ".plot .line{stroke-width:2}.plot .pale{stroke-width:1;opacity:.35}.plot .thin{stroke-width:1.2}",
    ".plot .dashed{stroke-width:1.3;stroke-dasharray:5 4;opacity:.85}",
    ".plot .c0{stroke:#0072b2}.plot .c1{stroke:#d55e00}.plot .c2{stroke:#009e73}",
    ".plot .c3{stroke:#9a5ba5}.plot .c4{stroke:#b8860b}.plot .c5{stroke:#56606b}",
    ".plot .f0{fill:#0072b2}.plot .f1{fill:#d55e00}.plot .f2{fill:#009e73}",
    ".plot .f3{fill:#9a5ba5}.plot .f4{fill:#b8860b}.plot .f5{fill:#56606b}",
    "@media (prefers-color-scheme:dark){.plot .paper{fill:#161b22}.plot text{fill:#9aa4af}.plot .title{fill:#e6edf3}",
    ".plot .grid{stroke:#2b323b}.plot .axis{stroke:#9aa4af}.plot .pale{opacity:.5}",
    ".plot .c0{stroke:#58a6e8}.plot .c1{stroke:#f0883e}.plot .c2{stroke:#3fc79a}",
    ".plot .c3{stroke:#c58fd0}.plot .c4{stroke:#d9b24c}.plot .c5{stroke:#9aa4af}",
    ".plot .f0{fill:#58a6e8}.plot .f1{fill:#f0883e}.plot .f2{fill:#3fc79a}",
    ".plot .f3{fill:#c58fd0}.plot .f4{fill:#d9b24c}.plot .f5{fill:#9aa4af}}</style>",
);

#[cfg(test)]
mod tests {
    use super::*;

    fn series(points: Vec<(f64, f64)>) -> Series {
        Series { name: "a".into(), points, mark: Mark::Line, side: Side::Left, colour: 0 }
    }

    fn plot(series: Vec<Series>) -> Plot {
        Plot {
            title: "t".into(),
            x_label: "x".into(),
            left_label: "y".into(),
            right_label: "z".into(),
            fit: Fit::Ticks,
            series,
        }
    }

    /// Elements open and close in pairs, attributes are quoted, text holds no bare `<` or `&`.
    fn assert_well_formed(svg: &str) {
        let mut open = vec![];
        let mut rest = svg;
        while let Some(at) = rest.find('<') {
            let bare = ["&lt;", "&gt;", "&amp;", "&quot;", "&#39;"]
                .iter()
                .fold(rest[..at].to_string(), |t, e| t.replace(e, ""));
            assert!(!bare.contains('&'), "{bare}");
            let end = at + rest[at..].find('>').expect("every tag closes");
            let tag = &rest[at + 1..end];
            assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
            let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap();
            if tag.starts_with('/') {
                assert_eq!(open.pop(), Some(name));
            } else if !tag.ends_with('/') {
                open.push(name);
            }
            rest = &rest[end + 1..];
        }
        assert!(open.is_empty() && rest.is_empty());
    }

    #[test]
    fn ticks_are_round_and_cover_the_data() {
        for (low, high, want) in [
            (0.0, 1000.0, "0 200 400 600 800 1000"),
            (2.1, 8.4, "2 4 6 8 10"),
            (0.0, 1.5e-3, "0 5e-4 1e-3 1.5e-3"),
            (1.02, 1.31, "1.00 1.05 1.10 1.15 1.20 1.25 1.30 1.35"),
            (0.0, 50_000.0, "0 10k 20k 30k 40k 50k"),
            (-3.0, 3.0, "-3 -2 -1 0 1 2 3"),
        ] {
            let axis = Axis::over([low, high].into_iter(), 6, Fit::Ticks);
            let labels: Vec<_> = axis.ticks().map(|t| axis.label(t)).collect();
            assert_eq!(labels.join(" "), want);
            assert!(axis.low <= low && axis.high >= high);
        }
        assert_eq!(Axis::over([4850.0, 5100.0].into_iter(), 6, Fit::Zero).low, 0.0);
        assert_eq!(Axis::over([100.0, 5000.0].into_iter(), 6, Fit::Data).low, 0.0, "near 0");
        assert_eq!(Axis::over([4000.0, 5000.0].into_iter(), 6, Fit::Data).low, 4000.0);
    }

    #[test]
    fn equal_values_one_point_and_no_point_still_draw() {
        for points in [vec![], vec![(5.0, 2.0)], vec![(1.0, 0.0), (2.0, 0.0)], vec![(1.0, f64::NAN)]] {
            let empty = points.iter().all(|p: &(f64, f64)| p.1.is_nan());
            let svg = plot(vec![series(points)]).svg();
            assert_well_formed(&svg);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert_eq!(svg.contains("no data yet"), empty);
        }
    }

    #[test]
    fn a_million_points_stay_small_and_keep_their_spikes() {
        let spike = 700_001;
        let points = |s: usize| (0..1_000_000).map(move |i| (i as f64, ((i * 7919 + s) % 1013) as f64)).collect();
        let mut all: Vec<Series> = (0..3).map(|s| series(points(s))).collect();
        all[1].points[spike].1 = 9999.0;
        all[2].mark = Mark::Points;
        let svg = plot(all).svg();
        assert!(svg.len() < 200_000, "{} bytes", svg.len());
        assert_well_formed(&svg);
        let pixels: Vec<_> =
            (0..1000).map(|i| (i as f64 / 100.0, if i == 777 { -5.0 } else { (i % 7) as f64 })).collect();
        let few = decimate(&pixels);
        assert!(few.len() <= 40 && few.contains(&pixels[777]) && few[0] == pixels[0] && few.last() == pixels.last());
        assert!(few.windows(2).all(|w| w[0].0 < w[1].0));
    }

    #[test]
    fn names_are_escaped() {
        let mut s = series(vec![(0.0, 1.0), (1.0, 2.0)]);
        s.name = "<script>&\"".into();
        let svg = Plot { title: "a < b".into(), ..plot(vec![s]) }.svg();
        assert_well_formed(&svg);
        assert!(svg.contains("&lt;script&gt;&amp;&quot;") && svg.contains("a &lt; b"));
    }

    #[test]
    fn smoothing_keeps_a_constant_and_skips_nan() {
        let flat: Vec<_> = (0..500).map(|i| (i as f64, if i % 50 == 3 { f64::NAN } else { 2.0 })).collect();
        let smoothed = smooth(&flat);
        assert_eq!(smoothed.len(), 490);
        assert!(smoothed.iter().all(|p| (p.1 - 2.0).abs() < 1e-12));
        // 200 points: two on either side; one beside the second point, none beside the first, none right of the last.
        let value = |i: usize| [9.0, 1.0, 2.0, 6.0, 7.0].get(i).copied().unwrap_or(if i == 199 { 3.0 } else { 0.0 });
        let smoothed = smooth(&(0..200).map(|i| (i as f64, value(i))).collect::<Vec<_>>());
        let heights: Vec<f64> = [0, 1, 2, 198, 199].map(|i: usize| smoothed[i].1).to_vec();
        assert_eq!(heights, [9.0, 4.0, 5.0, 0.75, 1.0]);
    }
}
