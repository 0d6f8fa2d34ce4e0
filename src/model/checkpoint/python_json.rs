//! JSON as Python's `json` module writes it, and the types to which the reference holds a configuration's values.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

/// The key under which transformers writes a float that JSON has no number for.
const FLOAT: &str = "__float__";

/// Reads JSON in which `NaN`, `Infinity` and `-Infinity` may stand for numbers, as Python writes them. Each becomes
/// `{"__float__": "NaN"}`, which is how transformers writes the same; [`number`] reads both.
///
/// # Errors
/// Where it is no JSON.
pub fn parse(bytes: &[u8]) -> Result<Value, String> {
    serde_json::from_slice(&tag_bare_floats(bytes)).map_err(|e| e.to_string())
}

/// The same bytes with the bare words of Python's floats replaced by what stands for them.
fn tag_bare_floats(bytes: &[u8]) -> Cow<'_, [u8]> {
    const WORDS: [&[u8]; 3] = [b"-Infinity", b"Infinity", b"NaN"];
    let mut tagged: Vec<u8> = Vec::new();
    let (mut at, mut copied, mut in_string) = (0, 0, false);
    while let Some(&byte) = bytes.get(at) {
        let rest = &bytes[at..];
        let word = WORDS.iter().find(|word| !in_string && rest.starts_with(word));
        if let Some(word) = word {
            tagged.extend_from_slice(&bytes[copied..at]);
            tagged.extend_from_slice(json!({ FLOAT: String::from_utf8_lossy(word) }).to_string().as_bytes());
            at += word.len();
            copied = at;
            continue;
        }
        match byte {
            b'"' => in_string = !in_string,
            b'\\' if in_string => at += 1,
            _ => {}
        }
        at += 1;
    }
    if copied == 0 {
        return Cow::Borrowed(bytes);
    }
    tagged.extend_from_slice(&bytes[copied..]);
    Cow::Owned(tagged)
}

/// The float that a value is, one that JSON has no number for included.
pub fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Object(map) if map.len() == 1 => match map.get(FLOAT)?.as_str()? {
            "NaN" => Some(f64::NAN),
            "Infinity" => Some(f64::INFINITY),
            "-Infinity" => Some(f64::NEG_INFINITY),
            _ => None,
        },
        other => other.as_f64(),
    }
}

/// An integer that is not negative, which may be written as a float: `9408.0`.
pub fn whole(value: &Value) -> Option<u64> {
    let float = |v: &f64| v.fract() == 0.0 && (0.0..u64::MAX as f64).contains(v);
    value.as_u64().or_else(|| value.as_f64().filter(float).map(|v| v as u64))
}

/// What Python takes for false: null, false, zero, and what is empty.
pub fn is_falsy(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(n) => n.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

/// A value for a message, cut short where it is long.
pub fn quote(value: &Value) -> String {
    const MOST: usize = 80;
    let text = match number(value) {
        Some(v) if !v.is_finite() => format!("{v}"),
        _ => value.to_string(),
    };
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

/// Names of which one would be right, for a message.
pub fn one_of(names: &[&str]) -> String {
    names.iter().map(|name| format!("{name:?}")).collect::<Vec<_>>().join(" or ")
}

/// What a key may hold. The reference's classes tell an integer from a float and both from a boolean.
#[derive(Debug, Clone, Copy)]
pub enum Type {
    /// An integer within these bounds, both included.
    Integer(i64, i64),
    /// A number with a decimal point or an exponent.
    Float,
    /// Such a number of at least 0, and finite.
    FiniteFloat,
    /// Either.
    Number,
    /// True or false.
    Flag,
    /// A string.
    Text,
    /// A list of integers.
    Integers,
    /// A list of strings.
    Texts,
    /// Whatever the first of them or the second may hold.
    Either(&'static Type, &'static Type),
    /// Null.
    Null,
}

impl Type {
    fn holds(&self, value: &Value) -> bool {
        let all =
            |holds: &dyn Fn(&Value) -> bool| value.as_array().is_some_and(|list| list.iter().all(holds));
        match self {
            Self::Integer(least, most) => value.as_i64().is_some_and(|n| (*least..=*most).contains(&n)),
            Self::Float => value.is_f64() || value.is_object() && number(value).is_some(),
            Self::FiniteFloat => value.is_f64() && value.as_f64().is_some_and(|v| v >= 0.0),
            Self::Number => number(value).is_some(),
            Self::Flag => value.is_boolean(),
            Self::Text => value.is_string(),
            Self::Integers => all(&|v| v.is_i64()),
            Self::Texts => all(&|v| v.is_string()),
            Self::Either(one, other) => one.holds(value) || other.holds(value),
            Self::Null => value.is_null(),
        }
    }

    fn describe(&self) -> String {
        match self {
            Self::Integer(i64::MIN, i64::MAX) => "an integer".into(),
            Self::Integer(least, most) => format!("at least {least} and at most {most}, an integer"),
            Self::Float => "a float".into(),
            Self::FiniteFloat => "a finite float of at least 0".into(),
            Self::Number => "a number".into(),
            Self::Flag => "true or false".into(),
            Self::Text => "a string".into(),
            Self::Integers => "a list of integers".into(),
            Self::Texts => "a list of strings".into(),
            Self::Either(one, other) => format!("{} or {}", one.describe(), other.describe()),
            Self::Null => "null".into(),
        }
    }
}

/// What is wrong with the values of these keys, where they are there. `prefix` stands before the key's name.
pub fn check_types(section: &Map<String, Value>, prefix: &str, keys: &[(&str, Type)]) -> Vec<String> {
    let fault = |(key, kind): &(&str, Type)| {
        let value = section.get(*key).filter(|value| !kind.holds(value))?;
        Some(format!("{prefix}{key} is {}, must be {}", quote(value), kind.describe()))
    };
    keys.iter().filter_map(fault).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_python_writes_for_floats_is_read() {
        let text = br#"{"a": NaN, "b": [-Infinity, Infinity, 1.5], "c": "NaN \" Infinity", "NaN": {"__float__": "NaN"}}"#;
        let value = parse(text).unwrap();
        assert!(number(&value["a"]).unwrap().is_nan() && number(&value["NaN"]).unwrap().is_nan());
        let numbers: Vec<f64> = value["b"].as_array().unwrap().iter().filter_map(number).collect();
        assert_eq!(numbers, [f64::NEG_INFINITY, f64::INFINITY, 1.5]);
        assert_eq!(value["c"], "NaN \" Infinity");
        assert!(matches!(tag_bare_floats(b"{\"c\": \"NaN\\\\\"}"), Cow::Borrowed(_)));
        for broken in [&b"{\"a\": nan}"[..], b"{\"a\": NaNN}", b"{\"a\": --Infinity}", b"{\"a", b"\"\\"] {
            assert!(parse(broken).is_err(), "{}", String::from_utf8_lossy(broken));
        }
    }

    #[test]
    fn the_last_of_two_equal_keys_counts_as_in_python() {
        assert_eq!(parse(br#"{"a": 1, "a": 2}"#).unwrap()["a"], 2);
    }

    #[test]
    fn integers_may_be_written_as_floats_where_they_are_asked_for_as_whole() {
        assert_eq!(whole(&json!(9408.0)), Some(9408));
        assert_eq!(whole(&json!(u64::MAX)), Some(u64::MAX));
        for other in [json!(9408.5), json!(-1), json!(1e30), json!("1"), json!(true), json!(null)] {
            assert_eq!(whole(&other), None, "{other}");
        }
    }

    #[test]
    fn types_are_told_apart_as_the_reference_does() {
        let keys = [
            ("a", Type::Integer(1, 8)),
            ("b", Type::Float),
            ("c", Type::Either(&Type::Flag, &Type::Null)),
            ("d", Type::Integers),
        ];
        let faults = |value: Value| check_types(value.as_object().unwrap(), "x.", &keys);
        assert!(faults(json!({"a": 1, "b": 1.0, "c": null, "d": [1, -2]})).is_empty());
        assert!(faults(json!({})).is_empty());
        assert_eq!(faults(json!({"a": 9})), ["x.a is 9, must be at least 1 and at most 8, an integer"]);
        assert_eq!(faults(json!({"a": 1.0, "b": 1})).len(), 2);
        assert_eq!(faults(json!({"a": true, "c": 0, "d": [1.0]})).len(), 3);
        assert_eq!(faults(json!({"c": "x"})), ["x.c is \"x\", must be true or false or null"]);
        assert!(quote(&json!("ä".repeat(200))).chars().count() < 90);
    }
}
