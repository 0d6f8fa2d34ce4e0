//! What Python's `str` does that Rust's does otherwise.

use std::sync::LazyLock;

use regex::Regex;

use super::value::{Budget, Value, is_space};
use super::{Result, refuse};

pub(super) static LETTERS: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"^\p{L}+\z").ok());
pub(super) static ALPHANUMERIC: LazyLock<Option<Regex>> =
    LazyLock::new(|| Regex::new(r"^[\p{L}\p{N}]+\z").ok());
static WORDS: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"[\p{L}\p{N}_]+").ok());

/// How many words Python's `\w+` finds.
pub(super) fn word_count(text: &str) -> usize {
    WORDS.as_ref().map_or(0, |words| words.find_iter(text).count())
}

/// Whether upper case and title case of a letter are one.
pub(super) fn one_case(c: char) -> bool {
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

pub(super) fn title(text: &str) -> Result<String> {
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

pub(super) fn split(
    text: &str,
    separator: Option<&str>,
    count: i64,
    right: bool,
    budget: &Budget,
) -> Result<Value> {
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

pub(super) fn splitlines(text: &str, keep: bool, budget: &Budget) -> Result<Value> {
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
