//! HTML to paragraphs: block elements end a paragraph, navigation and listings are left out.

use std::borrow::Cow;

/// Elements that are left out with all that is in them.
const SKIPPED: &[&str] =
    &["head", "script", "style", "nav", "header", "footer", "aside", "pre", "svg", "button", "form", "select"];
/// Elements of these classes or ids, too: the navigation of the manuals that `demo` reads.
const SKIPPED_CLASSES: &[&str] = &[
    "nav_table",
    "navheader",
    "navfooter",
    "toc",
    "docnav",
    "related",
    "sphinxsidebar",
    "headerlink",
    "footer",
    "banner",
    "menu",
    "contents",
    "shortcontents",
    "tocframe",
    "topmenu",
    "highlight",
    "programlisting",
    "screen",
    "index",
];
/// Elements that stand in a line of text; all others begin and end a paragraph.
const INLINE: &[&str] = &[
    "a", "abbr", "acronym", "b", "bdi", "big", "cite", "code", "del", "dfn", "em", "font", "i", "img", "ins", "kbd",
    "label", "mark", "q", "s", "samp", "small", "span", "strike", "strong", "sub", "sup", "time", "tt", "u", "var",
    "wbr",
];
/// Elements without an end.
const VOID: &[&str] =
    &["area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"];

/// The paragraphs of a page, white space collapsed.
pub fn paragraphs(html: &str) -> Vec<String> {
    let mut out = Out::default();
    // The element that is being left out, and how many of its name are open.
    let mut skipping: Option<(String, usize)> = None;
    let mut rest = html;
    while let Some(open) = rest.find('<') {
        if skipping.is_none() {
            out.text(&rest[..open]);
        }
        rest = &rest[open..];
        let Some(tag) = Tag::parse(rest) else {
            // A lone `<`.
            if skipping.is_none() {
                out.text("<");
            }
            rest = &rest[1..];
            continue;
        };
        rest = &rest[tag.len..];
        if let Some((name, depth)) = &mut skipping {
            if *name == tag.name && !tag.empty {
                *depth = if tag.closing { *depth - 1 } else { *depth + 1 };
                if *depth == 0 {
                    skipping = None;
                }
            }
            continue;
        }
        if !INLINE.contains(&tag.name.as_str()) {
            out.end();
        }
        if !tag.closing && !tag.empty && tag.is_skipped() {
            skipping = Some((tag.name, 1));
        }
    }
    if skipping.is_none() {
        out.text(rest);
    }
    out.end();
    out.paragraphs
}

#[derive(Default)]
struct Out {
    paragraphs: Vec<String>,
    current: String,
}

impl Out {
    fn text(&mut self, raw: &str) {
        let text: Cow<str> = html_escape::decode_html_entities(raw);
        for c in text.chars() {
            // Soft hyphens and zero-width spaces are layout.
            match c {
                '\u{ad}' | '\u{200b}' | '\u{feff}' => {}
                c if c.is_whitespace() => {
                    if !self.current.is_empty() && !self.current.ends_with(' ') {
                        self.current.push(' ');
                    }
                }
                c => self.current.push(c),
            }
        }
    }

    fn end(&mut self) {
        let paragraph = std::mem::take(&mut self.current);
        let paragraph = paragraph.trim();
        if !paragraph.is_empty() {
            self.paragraphs.push(paragraph.to_string());
        }
    }
}

struct Tag {
    name: String,
    attributes: String,
    closing: bool,
    empty: bool,
    len: usize,
}

impl Tag {
    /// The tag, comment or declaration that `text` starts with.
    fn parse(text: &str) -> Option<Tag> {
        if let Some(comment) = text.strip_prefix("<!--") {
            let len = comment.find("-->").map_or(text.len(), |i| i + 7);
            return Some(Tag { name: "span".into(), attributes: String::new(), closing: false, empty: true, len });
        }
        let body = text.strip_prefix('<')?;
        let first = body.chars().next()?;
        if !(first.is_ascii_alphabetic() || matches!(first, '/' | '!' | '?')) {
            return None;
        }
        let len = end_of_tag(text)?;
        let inner = text[1..len - 1].trim_end_matches('/');
        let closing = inner.starts_with('/');
        let inner = inner.trim_start_matches(['/', '!', '?']);
        let (name, attributes) = inner.split_once(|c: char| c.is_whitespace()).unwrap_or((inner, ""));
        let name = name.to_ascii_lowercase();
        let empty = text[..len].ends_with("/>") || VOID.contains(&name.as_str());
        Some(Tag { empty, attributes: attributes.to_string(), closing, name, len })
    }

    fn is_skipped(&self) -> bool {
        SKIPPED.contains(&self.name.as_str())
            || ["class", "id"].iter().any(|a| {
                let value = self.attribute(a).unwrap_or_default();
                value.split_ascii_whitespace().any(|c| SKIPPED_CLASSES.contains(&c))
            })
    }

    fn attribute(&self, name: &str) -> Option<&str> {
        let mut rest = self.attributes.as_str();
        loop {
            let (key, after) = rest.split_once('=')?;
            let quote = after.chars().next().filter(|c| matches!(c, '"' | '\''));
            let (value, next) = match quote {
                Some(q) => after[1..].split_once(q)?,
                None => after.split_once(' ').unwrap_or((after, "")),
            };
            if key.trim().rsplit(' ').next() == Some(name) {
                return Some(value);
            }
            rest = next;
        }
    }
}

/// Bytes up to and with the `>` that is not in quotes.
fn end_of_tag(text: &str) -> Option<usize> {
    let mut quote = None;
    for (i, b) in text.bytes().enumerate() {
        match (quote, b) {
            (None, b'>') => return Some(i + 1),
            (None, b'"' | b'\'') => quote = Some(b),
            (Some(q), b) if q == b => quote = None,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::paragraphs;

    #[test]
    fn prose_stays_and_navigation_goes() {
        let html = "<!DOCTYPE html><html><head><title>no</title></head><body>
            <div class=\"navheader big\"><div>no</div> no</div>
            <h1>Un titolo</h1><p>L&rsquo;acqua <b>&egrave;</b>\n fredda<br/>davvero.<!-- <p>no -->
            <ul><li>uno<li>due <a href='x>y' class=headerlink>no</a></ul><pre>no</pre>
            <table><tr><td>a</td><td>1 < 2 &amp; 3 &gt; 2</td></tr></table>
            <script>if (a < b) { '<p>no' }</script>fine";
        let want = ["Un titolo", "L’acqua è fredda", "davvero.", "uno", "due", "a", "1 < 2 & 3 > 2", "fine"];
        assert_eq!(paragraphs(html), want);
    }

    #[test]
    fn broken_pages_do_no_harm() {
        for html in ["", "<", "<p", "<p>a", "</p></p>a", "<div class=\"toc\"><div>", "<a href=\"", "<!-- x", "a<é>b"] {
            let _ = paragraphs(html);
        }
        assert_eq!(paragraphs("a <p"), ["a <p"]);
    }
}
