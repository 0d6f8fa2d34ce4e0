//! `tojson`, as transformers has it.

use super::integer;
use crate::processor::jinja::formatting::float_repr;
use crate::processor::jinja::interpreter::Bound;
use crate::processor::jinja::value::{Budget, Value};
use crate::processor::jinja::{Result, refuse};

/// How `tojson` writes.
struct Json {
    ascii: bool,
    indent: Option<String>,
    between: String,
    behind_key: String,
    sort_keys: bool,
}

pub(super) fn to_json(value: &Value, arguments: Bound, budget: &Budget) -> Result<Value> {
    let [ascii, indent, separators, sort_keys] =
        arguments.take(["ensure_ascii", "indent", "separators", "sort_keys"])?;
    let is_true = |flag: Option<Value>| flag.is_some_and(|flag| flag.is_true());
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Str(text)) => Some(text.to_string()),
        Some(width) => {
            let width = usize::try_from(integer(&width, "tojson")?).unwrap_or(0);
            budget.bytes(width)?;
            Some(" ".repeat(width))
        }
    };
    let (between, behind_key) = match separators {
        None | Some(Value::None) => (if indent.is_some() { "," } else { ", " }.into(), ": ".into()),
        Some(pair) => match pair.items(budget)?.as_slice() {
            [Value::Str(between), Value::Str(behind_key)] => (between.to_string(), behind_key.to_string()),
            _ => return refuse("tojson takes two separators"),
        },
    };
    let json = Json { ascii: is_true(ascii), indent, between, behind_key, sort_keys: is_true(sort_keys) };
    let mut out = String::new();
    json.write(value, 0, &mut out, budget)?;
    Ok(Value::from(out))
}

impl Json {
    fn write(&self, value: &Value, depth: usize, out: &mut String, budget: &Budget) -> Result<()> {
        budget.step(1)?;
        let before = out.len();
        match value {
            Value::None => out.push_str("null"),
            Value::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
            Value::Int(number) => out.push_str(&number.to_string()),
            Value::Float(number) => out.push_str(&json_float(*number)),
            Value::Str(text) => self.text(text, out),
            Value::List(sequence) | Value::Tuple(sequence) => {
                let items = sequence.items.iter();
                return self.container("[", items, "]", depth, out, budget, |this, item, out| {
                    this.write(item, depth + 1, out, budget)
                });
            }
            Value::Dict(dict) => {
                let mut entries: Vec<_> = dict.entries.iter().collect();
                if self.sort_keys {
                    if entries.iter().any(|(key, _)| key.as_str().is_none()) {
                        return refuse("tojson sorts texts alone");
                    }
                    entries.sort_by(|(a, _), (b, _)| a.as_str().cmp(&b.as_str()));
                }
                return self.container(
                    "{",
                    entries.iter(),
                    "}",
                    depth,
                    out,
                    budget,
                    |this, (key, held), out| {
                        this.text(&json_key(key)?, out);
                        out.push_str(&this.behind_key);
                        this.write(held, depth + 1, out, budget)
                    },
                );
            }
            _ => return refuse(format!("tojson of a {} is not supported", value.type_name())),
        }
        budget.bytes(out.len() - before)
    }

    #[expect(clippy::too_many_arguments)]
    fn container<T>(
        &self,
        open: &str,
        items: impl ExactSizeIterator<Item = T>,
        close: &str,
        depth: usize,
        out: &mut String,
        budget: &Budget,
        write: impl Fn(&Self, T, &mut String) -> Result<()>,
    ) -> Result<()> {
        out.push_str(open);
        let empty = items.len() == 0;
        let line = |depth: usize, out: &mut String| -> Result<()> {
            if let Some(indent) = self.indent.as_ref().filter(|_| !empty) {
                budget.bytes(indent.len().saturating_mul(depth) + 1)?;
                out.push('\n');
                out.push_str(&indent.repeat(depth));
            }
            Ok(())
        };
        for (index, item) in items.enumerate() {
            budget.bytes(self.between.len() + self.behind_key.len())?;
            out.push_str(if index > 0 { &self.between } else { "" });
            line(depth + 1, out)?;
            write(self, item, out)?;
        }
        line(depth, out)?;
        out.push_str(close);
        budget.bytes(2)
    }

    fn text(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

fn json_float(number: f64) -> String {
    match number {
        _ if number.is_nan() => "NaN".into(),
        f64::INFINITY => "Infinity".into(),
        f64::NEG_INFINITY => "-Infinity".into(),
        _ => float_repr(number),
    }
}

fn json_key(key: &Value) -> Result<String> {
    Ok(match key {
        Value::Str(text) => text.to_string(),
        Value::None => "null".into(),
        Value::Bool(flag) => if *flag { "true" } else { "false" }.into(),
        Value::Int(number) => number.to_string(),
        Value::Float(number) => json_float(*number),
        _ => return refuse(format!("a {} cannot be a key in JSON", key.type_name())),
    })
}
