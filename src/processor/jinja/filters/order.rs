//! Sorting, where keys may have no order.

use crate::processor::jinja::value::{Budget, Value};
use crate::processor::jinja::{Result, refuse};

/// The value by which it is sorted, where case does not count.
pub(super) fn folded(value: Value, case_sensitive: bool) -> Value {
    match &value {
        Value::Str(text) if !case_sensitive => Value::from(text.to_lowercase()),
        _ => value,
    }
}

/// `a < b` of two keys. What is not a number has no place in an order.
pub(super) fn ordered(a: &Value, b: &Value, budget: &Budget) -> Result<bool> {
    if [a, b].iter().any(|value| matches!(value, Value::Float(number) if number.is_nan())) {
        return refuse("sorting what is not a number is not supported");
    }
    a.is_less(b, budget)
}

/// Sorts by keys, equal ones in the order in which they came. A merge sort, for comparisons may fail.
pub(super) fn sorted(keyed: Vec<(Value, Value)>, reverse: bool, budget: &Budget) -> Result<Vec<Value>> {
    let mut runs: Vec<Vec<(Value, Value)>> = keyed.into_iter().map(|pair| vec![pair]).collect();
    while runs.len() > 1 {
        let mut merged = Vec::with_capacity(runs.len().div_ceil(2));
        let mut pairs = runs.into_iter();
        while let Some(left) = pairs.next() {
            let right = pairs.next().unwrap_or_default();
            let mut both = Vec::with_capacity(left.len() + right.len());
            let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
            while let (Some((a, _)), Some((b, _))) = (left.peek(), right.peek()) {
                let right_first = if reverse { ordered(a, b, budget)? } else { ordered(b, a, budget)? };
                both.extend(if right_first { right.next() } else { left.next() });
            }
            both.extend(left);
            both.extend(right);
            merged.push(both);
        }
        runs = merged;
    }
    Ok(runs.pop().unwrap_or_default().into_iter().map(|(_, item)| item).collect())
}
