//! Manual pages (man macros) to paragraphs.

/// The paragraphs of a manual page; listings, comments and macro definitions are left out.
pub fn paragraphs(page: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut current = String::new();
    let mut state = State::Text;
    for line in page.lines() {
        match state {
            State::Definition if line.trim_end() == ".." => state = State::Text,
            State::Definition => continue,
            State::Listing if matches!(macro_name(line), Some("fi" | "EE" | "Ve")) => state = State::Text,
            State::Listing => continue,
            State::Text => match macro_name(line) {
                None => append(&mut current, &unescape(line)),
                Some(name) => {
                    let arguments = arguments(line);
                    state = request(name, &arguments, &mut current, &mut out);
                }
            },
        }
    }
    end(&mut current, &mut out);
    out
}

#[derive(Clone, Copy)]
enum State {
    Text,
    Definition,
    Listing,
}

/// The macro that a control line calls.
fn macro_name(line: &str) -> Option<&str> {
    let body = line.strip_prefix(['.', '\''])?.trim_start();
    Some(body.split([' ', '\t', '"', '\\']).next().unwrap_or_default())
}

fn request(name: &str, arguments: &[String], current: &mut String, out: &mut Vec<String>) -> State {
    match name {
        "de" | "de1" | "am" | "ig" => return State::Definition,
        "nf" | "EX" | "Vb" => {
            end(current, out);
            return State::Listing;
        }
        "SH" | "SS" => {
            end(current, out);
            append(current, &arguments.join(" "));
            end(current, out);
        }
        "PP" | "P" | "LP" | "TP" | "TQ" | "HP" | "br" | "sp" | "RS" | "RE" => end(current, out),
        "IP" => {
            end(current, out);
            // The mark of a list item, unless it is a mere bullet.
            let mark = arguments.first().map(String::as_str).unwrap_or_default();
            if mark.chars().any(char::is_alphanumeric) {
                append(current, mark);
            }
        }
        "B" | "I" | "SM" | "SB" => append(current, &arguments.join(" ")),
        // Alternating fonts join without spaces.
        "BR" | "RB" | "BI" | "IB" | "IR" | "RI" => append(current, &arguments.concat()),
        _ => {}
    }
    State::Text
}

fn append(current: &mut String, text: &str) {
    for word in text.split_whitespace() {
        if !current.is_empty() {
            current.push(' ');
        }
        current.push_str(word);
    }
}

fn end(current: &mut String, out: &mut Vec<String>) {
    if !current.is_empty() {
        out.push(std::mem::take(current));
    }
}

/// A control line's arguments: by spaces, quotes keep them together.
fn arguments(line: &str) -> Vec<String> {
    let body = line.strip_prefix(['.', '\'']).unwrap_or(line).trim_start();
    let rest = body.split_once([' ', '\t']).map_or("", |(_, r)| r);
    let mut out = Vec::new();
    let mut current = String::new();
    let mut quoted = false;
    let mut chars = rest.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                current.push('"');
            }
            '"' => quoted = !quoted,
            '\\' if chars.peek() == Some(&'"') => break,
            '\\' => {
                current.push(c);
                current.extend(chars.next());
            }
            c if c.is_whitespace() && !quoted => {
                if !current.is_empty() {
                    out.push(unescape(&std::mem::take(&mut current)));
                }
            }
            c => current.push(c),
        }
    }
    if !current.is_empty() {
        out.push(unescape(&current));
    }
    out
}

/// Resolves escapes: special characters stay, fonts and sizes go.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next() {
            None | Some('"' | '#') => break,
            Some('f' | 'F' | 'm' | 'M' | 'n' | 'k' | 'g' | 'V' | 'Y') => {
                name(&mut chars);
            }
            Some('*') => out.push_str(string_value(&name(&mut chars))),
            Some('(') => out.push_str(special(&take(&mut chars, 2))),
            Some('[') => out.push_str(special(&bracketed(&mut chars))),
            Some('s') => {
                let mut rest = chars.clone();
                if matches!(rest.next(), Some('+' | '-')) {
                    chars.next();
                }
                chars.next();
            }
            Some('h' | 'v' | 'w' | 'D' | 'Z' | 'o' | 'b' | 'l' | 'L' | 'x' | 'N') => {
                let quote = chars.next();
                chars.by_ref().take_while(|c| Some(*c) != quote).for_each(drop);
            }
            Some('-') => out.push('-'),
            Some('e' | '\\' | 'E') => out.push('\\'),
            Some(' ' | '~' | '0' | 't') => out.push(' '),
            Some('&' | '|' | '^' | '/' | ',' | ')' | '%' | ':' | '{' | '}' | 'c' | 'p' | 'd' | 'u') => {}
            Some('\'') => out.push('\''),
            Some('`') => out.push('`'),
            Some('.') => out.push('.'),
            Some(other) => out.push(other),
        }
    }
    out
}

/// A name after `\f`, `\*` and the like: `x`, `(xx` or `[xxx]`.
fn name(chars: &mut std::str::Chars) -> String {
    match chars.next() {
        Some('(') => take(chars, 2),
        Some('[') => bracketed(chars),
        Some(c) => c.to_string(),
        None => String::new(),
    }
}

fn take(chars: &mut std::str::Chars, n: usize) -> String {
    chars.by_ref().take(n).collect()
}

fn bracketed(chars: &mut std::str::Chars) -> String {
    chars.by_ref().take_while(|c| *c != ']').collect()
}

/// The strings that manual pages use.
fn string_value(name: &str) -> &'static str {
    match name {
        "lq" | "L\"" => "“",
        "rq" | "R\"" => "”",
        "Aq" => "'",
        "--" => "–",
        "R" => "®",
        "Tm" => "™",
        _ => "",
    }
}

fn special(name: &str) -> &'static str {
    match name {
        "aq" | "cq" | "oq" => "'",
        "dq" => "\"",
        "lq" => "“",
        "rq" => "”",
        "Fo" => "«",
        "Fc" => "»",
        "em" => "—",
        "en" => "–",
        "hy" | "mi" => "-",
        "ha" => "^",
        "ti" => "~",
        "rs" => "\\",
        "ga" => "`",
        "bu" => "•",
        "co" => "©",
        "rg" => "®",
        "tm" => "™",
        "de" => "°",
        "+-" => "±",
        "mu" => "×",
        "->" => "→",
        "<-" => "←",
        "<=" => "≤",
        ">=" => "≥",
        "!=" => "≠",
        "*m" => "μ",
        "'a" => "á",
        "'e" => "é",
        "`a" => "à",
        "`e" => "è",
        "`i" => "ì",
        "`o" => "ò",
        "`u" => "ù",
        "`E" => "È",
        ":o" => "ö",
        ":u" => "ü",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::paragraphs;

    #[test]
    fn prose_stays_and_markup_goes() {
        let page = r#".\" comment
.de IX
.SH no
..
.TH LS 1 "2020"
.SH "NOME\fR"
ls \- elenca il contenuto \(lqdelle\(rq
directory
.PP
Usa \fB\-l\fR o \fI\,FILE\/\fP, \f[CR]x\f[] e
.BR ls (1),
.B "due parole"
.EX
no
.EE
.IP \(bu 3
punto
.TP
.B \-a
non nascondere \s-1NULLA\s0\&.\" no
"#;
        let want = [
            "NOME",
            "ls - elenca il contenuto “delle” directory",
            "Usa -l o FILE, x e ls(1), due parole",
            "punto",
            "-a non nascondere NULLA.",
        ];
        assert_eq!(paragraphs(page), want);
    }
}
