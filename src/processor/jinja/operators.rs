//! What attributes, subscripts and operators make of Python's values.

use super::interpreter::LoopState;
use super::syntax::{Binary, Comparison};
use super::value::{Budget, Range, Value};
use super::{Result, formatting, methods, refuse};

/// `of.name`
pub(super) fn attribute(of: &Value, name: &str, budget: &Budget) -> Result<Value> {
    if name.starts_with("__") || (name.starts_with('_') && !matches!(of, Value::Dict(_))) {
        return refuse(format!("the attribute {name} is not supported"));
    }
    if methods::has_attribute(of, name) {
        return refuse(format!("the method {name} of a {} is not called", of.type_name()));
    }
    match of {
        Value::Undefined => refuse(format!("{name:?} is read of a value that is undefined")),
        Value::Dict(dict) => Ok(dict.get(&Value::from(name), budget)?.unwrap_or(Value::Undefined)),
        Value::Namespace(entries) => {
            let entries = entries.borrow();
            let value = entries.iter().find(|(other, _)| other == name);
            Ok(value.map_or(Value::Undefined, |(_, value)| value.clone()))
        }
        Value::Loop(state) => loop_attribute(state, name),
        Value::Iterator(_) | Value::View(..) | Value::Macro(_) | Value::Function(_) | Value::Markup(_) => {
            refuse(format!("the attribute {name} of a {} is not supported", of.type_name()))
        }
        _ => Ok(Value::Undefined),
    }
}

fn loop_attribute(state: &LoopState, name: &str) -> Result<Value> {
    let (index, length) = (state.index.get(), state.items.len());
    let count = |number: usize| Ok(Value::Int(number as i64));
    match name {
        "index" => count(index + 1),
        "index0" => count(index),
        "revindex" => count(length - index),
        "revindex0" => count(length - index - 1),
        "length" => count(length),
        "depth" => count(state.depth),
        "depth0" => count(state.depth - 1),
        "first" => Ok(Value::Bool(index == 0)),
        "last" => Ok(Value::Bool(index + 1 == length)),
        "previtem" => Ok(index.checked_sub(1).map_or(Value::Undefined, |at| state.items[at].clone())),
        "nextitem" => Ok(state.items.get(index + 1).cloned().unwrap_or(Value::Undefined)),
        "cycle" | "changed" => refuse(format!("loop.{name} is not called")),
        _ => Ok(Value::Undefined),
    }
}

/// `of[key]`
pub(super) fn item(of: &Value, key: &Value, budget: &Budget) -> Result<Value> {
    let at = |items: &[Value], index: i64| {
        let index = if index < 0 { index + items.len() as i64 } else { index };
        usize::try_from(index).ok().and_then(|index| items.get(index).cloned()).unwrap_or(Value::Undefined)
    };
    match (of, key.as_int()) {
        (Value::List(sequence) | Value::Tuple(sequence), Some(index)) => {
            return Ok(at(&sequence.items, index));
        }
        (Value::Str(_) | Value::Range(_), Some(index)) => return Ok(at(&of.items(budget)?, index)),
        (Value::Dict(dict), _) => {
            if matches!(key, Value::Undefined) {
                return refuse("an undefined value as a key is not supported");
            }
            if let Some(value) = dict.get(key, budget)? {
                return Ok(value);
            }
        }
        (Value::Undefined, _) => return refuse("an item is read of a value that is undefined"),
        (
            Value::View(..) | Value::Iterator(_) | Value::Markup(_) | Value::Macro(_) | Value::Loop(_),
            None,
        ) if key.as_str().is_none() => {
            return refuse(format!("an item of a {} is not supported", of.type_name()));
        }
        _ => {}
    }
    match key {
        Value::Str(name) => attribute(of, name, budget),
        Value::Markup(_) => refuse("a text marked as safe as a key is not supported"),
        _ => Ok(Value::Undefined),
    }
}

/// `of[start:stop:step]`
pub(super) fn slice(of: &Value, [start, stop, step]: [Option<i64>; 3], budget: &Budget) -> Result<Value> {
    if !matches!(of, Value::Str(_) | Value::List(_) | Value::Tuple(_)) {
        return refuse(format!("a slice of a {} is not supported", of.type_name()));
    }
    let items = of.items(budget)?;
    let step = step.unwrap_or(1);
    if step == 0 {
        return refuse("the step of a slice is 0");
    }
    let length = items.len() as i64;
    // Where the bounds are clipped to, as Python's slices do.
    let (low, high) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let clip = |bound: Option<i64>, default: i64| {
        bound.map_or(default, |b| if b < 0 { b.saturating_add(length) } else { b }.clamp(low, high))
    };
    let (start, stop) =
        if step > 0 { (clip(start, low), clip(stop, high)) } else { (clip(start, high), clip(stop, low)) };
    let chosen: Vec<Value> = Range { start, stop, step }
        .items()
        .into_iter()
        .filter_map(|index| items.get(usize::try_from(index.as_int()?).ok()?).cloned())
        .collect();
    match of {
        Value::Str(_) => {
            let text: String = chosen.iter().filter_map(Value::as_str).collect();
            budget.text(text)
        }
        Value::Tuple(_) => budget.tuple(chosen),
        _ => budget.list(chosen),
    }
}

pub(super) fn compare(operator: Comparison, left: &Value, right: &Value, budget: &Budget) -> Result<bool> {
    match operator {
        Comparison::Eq => left.equals(right, budget),
        Comparison::Ne => Ok(!left.equals(right, budget)?),
        Comparison::Lt => left.is_less(right, budget),
        Comparison::Gt => right.is_less(left, budget),
        Comparison::Le | Comparison::Ge => {
            let (low, high) = if operator == Comparison::Le { (left, right) } else { (right, left) };
            Ok(low.is_less(high, budget)? || low.equals(high, budget)?)
        }
        Comparison::In => right.contains(left, budget),
        Comparison::NotIn => Ok(!right.contains(left, budget)?),
    }
}

/// Arithmetic, and what Python's operators do with texts and lists.
pub(super) fn binary(operator: Binary, left: &Value, right: &Value, budget: &Budget) -> Result<Value> {
    match (operator, left, right) {
        (Binary::Mod, Value::Str(format), _) => {
            return budget.text(formatting::percent(format, right, budget)?);
        }
        (Binary::Add, Value::Str(a), Value::Str(b)) => {
            budget.bytes(a.len() + b.len())?;
            return Ok(Value::from(format!("{a}{b}")));
        }
        (Binary::Add, Value::List(a), Value::List(b)) => {
            return budget.list([a.items.as_slice(), b.items.as_slice()].concat());
        }
        (Binary::Add, Value::Tuple(a), Value::Tuple(b)) => {
            return budget.tuple([a.items.as_slice(), b.items.as_slice()].concat());
        }
        (Binary::Mul, of @ (Value::Str(_) | Value::List(_) | Value::Tuple(_)), count)
        | (Binary::Mul, count, of @ (Value::Str(_) | Value::List(_) | Value::Tuple(_))) => {
            let Some(count) = count.as_int() else {
                return refuse(format!(
                    "* of a {} and a {} is not supported",
                    left.type_name(),
                    right.type_name()
                ));
            };
            return repeat(of, usize::try_from(count).unwrap_or(0), budget);
        }
        _ => {}
    }
    if let (Some(a), Some(b), false) = (left.as_int(), right.as_int(), operator == Binary::Div) {
        return integers(operator, a, b);
    }
    match (left.as_exact_float()?, right.as_exact_float()?) {
        (Some(a), Some(b)) => floats(operator, a, b).map(Value::Float),
        _ => refuse(format!(
            "an operator between a {} and a {} is not supported",
            left.type_name(),
            right.type_name()
        )),
    }
}

fn repeat(of: &Value, count: usize, budget: &Budget) -> Result<Value> {
    match of {
        Value::Str(text) => {
            budget.bytes(text.len().saturating_mul(count))?;
            Ok(Value::from(text.repeat(count)))
        }
        Value::List(sequence) | Value::Tuple(sequence) => {
            budget.bytes(sequence.items.len().saturating_mul(count).saturating_mul(size_of::<Value>()))?;
            let items: Vec<Value> = std::iter::repeat_n(&sequence.items, count).flatten().cloned().collect();
            if matches!(of, Value::List(_)) { budget.list(items) } else { budget.tuple(items) }
        }
        _ => refuse("only a text, a list or a tuple can be repeated"),
    }
}

fn integers(operator: Binary, a: i64, b: i64) -> Result<Value> {
    if b == 0 && matches!(operator, Binary::FloorDiv | Binary::Mod) {
        return refuse("it divides by 0");
    }
    let result = match operator {
        Binary::Add => a.checked_add(b),
        Binary::Sub => a.checked_sub(b),
        Binary::Mul => a.checked_mul(b),
        Binary::FloorDiv => {
            a.checked_div(b).map(|quotient| quotient - i64::from(a % b != 0 && (a < 0) != (b < 0)))
        }
        Binary::Mod => {
            a.checked_rem(b).map(|rest| if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest })
        }
        Binary::Pow if b < 0 => return floats(operator, a as f64, b as f64).map(Value::Float),
        Binary::Pow => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
        Binary::Div => None,
    };
    match result {
        Some(number) => Ok(Value::Int(number)),
        None => refuse("an integer of more than 64 bits is not supported"),
    }
}

fn floats(operator: Binary, a: f64, b: f64) -> Result<f64> {
    if b == 0.0 && matches!(operator, Binary::Div | Binary::FloorDiv | Binary::Mod) {
        return refuse("it divides by 0");
    }
    // Python's float_divmod: the remainder has the divisor's sign.
    let rest = a % b;
    let adjusted = rest != 0.0 && (b < 0.0) != (rest < 0.0);
    let modulo = if adjusted {
        rest + b
    } else if rest == 0.0 {
        0.0_f64.copysign(b)
    } else {
        rest
    };
    Ok(match operator {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div => a / b,
        Binary::Mod => modulo,
        Binary::FloorDiv => {
            let quotient = (a - rest) / b - if adjusted { 1.0 } else { 0.0 };
            if quotient == 0.0 {
                return Ok(0.0_f64.copysign(a / b));
            }
            let floor = quotient.floor();
            if quotient - floor > 0.5 { floor + 1.0 } else { floor }
        }
        Binary::Pow => {
            let power = a.powf(b);
            let finite = a.is_finite() && b.is_finite();
            if finite && !power.is_finite() {
                return refuse("a power that is no finite number is not supported");
            }
            power
        }
    })
}
