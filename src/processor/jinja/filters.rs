//! Jinja's filters and tests.

use std::rc::Rc;

use super::formatting::{self, float_repr};
use super::interpreter::{Bound, Interpreter, binary, item};
use super::methods;
use super::syntax::Binary;
use super::value::{Budget, Value};
use super::{Result, refuse};

/// Filters that are supported.
pub(super) const FILTERS: &[&str] = &[
    "abs",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "first",
    "float",
    "forceescape",
    "format",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "wordcount",
];

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
    /// `value | name(…)`, where the arguments say the name.
    pub(super) fn filter(&mut self, value: Value, arguments: Bound) -> Result<Value> {
        self.budget.step(1)?;
        let name = arguments.name.clone();
        if matches!(value, Value::Markup(_)) && !matches!(&*name, "default" | "d" | "safe" | "string") {
            return refuse(format!("the filter {name:?} of a text marked as safe is not supported"));
        }
        match name.as_str() {
            "map" => return self.map(&value, arguments),
            "select" | "reject" => return self.select(&value, arguments, name == "select", false),
            "selectattr" | "rejectattr" => return self.select(&value, arguments, name == "selectattr", true),
            "format" => {
                let Bound { positional, named, .. } = arguments;
                let text = value.to_text(&self.budget)?;
                let values = match (positional.is_empty(), named.is_empty()) {
                    (_, true) => self.budget.tuple(positional)?,
                    (true, false) => {
                        let entries = named.into_iter().map(|(key, value)| (Value::from(key), value));
                        self.budget.dict(entries.collect())?
                    }
                    _ => return refuse("format takes values with names or without"),
                };
                return self.budget.text(formatting::percent(&text, &values, &self.budget)?);
            }
            _ => {}
        }
        let budget = &self.budget;
        let text = |value: &Value| value.to_text(budget);
        match name.as_str() {
            "upper" => arguments.take([]).and_then(|[]| budget.text(text(&value)?.to_uppercase())),
            "lower" => arguments.take([]).and_then(|[]| budget.text(text(&value)?.to_lowercase())),
            "capitalize" => {
                arguments.take([]).and_then(|[]| budget.text(methods::capitalize(&text(&value)?)?))
            }
            "title" => arguments.take([]).and_then(|[]| budget.text(methods::title_filter(&text(&value)?)?)),
            "wordcount" => {
                arguments.take([]).and_then(|[]| Ok(Value::Int(methods::word_count(&text(&value)?) as i64)))
            }
            "string" => match (arguments.take([])?, &value) {
                ([], Value::Markup(_)) => Ok(value),
                ([], value) => text(value).map(Value::Str),
            },
            "safe" => arguments.take([]).and_then(|[]| Ok(Value::Markup(text(&value)?))),
            "e" | "escape" | "forceescape" => {
                let [] = arguments.take([])?;
                let mut out = String::new();
                for c in text(&value)?.chars() {
                    match c {
                        '&' => out.push_str("&amp;"),
                        '<' => out.push_str("&lt;"),
                        '>' => out.push_str("&gt;"),
                        '\'' => out.push_str("&#39;"),
                        '"' => out.push_str("&#34;"),
                        c => out.push(c),
                    }
                }
                budget.bytes(out.len())?;
                Ok(Value::Markup(out.into()))
            }
            "trim" => {
                let [chars] = arguments.take(["chars"])?;
                let chars = chars.filter(|chars| !matches!(chars, Value::None));
                let chars = chars.map(|chars| string(&chars, &name)).transpose()?;
                budget.text(methods::strip(&text(&value)?, chars.as_deref(), true, true))
            }
            "replace" => {
                let [old, new, count] = arguments.take(["old", "new", "count"])?;
                let (Some(old), Some(new)) = (old, new) else { return refuse("replace takes two texts") };
                let count = count.filter(|count| !matches!(count, Value::None));
                let count = count.map_or(Ok(-1), |count| integer(&count, &name))?;
                methods::replace(&text(&value)?, &text(&old)?, &text(&new)?, count, budget)
            }
            "center" => {
                let [width] = arguments.take(["width"])?;
                let width = width.map_or(Ok(80), |width| integer(&width, &name))?;
                methods::pad(&text(&value)?, width, " ", "center", budget)
            }
            "truncate" => truncate(&string(&value, &name)?, arguments, budget),
            "indent" => indent(&string(&value, &name)?, arguments, budget),
            "default" | "d" => {
                let [default, boolean] = arguments.take(["default_value", "boolean"])?;
                let falls_back = boolean.is_some_and(|b| b.is_true()) && !value.is_true();
                let keep = !matches!(value, Value::Undefined) && !falls_back;
                Ok(if keep { value } else { default.unwrap_or_else(|| Value::from("")) })
            }
            "length" | "count" => {
                arguments.take([]).and_then(|[]| Ok(Value::Int(value.length(budget)? as i64)))
            }
            "list" => arguments.take([]).and_then(|[]| budget.list(value.items(budget)?)),
            "items" => match (arguments.take([])?, &value) {
                ([], Value::Undefined) => budget.iterator(Vec::new()),
                ([], Value::Dict(dict)) => {
                    budget.iterator(Value::View(super::value::View::Items, dict.clone()).items(budget)?)
                }
                _ => refuse(format!("items of a {} is not supported", value.type_name())),
            },
            "first" => match (arguments.take([])?, &value) {
                ([], Value::Iterator(items)) => {
                    Ok(items.borrow_mut().pop_front().unwrap_or(Value::Undefined))
                }
                ([], value) => Ok(value.items(budget)?.into_iter().next().unwrap_or(Value::Undefined)),
            },
            "last" => match (arguments.take([])?, &value) {
                ([], Value::Iterator(_) | Value::Undefined) => {
                    refuse(format!("last of a {} is not supported", value.type_name()))
                }
                ([], value) => Ok(value.items(budget)?.pop().unwrap_or(Value::Undefined)),
            },
            "reverse" => {
                let [] = arguments.take([])?;
                if matches!(value, Value::Undefined) {
                    return refuse("reverse of an undefined value is not supported");
                }
                let mut items = value.items(budget)?;
                items.reverse();
                match value {
                    Value::Str(_) => budget.text(items.iter().filter_map(Value::as_str).collect::<String>()),
                    Value::Iterator(_) => budget.list(items),
                    _ => budget.iterator(items),
                }
            }
            "join" => {
                let [separator, attribute] = arguments.take(["d", "attribute"])?;
                let separator = separator.map_or(Ok("".into()), |separator| text(&separator))?;
                let path = path(attribute)?;
                let mut out = String::new();
                for (index, item) in value.items(budget)?.into_iter().enumerate() {
                    let part = text(&follow(item, &path, None, budget)?)?;
                    budget.bytes(part.len() + separator.len())?;
                    out.push_str(if index > 0 { &separator } else { "" });
                    out.push_str(&part);
                }
                Ok(Value::from(out))
            }
            "batch" => {
                let [count, fill] = arguments.take(["linecount", "fill_with"])?;
                let count = count.map_or(Ok(0), |count| integer(&count, &name))?;
                let Some(count) = usize::try_from(count).ok().filter(|&count| count > 0) else {
                    return refuse("batch takes a count of at least 1");
                };
                let items = value.items(budget)?;
                let mut rows = Vec::new();
                for row in items.chunks(count) {
                    let mut row = row.to_vec();
                    if let Some(fill) = fill.as_ref().filter(|fill| !matches!(fill, Value::None)) {
                        budget.bytes(count.saturating_mul(size_of::<Value>()))?;
                        row.resize(count, fill.clone());
                    }
                    rows.push(budget.list(row)?);
                }
                budget.iterator(rows)
            }
            "slice" => {
                let [slices, fill] = arguments.take(["slices", "fill_with"])?;
                let slices = slices.map_or(Ok(0), |slices| integer(&slices, &name))?;
                let Some(slices) = usize::try_from(slices).ok().filter(|&slices| slices > 0) else {
                    return refuse("slice takes a count of at least 1");
                };
                let items = value.items(budget)?;
                let (each, longer) = (items.len() / slices, items.len() % slices);
                let mut rest = items.as_slice();
                let mut columns = Vec::new();
                budget.step(slices)?;
                for index in 0..slices {
                    let (column, behind) = rest.split_at(each + usize::from(index < longer));
                    let mut column = column.to_vec();
                    if let Some(fill) = fill.as_ref().filter(|f| !matches!(f, Value::None) && index >= longer)
                    {
                        column.push(fill.clone());
                    }
                    columns.push(budget.list(column)?);
                    rest = behind;
                }
                budget.iterator(columns)
            }
            "unique" => {
                let [case, attribute] = arguments.take(["case_sensitive", "attribute"])?;
                let (case, path) = (case.is_some_and(|case| case.is_true()), path(attribute)?);
                let mut seen: Vec<(Value, Value)> = Vec::new();
                let mut kept = Vec::new();
                for item in value.items(budget)? {
                    let key = folded(follow(item.clone(), &path, None, budget)?, case);
                    let known = budget.dict(std::mem::take(&mut seen))?;
                    if !known.contains(&key, budget)? {
                        kept.push(item);
                    }
                    let Value::Dict(known) = known else { return refuse("unique is not supported here") };
                    seen = known.entries.clone();
                    seen.push((key, Value::None));
                }
                budget.iterator(kept)
            }
            "sort" => {
                let [reverse, case, attribute] =
                    arguments.take(["reverse", "case_sensitive", "attribute"])?;
                let case = case.is_some_and(|case| case.is_true());
                let paths = paths(attribute)?;
                let mut keyed = Vec::new();
                for item in value.items(budget)? {
                    let mut key = Vec::new();
                    for path in &paths {
                        key.push(folded(follow(item.clone(), path, None, budget)?, case));
                    }
                    keyed.push((budget.list(key)?, item));
                }
                let sorted = sorted(keyed, reverse.is_some_and(|reverse| reverse.is_true()), budget)?;
                budget.list(sorted)
            }
            "dictsort" => {
                let [case, by, reverse] = arguments.take(["case_sensitive", "by", "reverse"])?;
                let Value::Dict(dict) = &value else {
                    return refuse(format!("dictsort of a {} is not supported", value.type_name()));
                };
                let by = by.map_or(Ok("key".into()), |by| string(&by, &name))?;
                if !matches!(&*by, "key" | "value") {
                    return refuse("dictsort goes by \"key\" or \"value\"");
                }
                let case = case.is_some_and(|case| case.is_true());
                let mut keyed = Vec::new();
                for (key, held) in &dict.entries {
                    let pair = budget.tuple(vec![key.clone(), held.clone()])?;
                    keyed.push((folded(if &*by == "key" { key } else { held }.clone(), case), pair));
                }
                let sorted = sorted(keyed, reverse.is_some_and(|reverse| reverse.is_true()), budget)?;
                budget.list(sorted)
            }
            "min" | "max" => {
                let [case, attribute] = arguments.take(["case_sensitive", "attribute"])?;
                let (case, path) = (case.is_some_and(|case| case.is_true()), path(attribute)?);
                let mut best: Option<(Value, Value)> = None;
                for item in value.items(budget)? {
                    let key = folded(follow(item.clone(), &path, None, budget)?, case);
                    let better = match &best {
                        None => true,
                        Some((other, _)) if name == "min" => ordered(&key, other, budget)?,
                        Some((other, _)) => ordered(other, &key, budget)?,
                    };
                    if better {
                        best = Some((key, item));
                    }
                }
                Ok(best.map_or(Value::Undefined, |(_, item)| item))
            }
            "sum" => {
                let [attribute, start] = arguments.take(["attribute", "start"])?;
                let path = path(attribute)?;
                let mut sum = start.unwrap_or(Value::Int(0));
                if sum.as_str().is_some() {
                    return refuse("sum of texts is not supported");
                }
                for item in value.items(budget)? {
                    sum = binary(Binary::Add, &sum, &follow(item, &path, None, budget)?, budget)?;
                }
                Ok(sum)
            }
            "abs" => match (arguments.take([])?, &value) {
                ([], Value::Float(number)) => Ok(Value::Float(number.abs())),
                ([], value) => match value.as_int().and_then(i64::checked_abs) {
                    Some(number) => Ok(Value::Int(number)),
                    None => refuse(format!("abs of a {} is not supported", value.type_name())),
                },
            },
            "int" => {
                let [default, base] = arguments.take(["default", "base"])?;
                if base.is_some_and(|base| base.as_int() != Some(10)) {
                    return refuse("int with another base than 10 is not supported");
                }
                to_int(&value, default.unwrap_or(Value::Int(0)))
            }
            "float" => {
                let [default] = arguments.take(["default"])?;
                to_float(&value, default.unwrap_or(Value::Float(0.0)))
            }
            "round" => round(&value, arguments),
            "tojson" => to_json(&value, arguments, budget),
            _ => refuse(format!("the filter {name:?} is not supported")),
        }
    }

    fn map(&mut self, value: &Value, arguments: Bound) -> Result<Value> {
        let Bound { mut positional, mut named, .. } = arguments;
        if !value.is_true() {
            return self.budget.iterator(Vec::new());
        }
        let items = value.items(&self.budget)?;
        let mut mapped = Vec::new();
        if positional.is_empty() {
            let default = take_named(&mut named, "default");
            let attribute = take_named(&mut named, "attribute");
            if attribute.is_none() || !named.is_empty() {
                return refuse("map takes a filter's name, or attribute=…");
            }
            let path = path(attribute)?;
            for item in items {
                mapped.push(follow(item, &path, default.as_ref(), &self.budget)?);
            }
        } else {
            let name = string(&positional.remove(0), "map")?;
            if !FILTERS.contains(&&*name) {
                return refuse(format!("the filter {name:?} is not supported"));
            }
            for item in items {
                let bound =
                    Bound { name: name.to_string(), positional: positional.clone(), named: named.clone() };
                self.budget.step(1 + positional.len() + named.len())?;
                mapped.push(self.filter(item, bound)?);
            }
        }
        self.budget.iterator(mapped)
    }

    /// `select`, `reject` and their kin that look at an attribute.
    fn select(&mut self, value: &Value, arguments: Bound, keep: bool, of_attribute: bool) -> Result<Value> {
        let Bound { mut positional, named, name } = arguments;
        if !value.is_true() {
            return self.budget.iterator(Vec::new());
        }
        let items = value.items(&self.budget)?;
        let path = match of_attribute {
            true if positional.is_empty() => return refuse(format!("{name} takes an attribute's name")),
            true => path(Some(positional.remove(0)))?,
            false => Vec::new(),
        };
        let test = match positional.is_empty() {
            true => None,
            false => Some(string(&positional.remove(0), &name)?),
        };
        if let Some(test) = test.as_ref().filter(|test| !TESTS.contains(&&***test)) {
            return refuse(format!("the test {test:?} is not supported"));
        }
        let mut kept = Vec::new();
        for item in items {
            let looked_at = follow(item.clone(), &path, None, &self.budget)?;
            let holds = match &test {
                None => looked_at.is_true(),
                Some(test) => {
                    let bound = Bound {
                        name: test.to_string(),
                        positional: positional.clone(),
                        named: named.clone(),
                    };
                    self.budget.step(1 + positional.len())?;
                    self.test(&looked_at, bound)?
                }
            };
            if holds == keep {
                kept.push(item);
            }
        }
        self.budget.iterator(kept)
    }

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

fn take_named(named: &mut Vec<(String, Value)>, name: &str) -> Option<Value> {
    let at = named.iter().position(|(key, _)| key == name)?;
    Some(named.remove(at).1)
}

fn string(value: &Value, name: &str) -> Result<Rc<str>> {
    match value {
        Value::Str(text) => Ok(text.clone()),
        _ => refuse(format!("{name} of a {} is not supported: it takes a text", value.type_name())),
    }
}

fn integer(value: &Value, name: &str) -> Result<i64> {
    match value.as_int() {
        Some(number) => Ok(number),
        None => refuse(format!("{name} takes a number, and not a {}", value.type_name())),
    }
}

/// The parts of an attribute with dots.
fn path(attribute: Option<Value>) -> Result<Vec<Value>> {
    match attribute {
        None | Some(Value::None) => Ok(Vec::new()),
        Some(Value::Str(text)) => {
            let part = |part: &str| match part.parse::<i64>() {
                Ok(index) if part.bytes().all(|b| b.is_ascii_digit()) => Value::Int(index),
                _ => Value::from(part),
            };
            Ok(text.split('.').map(part).collect())
        }
        Some(index @ Value::Int(_)) => Ok(vec![index]),
        Some(other) => refuse(format!("a {} is no attribute", other.type_name())),
    }
}

/// The paths of several attributes between commas.
fn paths(attribute: Option<Value>) -> Result<Vec<Vec<Value>>> {
    match attribute {
        Some(Value::Str(text)) => text.split(',').map(|part| path(Some(Value::from(part)))).collect(),
        other => Ok(vec![path(other)?]),
    }
}

/// What stands at the end of a path.
fn follow(value: Value, path: &[Value], default: Option<&Value>, budget: &Budget) -> Result<Value> {
    let mut value = value;
    for part in path {
        value = item(&value, part, budget)?;
        if let (Value::Undefined, Some(default)) = (&value, default.filter(|d| !matches!(d, Value::None))) {
            value = default.clone();
        }
    }
    Ok(value)
}

/// The value by which it is sorted, where case does not count.
fn folded(value: Value, case_sensitive: bool) -> Value {
    match &value {
        Value::Str(text) if !case_sensitive => Value::from(text.to_lowercase()),
        _ => value,
    }
}

/// `a < b` of two keys. What is not a number has no place in an order.
fn ordered(a: &Value, b: &Value, budget: &Budget) -> Result<bool> {
    if [a, b].iter().any(|value| matches!(value, Value::Float(number) if number.is_nan())) {
        return refuse("sorting what is not a number is not supported");
    }
    a.is_less(b, budget)
}

/// Sorts by keys, equal ones in the order in which they came. A merge sort, for comparisons may fail.
fn sorted(keyed: Vec<(Value, Value)>, reverse: bool, budget: &Budget) -> Result<Vec<Value>> {
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

fn truncate(text: &str, arguments: Bound, budget: &Budget) -> Result<Value> {
    let [length, whole, end, leeway] = arguments.take(["length", "killwords", "end", "leeway"])?;
    let length = length.map_or(Ok(255), |length| integer(&length, "truncate"))?;
    let end = end.map_or(Ok("...".into()), |end| string(&end, "truncate"))?;
    let leeway = leeway.filter(|l| !matches!(l, Value::None));
    let leeway = leeway.map_or(Ok(5), |leeway| integer(&leeway, "truncate"))?;
    let kept = length - end.chars().count() as i64;
    let Some(kept) = usize::try_from(kept).ok().filter(|_| leeway >= 0) else {
        return refuse(format!("truncate cannot cut to {length} characters that end with {end:?}"));
    };
    if text.chars().count() as i64 <= length.saturating_add(leeway) {
        return budget.text(text);
    }
    let cut: String = text.chars().take(kept).collect();
    let words = if whole.is_some_and(|whole| whole.is_true()) {
        cut.as_str()
    } else {
        cut.rsplit_once(' ').map_or(cut.as_str(), |(before, _)| before)
    };
    budget.text(format!("{words}{end}"))
}

fn indent(text: &str, arguments: Bound, budget: &Budget) -> Result<Value> {
    let [width, first, blank] = arguments.take(["width", "first", "blank"])?;
    let margin = match width {
        Some(Value::Str(margin)) => margin.to_string(),
        width => {
            let width = width.map_or(Ok(4), |width| integer(&width, "indent"))?;
            let width = usize::try_from(width).unwrap_or(0);
            budget.bytes(width)?;
            " ".repeat(width)
        }
    };
    let is_true = |flag: Option<Value>| flag.is_some_and(|flag| flag.is_true());
    let (first, blank) = (is_true(first), is_true(blank));
    let call = Bound { name: "splitlines".into(), ..Bound::default() };
    let lines =
        methods::call(&Value::from(format!("{text}\n")), "splitlines", call, budget)?.items(budget)?;
    let mut out = String::new();
    for (index, line) in lines.iter().filter_map(Value::as_str).enumerate() {
        let indented = if index == 0 { first } else { blank || !line.is_empty() };
        budget.bytes(margin.len() + line.len() + 1)?;
        out.push_str(if index > 0 { "\n" } else { "" });
        out.push_str(if indented { &margin } else { "" });
        out.push_str(line);
    }
    Ok(Value::from(out))
}

/// Python's grammar of numbers in texts, as far as it is Rust's too.
fn number_text(text: &str) -> Result<&str> {
    let text = methods::strip(text, None, true, true);
    if text.contains('_') || !text.is_ascii() {
        return refuse(format!("the number {text:?} is not supported"));
    }
    Ok(text)
}

fn to_int(value: &Value, default: Value) -> Result<Value> {
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

fn to_float(value: &Value, default: Value) -> Result<Value> {
    match value {
        Value::Undefined => refuse("float of an undefined value is not supported"),
        Value::Str(text) => Ok(number_text(text)?.parse().map_or(default, Value::Float)),
        _ => Ok(value.as_exact_float()?.map_or(default, Value::Float)),
    }
}

fn round(value: &Value, arguments: Bound) -> Result<Value> {
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

/// How `tojson` writes.
struct Json {
    ascii: bool,
    indent: Option<String>,
    between: String,
    behind_key: String,
    sort_keys: bool,
}

fn to_json(value: &Value, arguments: Bound, budget: &Budget) -> Result<Value> {
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
