//! Jinja's filters.

mod json;
mod numbers;
mod order;
mod text;

use std::rc::Rc;

use self::json::to_json;
use self::numbers::{round, to_float, to_int};
use self::order::{folded, ordered, sorted};
use self::text::{indent, truncate};
use super::interpreter::{Bound, Interpreter};
use super::operators::{binary, item};
use super::predicates::TESTS;
use super::syntax::Binary;
use super::value::{Budget, Value};
use super::{Result, formatting, python_text, refuse};

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
                arguments.take([]).and_then(|[]| budget.text(python_text::capitalize(&text(&value)?)?))
            }
            "title" => {
                arguments.take([]).and_then(|[]| budget.text(python_text::title_filter(&text(&value)?)?))
            }
            "wordcount" => arguments
                .take([])
                .and_then(|[]| Ok(Value::Int(python_text::word_count(&text(&value)?) as i64))),
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
                budget.text(python_text::strip(&text(&value)?, chars.as_deref(), true, true))
            }
            "replace" => {
                let [old, new, count] = arguments.take(["old", "new", "count"])?;
                let (Some(old), Some(new)) = (old, new) else { return refuse("replace takes two texts") };
                let count = count.filter(|count| !matches!(count, Value::None));
                let count = count.map_or(Ok(-1), |count| integer(&count, &name))?;
                python_text::replace(&text(&value)?, &text(&old)?, &text(&new)?, count, budget)
            }
            "center" => {
                let [width] = arguments.take(["width"])?;
                let width = width.map_or(Ok(80), |width| integer(&width, &name))?;
                python_text::pad(&text(&value)?, width, " ", "center", budget)
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
