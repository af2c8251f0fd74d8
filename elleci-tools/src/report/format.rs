//! Numbers as people read them.

/// Three significant digits with a decimal prefix: `412`, `4.97k`, `1.49G`.
pub fn si(value: f64) -> String {
    if !value.is_finite() {
        return value.to_string();
    }
    // Rounded first, so that 999.6 becomes 1.00k and not 1000.
    let rounded: f64 = format!("{value:.2e}").parse().unwrap_or(value);
    let magnitude = rounded.abs();
    let (scale, prefix) = match magnitude {
        m if m >= 1e12 => (1e12, "T"),
        m if m >= 1e9 => (1e9, "G"),
        m if m >= 1e6 => (1e6, "M"),
        m if m >= 1e3 => (1e3, "k"),
        _ => (1.0, ""),
    };
    let scaled = rounded / scale;
    let decimals = match scaled.abs() {
        s if s >= 100.0 || rounded == 0.0 => 0,
        s if s >= 10.0 => 1,
        _ => 2,
    };
    format!("{scaled:.decimals$}{prefix}")
}

/// Scientific, at most three significant digits, no trailing zeros: `1.5e-3`, `6e-7`, `0`.
pub fn sci(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let text = format!("{value:.2e}");
    match text.split_once('e') {
        Some((mantissa, exponent)) => format!("{}e{exponent}", mantissa.trim_end_matches('0').trim_end_matches('.')),
        None => text,
    }
}

/// A time span by its two largest units: `12s`, `6m10s`, `2h05m`, `3d04h`.
pub fn duration(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".into();
    }
    let s = seconds.round() as u64;
    match s {
        0..60 => format!("{s}s"),
        60..3600 => format!("{}m{:02}s", s / 60, s % 60),
        3600..86_400 => format!("{}h{:02}m", s / 3600, s % 3600 / 60),
        _ => format!("{}d{:02}h", s / 86_400, s % 86_400 / 3600),
    }
}

/// A count with thousands separated: `1,494,416,256`.
pub fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// Text for the inside of an XML or HTML element or a quoted attribute. Characters that neither may hold become U+FFFD.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\n' | '\t' => out.push(c),
            '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_as_written_by_hand() {
        let table = [
            (0.0, "0"),
            (0.82, "0.82"),
            (9.999, "10.0"),
            (412.0, "412"),
            (999.6, "1.00k"),
            (4970.0, "4.97k"),
            (-65_536.0, "-65.5k"),
            (1_494_416_256.0, "1.49G"),
            (f64::NAN, "NaN"),
        ];
        for (value, text) in table {
            assert_eq!(si(value), text);
        }
        for (value, text) in [(1.5e-3, "1.5e-3"), (6e-7, "6e-7"), (1.234_567, "1.23e0"), (0.0, "0"), (-2e-4, "-2e-4")] {
            assert_eq!(sci(value), text);
        }
        let times =
            [(0.4, "0s"), (59.6, "1m00s"), (370.0, "6m10s"), (7500.0, "2h05m"), (273_600.0, "3d04h"), (-1.0, "?")];
        for (value, text) in times {
            assert_eq!(duration(value), text);
        }
        for (value, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_494_416_256, "1,494,416,256")] {
            assert_eq!(thousands(value), text);
        }
    }

    #[test]
    fn escaped_text_holds_no_markup_and_no_control_character() {
        assert_eq!(
            escape("<a href=\"x\">'&'\0\u{1b}\n"),
            "&lt;a href=&quot;x&quot;&gt;&#39;&amp;&#39;\u{fffd}\u{fffd}\n"
        );
    }
}
