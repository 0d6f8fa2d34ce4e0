//! Jinja's tests: what may stand behind `is`.

use super::interpreter::{Bound, Interpreter};
use super::methods;
use super::value::Value;
use super::{Result, refuse};

/// Tests that are supported, and the operators that `select` takes for tests.
pub(super) const TESTS: &[&str] = &[
    "boolean",
    "callable",
    "defined",
    "divisibleby",
    "eq",
    "equalto",
    "escaped",
    "even",
    "false",
    "float",
    "ge",
    "gt",
    "greaterthan",
    "in",
    "integer",
    "iterable",
    "le",
    "lessthan",
    "lower",
    "lt",
    "mapping",
    "ne",
    "none",
    "number",
    "odd",
    "sameas",
    "sequence",
    "string",
    "true",
    "undefined",
    "upper",
    "==",
    "!=",
    "<",
    "<=",
    ">",
    ">=",
];

impl Interpreter {
    /// `value is name(…)`, where the arguments say the name.
    pub(super) fn test(&mut self, value: &Value, arguments: Bound) -> Result<bool> {
        let budget = &self.budget;
        let name = arguments.name.clone();
        let unsupported = || refuse(format!("{name:?} of a {} is not supported", value.type_name()));
        let takes_one = matches!(
            &*name,
            "divisibleby"
                | "eq"
                | "equalto"
                | "ge"
                | "gt"
                | "greaterthan"
                | "in"
                | "le"
                | "lessthan"
                | "lt"
                | "ne"
                | "sameas"
                | "=="
                | "!="
                | "<"
                | "<="
                | ">"
                | ">="
        );
        let arguments = arguments.unnamed()?;
        if takes_one {
            let [Some(other)] = arguments.take(["other"])? else {
                return refuse(format!("{name} takes a value"));
            };
            return match &*name {
                "eq" | "equalto" | "==" => value.equals(&other, budget),
                "ne" | "!=" => Ok(!value.equals(&other, budget)?),
                "lt" | "lessthan" | "<" => value.is_less(&other, budget),
                "gt" | "greaterthan" | ">" => other.is_less(value, budget),
                "le" | "<=" => Ok(value.is_less(&other, budget)? || value.equals(&other, budget)?),
                "ge" | ">=" => Ok(other.is_less(value, budget)? || value.equals(&other, budget)?),
                "in" => other.contains(value, budget),
                "divisibleby" => match (value.as_int(), other.as_int()) {
                    (Some(a), Some(b)) if b != 0 => Ok(a.checked_rem(b).unwrap_or(0) == 0),
                    _ => unsupported(),
                },
                _ => match (value, &other) {
                    (Value::None, Value::None) => Ok(true),
                    (Value::Bool(a), Value::Bool(b)) => Ok(a == b),
                    (Value::None | Value::Bool(_), _) | (_, Value::None | Value::Bool(_)) => Ok(false),
                    _ => unsupported(),
                },
            };
        }
        let [] = arguments.take([])?;
        let cased =
            |name| methods::call(&value.to_text(budget).map(Value::Str)?, name, Bound::default(), budget);
        Ok(match &*name {
            "defined" => !matches!(value, Value::Undefined),
            "undefined" => matches!(value, Value::Undefined),
            "none" => matches!(value, Value::None),
            "boolean" => matches!(value, Value::Bool(_)),
            "true" => matches!(value, Value::Bool(true)),
            "false" => matches!(value, Value::Bool(false)),
            "integer" => matches!(value, Value::Int(_)),
            "float" => matches!(value, Value::Float(_)),
            "number" => matches!(value, Value::Int(_) | Value::Float(_) | Value::Bool(_)),
            "string" => matches!(value, Value::Str(_) | Value::Markup(_)),
            "escaped" => matches!(value, Value::Markup(_)),
            "mapping" => matches!(value, Value::Dict(_)),
            "sequence" => matches!(
                value,
                Value::Str(_)
                    | Value::Markup(_)
                    | Value::List(_)
                    | Value::Tuple(_)
                    | Value::Dict(_)
                    | Value::Range(_)
                    | Value::Undefined
            ),
            "iterable" => !matches!(
                value,
                Value::None
                    | Value::Bool(_)
                    | Value::Int(_)
                    | Value::Float(_)
                    | Value::Namespace(_)
                    | Value::Macro(_)
                    | Value::Function(_)
            ),
            "callable" => {
                matches!(value, Value::Macro(_) | Value::Function(_) | Value::Loop(_) | Value::Undefined)
            }
            "odd" | "even" => {
                let expected = if name == "odd" { 1.0 } else { 0.0 };
                match value.as_int() {
                    Some(number) => (number.rem_euclid(2) == 1) == (name == "odd"),
                    None => match value {
                        Value::Float(number) => number.rem_euclid(2.0) == expected,
                        _ => return unsupported(),
                    },
                }
            }
            "lower" => cased("islower")?.is_true(),
            "upper" => cased("isupper")?.is_true(),
            _ => return refuse(format!("the test {name:?} is not supported")),
        })
    }
}
