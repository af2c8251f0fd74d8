//! Reading the fields of a request: what has the wrong type or no meaning is refused by name.

use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// An object, read field by field. `null` is as good as no field, and fields that nobody asks for are passed over.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    /// The fields of the body.
    ///
    /// # Errors
    /// When it is no object.
    pub fn of(body: &'a Value) -> Result<Fields<'a>, ApiError> {
        let object = body.as_object().ok_or_else(|| ApiError::invalid("the body must be a JSON object"))?;
        Ok(Fields(object))
    }

    /// The fields of a field.
    ///
    /// # Errors
    /// When it is there and no object.
    pub fn object(&self, name: &str) -> Result<Option<Fields<'a>>, ApiError> {
        self.typed(name, "an object", |v| v.as_object().map(Fields))
    }

    /// A field as it is.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        self.0.get(name).filter(|v| !v.is_null())
    }

    fn typed<T>(
        &self,
        name: &str,
        kind: &str,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| ApiError::field(name, format!("must be {kind}, not {}", kind_of(value))))
    }

    /// True or false; false where there is none.
    ///
    /// # Errors
    /// When it is something else.
    pub fn flag(&self, name: &str) -> Result<bool, ApiError> {
        Ok(self.typed(name, "true or false", Value::as_bool)?.unwrap_or(false))
    }

    /// A string.
    ///
    /// # Errors
    /// When it is something else.
    pub fn string(&self, name: &str) -> Result<Option<&'a str>, ApiError> {
        self.typed(name, "a string", Value::as_str)
    }

    /// A whole number.
    ///
    /// # Errors
    /// When it is something else, or not in `range`.
    pub fn integer(&self, name: &str, range: RangeInclusive<i64>) -> Result<Option<i64>, ApiError> {
        // Clients that have only floats send 1.0.
        let whole = |v: &Value| v.as_i64().or_else(|| v.as_f64().filter(|f| f.fract() == 0.0).map(|f| f as i64));
        within(name, self.typed(name, "a whole number", whole)?, &range)
    }

    /// A count that is not negative.
    ///
    /// # Errors
    /// When it is something else, or larger than `most`.
    pub fn count(&self, name: &str, most: usize) -> Result<Option<usize>, ApiError> {
        Ok(self.integer(name, 0..=most as i64)?.map(|n| n as usize))
    }

    /// A number.
    ///
    /// # Errors
    /// When it is something else, or not in `range`.
    pub fn number(&self, name: &str, range: RangeInclusive<f32>) -> Result<Option<f32>, ApiError> {
        within(name, self.typed(name, "a number", |v| v.as_f64().map(|f| f as f32))?, &range)
    }

    /// One string or a list of strings, at most `most` of at most `longest` bytes each.
    ///
    /// # Errors
    /// When it is something else.
    pub fn strings(&self, name: &str, most: usize, longest: usize) -> Result<Vec<String>, ApiError> {
        let Some(value) = self.get(name) else { return Ok(Vec::new()) };
        let list = match value {
            Value::String(s) => vec![s.clone()],
            Value::Array(items) => items
                .iter()
                .map(|i| i.as_str().map(str::to_string))
                .collect::<Option<_>>()
                .ok_or_else(|| ApiError::field(name, "must be a string or a list of strings"))?,
            _ => return Err(ApiError::field(name, "must be a string or a list of strings")),
        };
        if list.len() > most {
            return Err(ApiError::field(name, format!("holds {} strings; it may hold {most}", list.len())));
        }
        if let Some(long) = list.iter().map(String::len).find(|bytes| *bytes > longest) {
            return Err(ApiError::field(name, format!("holds a string of {long} bytes; it may have {longest}")));
        }
        Ok(list)
    }

    /// Refuses a field that asks for what this server does not do, unless its value is one that asks for nothing.
    ///
    /// # Errors
    /// When it asks for something.
    pub fn refuse(&self, name: &str, asks_for_nothing: impl FnOnce(&Value) -> bool) -> Result<(), ApiError> {
        match self.get(name) {
            Some(value) if !asks_for_nothing(value) => Err(ApiError::field(name, "is not supported by this server")),
            _ => Ok(()),
        }
    }
}

fn within<T: PartialOrd + Display>(
    name: &str,
    value: Option<T>,
    range: &RangeInclusive<T>,
) -> Result<Option<T>, ApiError> {
    match value {
        Some(v) if !range.contains(&v) => {
            Err(ApiError::field(name, format!("is {v}; it must be {} to {}", range.start(), range.end())))
        }
        value => Ok(value),
    }
}

/// What a JSON value is, in words.
pub fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn wrong_fields_are_named() {
        let body = json!({ "a": 3, "b": "x", "c": null, "d": [1], "e": 2.5, "f": 4.0, "g": ["x", "è"] });
        let fields = Fields::of(&body).unwrap();
        assert_eq!(fields.integer("a", 0..=9), Ok(Some(3)));
        assert_eq!(fields.integer("f", 0..=9), Ok(Some(4)));
        assert_eq!(fields.flag("c"), Ok(false));
        assert_eq!(fields.strings("b", 4, 1), Ok(vec!["x".to_string()]));
        assert_eq!(fields.count("missing", 9), Ok(None));
        for (result, name, part) in [
            (fields.integer("a", 0..=2).map(drop), "a", "is 3; it must be 0 to 2"),
            (fields.integer("e", 0..=9).map(drop), "e", "must be a whole number, not a number"),
            (fields.number("b", 0.0..=1.0).map(drop), "b", "must be a number, not a string"),
            (fields.flag("a").map(drop), "a", "true or false"),
            (fields.strings("d", 4, 1).map(drop), "d", "list of strings"),
            (fields.strings("g", 4, 1).map(drop), "g", "holds a string of 2 bytes; it may have 1"),
            (fields.object("a").map(drop), "a", "an object"),
            (fields.refuse("b", |v| v == "y"), "b", "not supported"),
        ] {
            let error = result.unwrap_err();
            assert_eq!(error.param.as_deref(), Some(name));
            assert!(error.message.contains(part), "{}", error.message);
        }
        assert!(Fields::of(&json!([])).is_err());
    }
}
