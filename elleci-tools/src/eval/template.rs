//! Jinja templates and expressions over the columns of a row.
//!
//! Jinja's own filters, and:
//!
//! | filter | what it gives |
//! |---|---|
//! | `clean` | white space trimmed, ` [title]` to `. `, what stands in square brackets removed, double spaces made single: the treatment that the multilingual ARC, HellaSwag and TruthfulQA get in the harness |
//! | `lower_first` | the first character in lower case |
//! | `letter_index` | A → 0, B → 1, … |
//! | `regex_replace(pattern, replacement)` | every match replaced |
//!
//! A name that is no column of the row is an error.

use std::sync::OnceLock;

use anyhow::{Context, bail, ensure};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, UndefinedBehavior, Value};
use regex::Regex;

/// A row of a data set by column.
pub type Row = serde_json::Map<String, serde_json::Value>;

/// The environment of all templates.
pub fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    let syntax = SyntaxConfig::builder().keep_trailing_newline(true).build();
    environment.set_syntax(syntax.unwrap_or_else(|_| unreachable!("the delimiters are Jinja's own")));
    // Steps of a template at most: a definition must not run for ever.
    environment.set_fuel(Some(1_000_000));
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.add_filter("clean", |text: &str| clean(text));
    environment.add_filter("lower_first", |text: &str| lower_first(text));
    environment.add_filter("letter_index", letter_index);
    environment.add_filter("regex_replace", |text: &str, pattern: &str, replacement: &str| {
        let pattern = Regex::new(pattern).map_err(|e| Error::new(ErrorKind::InvalidOperation, e.to_string()))?;
        Ok::<_, Error>(pattern.replace_all(text, replacement).into_owned())
    });
    environment
}

/// As the harness prepares texts that were translated from WikiHow and the like.
fn clean(text: &str) -> String {
    static BRACKETS: OnceLock<Regex> = OnceLock::new();
    let brackets = BRACKETS.get_or_init(|| Regex::new(r"\[.*?\]").expect("the pattern is sound"));
    let text = text.trim().replace(" [title]", ". ");
    brackets.replace_all(&text, "").replace("  ", " ")
}

fn lower_first(text: &str) -> String {
    let mut rest = text.chars();
    rest.next().map_or(String::new(), |first| first.to_lowercase().chain(rest).collect())
}

fn letter_index(letter: &str) -> Result<usize, Error> {
    match letter.trim().as_bytes() {
        [byte @ b'A'..=b'Z'] => Ok(usize::from(byte - b'A')),
        _ => Err(Error::new(ErrorKind::InvalidOperation, format!("`{letter}` is no letter from A to Z"))),
    }
}

/// The row as templates see it.
pub fn context(row: &Row) -> Value {
    Value::from(Serde(row))
}

/// A template, compiled.
pub struct Template<'e> {
    source: &'e str,
    compiled: minijinja::Template<'e, 'e>,
}

impl<'e> Template<'e> {
    /// Compiles `source`.
    ///
    /// # Errors
    /// What the template engine reports.
    pub fn new(environment: &'e Environment<'_>, source: &'e str) -> anyhow::Result<Template<'e>> {
        let compiled = environment.template_from_str(source).with_context(|| format!("template {source:?}"))?;
        Ok(Template { source, compiled })
    }

    /// The template with a row's values.
    ///
    /// # Errors
    /// What the template engine reports.
    pub fn render(&self, context: &Value) -> anyhow::Result<String> {
        self.compiled.render(context).with_context(|| format!("template {:?}", self.source))
    }
}

/// An expression, compiled.
pub struct Expression<'e> {
    source: &'e str,
    compiled: minijinja::Expression<'e, 'e>,
}

impl<'e> Expression<'e> {
    /// Compiles `source`.
    ///
    /// # Errors
    /// What the template engine reports.
    pub fn new(environment: &'e Environment<'_>, source: &'e str) -> anyhow::Result<Expression<'e>> {
        let compiled = environment.compile_expression(source).with_context(|| format!("expression {source:?}"))?;
        Ok(Expression { source, compiled })
    }

    /// Its value with those of a row.
    ///
    /// # Errors
    /// What the template engine reports.
    pub fn evaluate(&self, context: &Value) -> anyhow::Result<Value> {
        self.compiled.eval(context).with_context(|| format!("expression {:?}", self.source))
    }

    /// The strings of an expression whose value is a string or a list of them.
    ///
    /// # Errors
    /// Another value.
    pub fn strings(&self, context: &Value) -> anyhow::Result<Vec<String>> {
        let value = self.evaluate(context)?;
        if let Some(text) = value.as_str() {
            return Ok(vec![text.to_string()]);
        }
        let items = value.try_iter().with_context(|| format!("expression {:?} must give a list", self.source))?;
        let text = |item: Value| match item.as_str() {
            Some(text) => Ok(text.to_string()),
            None => bail!("expression {:?} gives {item:?} where a text is needed", self.source),
        };
        items.map(text).collect()
    }
}

/// The indices of right choices: from an index, the text of a choice, or a list of either.
///
/// # Errors
/// A value of another kind, or a choice that there is not.
pub fn gold(value: &Value, choices: &[String]) -> anyhow::Result<Vec<usize>> {
    let one = |value: &Value| -> anyhow::Result<usize> {
        let index = match value.as_str() {
            Some(text) => choices.iter().position(|c| c == text),
            None => value.as_usize(),
        };
        let index = index.with_context(|| format!("`target` is {value:?}, which is no choice"))?;
        ensure!(index < choices.len(), "`target` is {index}, but there are {} choices", choices.len());
        Ok(index)
    };
    if value.as_str().is_none() && value.as_usize().is_none() {
        let items = value.try_iter().with_context(|| format!("`target` is {value:?}"))?;
        let indices: Vec<usize> = items.map(|v| one(&v)).collect::<anyhow::Result<_>>()?;
        ensure!(!indices.is_empty(), "`target` is {value:?}: no choice is right");
        return Ok(indices);
    }
    Ok(vec![one(value)?])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(json: serde_json::Value) -> Value {
        context(json.as_object().unwrap())
    }

    #[test]
    fn templates_do_what_the_definitions_need() {
        let e = environment();
        let r = row(serde_json::json!({
            "text": "uno due tre,", "premise": " Piove. ", "b": "ALLA Fine è", "list": ["x [a] y", "", null, "z"], "n": "3",
            "label": 1, "s": "perché no", "start": 0, "end": 6
        }));
        let t = |template| Template::new(&e, template).unwrap().render(&r).unwrap();
        let x = |expression| Expression::new(&e, expression).unwrap();
        assert_eq!(t("{{ (text | split(' '))[:-1] | join(' ') }}|{{ (text | split(' '))[-1] }}"), "uno due|tre,");
        assert_eq!(t("{{ (premise | trim)[:-1] }} <&'>\n"), "Piove <&'>\n");
        assert_eq!(t("{{ b | capitalize }}"), "Alla fine è");
        assert_eq!(t("{{ s[start:end] }}"), "perché");
        assert_eq!(t("{{ s | regex_replace('[aeiou]', '_') }}"), "p_rché n_");
        assert_eq!(x("list | select | map('clean') | list").strings(&r).unwrap(), ["x y", "z"]);
        let choices = ["a".to_string(), "b".to_string()];
        let g = |expression| gold(&x(expression).evaluate(&r).unwrap(), &choices);
        assert_eq!(g("(n | int) - 2").unwrap(), [1]);
        assert_eq!(g("'b'").unwrap(), [1]);
        assert_eq!(g("['b', 0]").unwrap(), [1, 0]);
        assert_eq!(g("'B' | letter_index").unwrap(), [1]);
        assert!(g("label + 1").is_err() && g("'c'").is_err() && g("-1").is_err() && g("none").is_err());
        let error = format!("{:#}", Template::new(&e, "{{ missing }}").unwrap().render(&r).unwrap_err());
        assert!(error.contains("undefined"), "{error}");
    }

    #[test]
    fn text_is_cleaned_as_in_the_harness() {
        for (text, want) in [
            ("  a [title] b  ", "a. b"),
            ("Come fare [step] il pane [substeps] bene", "Come fare il pane bene"),
            ("due  spazi   tre", "due spazi  tre"),
            ("[senza fine", "[senza fine"),
            ("a [b\nc] d", "a [b\nc] d"),
        ] {
            assert_eq!(clean(text), want);
        }
        assert_eq!(lower_first("È vero"), "è vero");
        assert_eq!(lower_first(""), "");
    }
}
