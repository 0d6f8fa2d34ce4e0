//! Filters that make numbers.

use super::{integer, string};
use crate::processor::jinja::interpreter::Bound;
use crate::processor::jinja::python_text;
use crate::processor::jinja::value::Value;
use crate::processor::jinja::{Result, refuse};

/// Python's grammar of numbers in texts, as far as it is Rust's too.
fn number_text(text: &str) -> Result<&str> {
    let text = python_text::strip(text, None, true, true);
    if text.contains('_') || !text.is_ascii() {
        return refuse(format!("the number {text:?} is not supported"));
    }
    Ok(text)
}

pub(super) fn to_int(value: &Value, default: Value) -> Result<Value> {
    let truncated = |number: f64| match number {
        _ if !number.is_finite() => Ok(default.clone()),
        _ if number.abs() < 9e18 => Ok(Value::Int(number.trunc() as i64)),
        _ => refuse(format!("the integer {number} does not fit into 64 bits")),
    };
    match value {
        Value::Undefined => refuse("int of an undefined value is not supported"),
        Value::Float(number) if number.is_infinite() => refuse("int of infinity is not supported"),
        Value::Float(number) => truncated(*number),
        Value::Str(text) => {
            let text = number_text(text)?;
            let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
            if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) {
                return match text.parse() {
                    Ok(number) => Ok(Value::Int(number)),
                    Err(_) => refuse(format!("the integer {text} does not fit into 64 bits")),
                };
            }
            text.parse().map_or(Ok(default.clone()), truncated)
        }
        _ => Ok(value.as_int().map_or(default, Value::Int)),
    }
}

pub(super) fn to_float(value: &Value, default: Value) -> Result<Value> {
    match value {
        Value::Undefined => refuse("float of an undefined value is not supported"),
        Value::Str(text) => Ok(number_text(text)?.parse().map_or(default, Value::Float)),
        _ => Ok(value.as_exact_float()?.map_or(default, Value::Float)),
    }
}

pub(super) fn round(value: &Value, arguments: Bound) -> Result<Value> {
    let [precision, method] = arguments.take(["precision", "method"])?;
    let precision = precision.map_or(Ok(0), |precision| integer(&precision, "round"))?;
    let method = method.map_or(Ok("common".into()), |method| string(&method, "round"))?;
    let Some(precision) = usize::try_from(precision).ok().filter(|&precision| precision <= 20) else {
        return refuse(format!("round to {precision} digits is not supported"));
    };
    if let (Some(number), "common") = (value.as_int(), &*method) {
        return Ok(Value::Int(number));
    }
    let Some(number) = value.as_exact_float()?.filter(|number| number.is_finite()) else {
        return refuse(format!("round of a {} is not supported", value.type_name()));
    };
    let scale = 10_f64.powi(precision as i32);
    match &*method {
        // The decimal digits nearest to the number itself, as Python rounds.
        "common" => Ok(format!("{number:.precision$}").parse().map_or(Value::Undefined, Value::Float)),
        // Through an integer, which has no negative zero.
        "floor" => Ok(Value::Float(((number * scale).floor() + 0.0) / scale)),
        "ceil" => Ok(Value::Float(((number * scale).ceil() + 0.0) / scale)),
        _ => refuse(format!("round has no method {method:?}")),
    }
}
