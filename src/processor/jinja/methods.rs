//! The methods of Python's texts, lists and maps. Those that change a value are refused, as the reference's sandbox
//! refuses them.

use std::sync::LazyLock;

use regex::Regex;

use super::formatting;
use super::interpreter::Bound;
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

static LETTERS: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^\p{L}+\z").ok());
static ALPHANUMERIC: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^[\p{L}\p{N}]+\z").ok());
static WORDS: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"[\p{L}\p{N}_]+").ok());

/// How many words Python's `\w+` finds.
pub(super) fn word_count(text: &str) -> usize {
    WORDS.as_ref().map_or(0, |words| words.find_iter(text).count())
}

/// Whether upper case and title case of a letter are one.
fn one_case(c: char) -> bool {
    !('\u{1c4}'..='\u{1cc}').contains(&c)
        && !('\u{1f1}'..='\u{1f3}').contains(&c)
        && !('\u{10d0}'..='\u{10ff}').contains(&c)
        && c.to_uppercase().count() == 1
}

fn upper_first(text: &str, name: &str, out: &mut String) -> Result<()> {
    let mut chars = text.chars();
    if let Some(first) = chars.next() {
        if !first.is_ascii() && !one_case(first) {
            return refuse(format!("{name}() of {first:?} is not supported"));
        }
        out.extend(first.to_uppercase());
    }
    out.push_str(&chars.as_str().to_lowercase());
    Ok(())
}

pub(super) fn capitalize(text: &str) -> Result<String> {
    let mut out = String::new();
    // A capital sigma looks at what stands before it, which a part of a text does not show.
    if text.contains('Σ') {
        return refuse("capitalize() of 'Σ' is not supported");
    }
    upper_first(text, "capitalize", &mut out)?;
    Ok(out)
}

fn title(text: &str) -> Result<String> {
    if text.contains('Σ') {
        return refuse("title() of 'Σ' is not supported");
    }
    let cased = |c: char| c.is_lowercase() || c.is_uppercase();
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(cased) {
        out.push_str(&rest[..at]);
        let word = &rest[at..];
        let end = word.find(|c| !cased(c)).unwrap_or(word.len());
        upper_first(&word[..end], "title", &mut out)?;
        rest = &word[end..];
    }
    out.push_str(rest);
    Ok(out)
}

/// The filter `title`, which knows fewer limits of words than the method.
pub(super) fn title_filter(text: &str) -> Result<String> {
    if text.contains('Σ') {
        return refuse("title of 'Σ' is not supported");
    }
    let limit = |c: char| is_space(c) || matches!(c, '-' | '(' | '{' | '[' | '<');
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(|c| !limit(c)) {
        out.push_str(&rest[..at]);
        let word = &rest[at..];
        let end = word.find(limit).unwrap_or(word.len());
        let first = word.chars().next().unwrap_or(' ');
        out.extend(first.to_uppercase());
        out.push_str(&word[first.len_utf8()..end].to_lowercase());
        rest = &word[end..];
    }
    out.push_str(rest);
    Ok(out)
}

pub(super) fn strip<'a>(text: &'a str, chars: Option<&str>, left: bool, right: bool) -> &'a str {
    let matches = |c: char| chars.map_or(is_space(c), |chars| chars.contains(c));
    let text = if left { text.trim_start_matches(matches) } else { text };
    if right { text.trim_end_matches(matches) } else { text }
}

pub(super) fn replace(text: &str, old: &str, new: &str, count: i64, budget: &Budget) -> Result<Value> {
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    let found = text.matches(old).count().min(count);
    budget.bytes(text.len().saturating_add(found.saturating_mul(new.len())))?;
    Ok(Value::from(text.replacen(old, new, found)))
}

/// Python's `center`, `ljust` and `rjust`.
pub(super) fn pad(text: &str, width: i64, fill: &str, side: &str, budget: &Budget) -> Result<Value> {
    if fill.chars().count() != 1 {
        return refuse(format!("{side}() fills with one character"));
    }
    let missing = usize::try_from(width).unwrap_or(0).saturating_sub(text.chars().count());
    budget.bytes(missing.saturating_mul(fill.len()))?;
    let left = match side {
        "ljust" => 0,
        "rjust" => missing,
        _ => missing / 2 + (missing & usize::try_from(width).unwrap_or(0) & 1),
    };
    budget.text(format!("{}{text}{}", fill.repeat(left), fill.repeat(missing - left)))
}

fn split(text: &str, separator: Option<&str>, count: i64, right: bool, budget: &Budget) -> Result<Value> {
    let mut left = usize::try_from(count).unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = Vec::new();
    let mut rest = text;
    match separator {
        Some("") => return refuse("split() takes a text that is not empty"),
        Some(separator) => {
            while left > 0 {
                let halves = if right { rest.rsplit_once(separator) } else { rest.split_once(separator) };
                let Some((before, behind)) = halves else { break };
                let (part, remainder) = if right { (behind, before) } else { (before, behind) };
                parts.push(part);
                rest = remainder;
                left -= 1;
            }
            parts.push(rest);
        }
        None => {
            rest = strip(rest, None, !right, right);
            while !rest.is_empty() {
                let end = if right { rest.rfind(is_space) } else { rest.find(is_space) };
                let Some(end) = end.filter(|_| left > 0) else {
                    // Behind the last cut it keeps its spaces.
                    parts.push(rest);
                    break;
                };
                let (before, behind) = rest.split_at(end);
                parts.push(if right { strip(behind, None, true, false) } else { before });
                rest = if right { before } else { behind };
                rest = strip(rest, None, !right, right);
                left -= 1;
            }
        }
    }
    if right {
        parts.reverse();
    }
    budget.list(parts.into_iter().map(Value::from).collect())
}

fn splitlines(text: &str, keep: bool, budget: &Budget) -> Result<Value> {
    let ends = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let mut lines = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest.find(ends).unwrap_or(rest.len());
        let length = match rest[end..].chars().next() {
            Some('\r') if rest[end..].starts_with("\r\n") => 2,
            Some(c) => c.len_utf8(),
            None => 0,
        };
        lines.push(Value::from(&rest[..if keep { end + length } else { end }]));
        rest = &rest[end + length..];
    }
    budget.list(lines)
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
