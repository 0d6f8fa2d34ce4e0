//! The methods of Python's texts, lists and maps. Those that change a value are refused, as the reference's sandbox
//! refuses them.

use super::formatting;
use super::interpreter::Bound;
use super::python_text::{
    ALPHANUMERIC, LETTERS, capitalize, one_case, pad, replace, split, splitlines, strip, title,
};
use super::value::{Budget, Value, View, is_space};
use super::{Result, refuse};

/// What each type has as attributes in Python, so that none is taken for undefined.
pub(super) fn has_attribute(value: &Value, name: &str) -> bool {
    let names: &[&str] = match value {
        Value::Str(_) | Value::Markup(_) => &TEXT,
        Value::List(_) => &[
            "append", "clear", "copy", "count", "extend", "index", "insert", "pop", "remove", "reverse",
            "sort",
        ],
        Value::Tuple(_) => &["count", "index"],
        Value::Dict(_) => &[
            "clear",
            "copy",
            "fromkeys",
            "get",
            "items",
            "keys",
            "pop",
            "popitem",
            "setdefault",
            "update",
            "values",
        ],
        Value::Int(_) | Value::Bool(_) => &[
            "as_integer_ratio",
            "bit_count",
            "bit_length",
            "conjugate",
            "denominator",
            "from_bytes",
            "imag",
            "is_integer",
            "numerator",
            "real",
            "to_bytes",
        ],
        Value::Float(_) => {
            &["as_integer_ratio", "conjugate", "fromhex", "hex", "imag", "is_integer", "real", "from_number"]
        }
        Value::Range(_) => &["count", "index", "start", "step", "stop"],
        Value::View(..) => &["isdisjoint", "mapping"],
        _ => &[],
    };
    names.contains(&name)
}

const TEXT: [&str; 47] = [
    "capitalize",
    "casefold",
    "center",
    "count",
    "encode",
    "endswith",
    "expandtabs",
    "find",
    "format",
    "format_map",
    "index",
    "isalnum",
    "isalpha",
    "isascii",
    "isdecimal",
    "isdigit",
    "isidentifier",
    "islower",
    "isnumeric",
    "isprintable",
    "isspace",
    "istitle",
    "isupper",
    "join",
    "ljust",
    "lower",
    "lstrip",
    "maketrans",
    "partition",
    "removeprefix",
    "removesuffix",
    "replace",
    "rfind",
    "rindex",
    "rjust",
    "rpartition",
    "rsplit",
    "rstrip",
    "split",
    "splitlines",
    "startswith",
    "strip",
    "swapcase",
    "title",
    "translate",
    "upper",
    "zfill",
];

/// Calls a method.
pub(super) fn call(of: &Value, name: &str, arguments: Bound, budget: &Budget) -> Result<Value> {
    match of {
        Value::Str(text) => text_method(text, name, arguments, budget),
        Value::Dict(dict) => match name {
            "items" | "keys" | "values" => {
                let [] = arguments.take([])?;
                let view = match name {
                    "items" => View::Items,
                    "keys" => View::Keys,
                    _ => View::Values,
                };
                Ok(Value::View(view, dict.clone()))
            }
            "get" => {
                let [key, default] = arguments.unnamed()?.take(["key", "default"])?;
                let Some(key) = key else { return refuse("get() takes a key") };
                let held = of.contains(&key, budget)?;
                let value = if held { dict.get(&key, budget)? } else { default };
                Ok(value.unwrap_or(Value::None))
            }
            "copy" => {
                let [] = arguments.take([])?;
                Ok(of.clone())
            }
            _ => unsupported(of, name),
        },
        Value::List(list) | Value::Tuple(list) => match name {
            "count" | "index" => {
                let [Some(item)] = arguments.unnamed()?.take(["value"])? else {
                    return refuse(format!("{name}() takes one value"));
                };
                let mut found = Vec::new();
                for (index, other) in list.items.iter().enumerate() {
                    if other.equals(&item, budget)? {
                        found.push(index as i64);
                    }
                }
                match (name, found.first()) {
                    ("count", _) => Ok(Value::Int(found.len() as i64)),
                    (_, Some(index)) => Ok(Value::Int(*index)),
                    _ => refuse("index() does not find the value"),
                }
            }
            "copy" if matches!(of, Value::List(_)) => {
                let [] = arguments.take([])?;
                Ok(of.clone())
            }
            _ => unsupported(of, name),
        },
        _ => unsupported(of, name),
    }
}

fn unsupported<T>(of: &Value, name: &str) -> Result<T> {
    refuse(format!("the method {name}() of a {} is not supported", of.type_name()))
}

fn text_method(text: &str, name: &str, arguments: Bound, budget: &Budget) -> Result<Value> {
    budget.step(text.len() / 64)?;
    let ascii = || match text.is_ascii() {
        true => Ok(()),
        false => refuse(format!("{name}() of a text with letters outside ASCII is not supported")),
    };
    match name {
        "format" => {
            let Bound { positional, named, .. } = arguments;
            return budget.text(formatting::format(text, &positional, &named, budget)?);
        }
        "split" | "rsplit" => {
            let [separator, count] = arguments.take(["sep", "maxsplit"])?;
            let count = integer_or(count, -1)?;
            let separator = optional_text(separator, name)?;
            return split(text, separator.as_deref(), count, name == "rsplit", budget);
        }
        "splitlines" => {
            let [keep] = arguments.take(["keepends"])?;
            return splitlines(text, keep.is_some_and(|keep| keep.is_true()), budget);
        }
        _ => {}
    }
    let arguments = arguments.unnamed()?;
    let no_arguments = |arguments: Bound| arguments.take([]).map(|[]| ());
    match name {
        "upper" => no_arguments(arguments).and_then(|()| budget.text(text.to_uppercase())),
        "lower" => no_arguments(arguments).and_then(|()| budget.text(text.to_lowercase())),
        "capitalize" => no_arguments(arguments).and_then(|()| budget.text(capitalize(text)?)),
        "title" => no_arguments(arguments).and_then(|()| budget.text(title(text)?)),
        "casefold" => {
            no_arguments(arguments)?;
            ascii()?;
            budget.text(text.to_ascii_lowercase())
        }
        "swapcase" => {
            no_arguments(arguments)?;
            ascii()?;
            let swap = |c: char| {
                if c.is_ascii_lowercase() { c.to_ascii_uppercase() } else { c.to_ascii_lowercase() }
            };
            budget.text(text.chars().map(swap).collect::<String>())
        }
        "islower" | "isupper" => {
            no_arguments(arguments)?;
            if text.chars().any(|c| !c.is_ascii() && !one_case(c)) {
                ascii()?;
            }
            let (lower, upper) = (text.chars().any(char::is_lowercase), text.chars().any(char::is_uppercase));
            Ok(Value::Bool(if name == "islower" { lower && !upper } else { upper && !lower }))
        }
        "isspace" => {
            no_arguments(arguments)?;
            Ok(Value::Bool(!text.is_empty() && text.chars().all(is_space)))
        }
        "isascii" => {
            no_arguments(arguments)?;
            Ok(Value::Bool(text.is_ascii()))
        }
        "isalpha" | "isalnum" => {
            no_arguments(arguments)?;
            let class = if name == "isalpha" { &LETTERS } else { &ALPHANUMERIC };
            Ok(Value::Bool(class.as_ref().is_some_and(|class| class.is_match(text))))
        }
        "isdigit" | "isdecimal" | "isnumeric" | "isidentifier" | "isprintable" | "istitle" => {
            no_arguments(arguments)?;
            ascii()?;
            let first_is_digit = text.starts_with(|c: char| c.is_ascii_digit());
            Ok(Value::Bool(match name {
                "isidentifier" => {
                    let word = |c: char| c.is_ascii_alphanumeric() || c == '_';
                    !text.is_empty() && !first_is_digit && text.chars().all(word)
                }
                "isprintable" => text.chars().all(|c| (' '..='~').contains(&c)),
                "istitle" => text.chars().any(|c| c.is_ascii_alphabetic()) && title(text)? == text,
                _ => !text.is_empty() && text.chars().all(|c| c.is_ascii_digit()),
            }))
        }
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = arguments.take(["chars"])?;
            let chars = optional_text(chars, name)?;
            budget.text(strip(text, chars.as_deref(), name != "rstrip", name != "lstrip"))
        }
        "replace" => {
            let [old, new, count] = arguments.take(["old", "new", "count"])?;
            let (old, new) = (required_text(old, name)?, required_text(new, name)?);
            replace(text, &old, &new, integer_or(count, -1)?, budget)
        }
        "startswith" | "endswith" => {
            let [affix] = arguments.take(["affix"])?;
            let affixes = match &affix {
                Some(Value::Tuple(affixes)) => affixes.items.clone(),
                Some(affix @ Value::Str(_)) => vec![affix.clone()],
                _ => return refuse(format!("{name}() takes a text or a tuple of texts")),
            };
            let mut found = false;
            for affix in affixes {
                let affix = required_text(Some(affix), name)?;
                found |=
                    if name == "startswith" { text.starts_with(&*affix) } else { text.ends_with(&*affix) };
            }
            Ok(Value::Bool(found))
        }
        "removeprefix" | "removesuffix" => {
            let [affix] = arguments.take(["affix"])?;
            let affix = required_text(affix, name)?;
            let rest =
                if name == "removeprefix" { text.strip_prefix(&*affix) } else { text.strip_suffix(&*affix) };
            budget.text(rest.unwrap_or(text))
        }
        "find" | "rfind" | "index" | "rindex" | "count" => {
            let [part] = arguments.take(["part"])?;
            let part = required_text(part, name)?;
            let position = if name.starts_with('r') { text.rfind(&*part) } else { text.find(&*part) };
            match position {
                _ if name == "count" && part.is_empty() => Ok(Value::Int(text.chars().count() as i64 + 1)),
                _ if name == "count" => Ok(Value::Int(text.matches(&*part).count() as i64)),
                Some(at) => Ok(Value::Int(text[..at].chars().count() as i64)),
                None if name.ends_with("find") => Ok(Value::Int(-1)),
                None => refuse(format!("{name}() does not find {part:?}")),
            }
        }
        "partition" | "rpartition" => {
            let [separator] = arguments.take(["sep"])?;
            let separator = required_text(separator, name)?;
            if separator.is_empty() {
                return refuse(format!("{name}() takes a text that is not empty"));
            }
            let parts = if name == "partition" {
                text.split_once(&*separator)
            } else {
                text.rsplit_once(&*separator)
            };
            let parts = match parts {
                Some((before, behind)) => [before, &*separator, behind],
                None if name == "partition" => [text, "", ""],
                None => ["", "", text],
            };
            budget.tuple(parts.into_iter().map(Value::from).collect())
        }
        "join" => {
            let [items] = arguments.take(["iterable"])?;
            let Some(items) = items else { return refuse("join() takes a list of texts") };
            let mut out = String::new();
            for (index, item) in items.items(budget)?.into_iter().enumerate() {
                let item = required_text(Some(item), name)?;
                budget.bytes(item.len() + text.len())?;
                out.push_str(if index > 0 { text } else { "" });
                out.push_str(&item);
            }
            Ok(Value::from(out))
        }
        "center" | "ljust" | "rjust" => {
            let [width, fill] = arguments.take(["width", "fill"])?;
            let Some(width) = width.as_ref().and_then(Value::as_int) else {
                return refuse(format!("{name}() takes a width"));
            };
            let fill = fill.map_or(Ok(" ".into()), |fill| required_text(Some(fill), name))?;
            pad(text, width, &fill, name, budget)
        }
        "zfill" => {
            let [width] = arguments.take(["width"])?;
            let Some(width) = width.as_ref().and_then(Value::as_int) else {
                return refuse("zfill() takes a width");
            };
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            let Value::Str(padded) = pad(digits, width - sign.len() as i64, "0", "rjust", budget)? else {
                return refuse("zfill() is not supported here");
            };
            budget.text(format!("{sign}{padded}"))
        }
        _ => unsupported(&Value::from(""), name),
    }
}

fn integer_or(value: Option<Value>, default: i64) -> Result<i64> {
    match value {
        None => Ok(default),
        Some(value) => match value.as_int() {
            Some(number) => Ok(number),
            None => refuse(format!("a {} stands where a number should", value.type_name())),
        },
    }
}

fn required_text(value: Option<Value>, name: &str) -> Result<std::rc::Rc<str>> {
    match value {
        Some(Value::Str(text)) => Ok(text),
        Some(value) => refuse(format!("{name} takes a text, and not a {}", value.type_name())),
        None => refuse(format!("{name} takes a text")),
    }
}

fn optional_text(value: Option<Value>, name: &str) -> Result<Option<std::rc::Rc<str>>> {
    match value {
        None | Some(Value::None) => Ok(None),
        value => required_text(value, name).map(Some),
    }
}
