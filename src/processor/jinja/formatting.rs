//! How Python writes values: `repr`, the operator `%`, and `str.format`.

use std::sync::LazyLock;

use regex::Regex;

use super::value::{Budget, Value};
use super::{Result, refuse};

/// What `repr` escapes outside ASCII.
static UNPRINTABLE: LazyLock<Option<Regex>> = LazyLock::new(|| Regex::new(r"[\p{C}\p{Z}]").ok());

/// Python's `repr` of a float: the shortest digits that read back as the same number.
pub(super) fn float_repr(number: f64) -> String {
    if number.is_nan() {
        return "nan".into();
    }
    if number.is_infinite() {
        return if number > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        return if number.fract() == 0.0 { format!("{number:.1}") } else { format!("{number}") };
    }
    format!("{digits}e{}", signed_exponent(exponent))
}

/// An exponent as C writes it: a sign and at least two digits.
fn signed_exponent(exponent: i32) -> String {
    let sign = if exponent < 0 { '-' } else { '+' };
    format!("{sign}{:02}", exponent.unsigned_abs())
}

/// Python's `repr` of a text.
pub(super) fn text_repr(text: &str) -> Result<String> {
    let Some(unprintable) = UNPRINTABLE.as_ref() else { return refuse("texts cannot be quoted") };
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    let mut out = String::with_capacity(text.len() + 2);
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if c == quote => out.extend(['\\', c]),
            ' '..='~' => out.push(c),
            _ if c.is_ascii() || unprintable.is_match(c.encode_utf8(&mut [0; 4])) => {
                let code = u32::from(c);
                out.push_str(&match code {
                    0..=0xff => format!("\\x{code:02x}"),
                    0x100..=0xffff => format!("\\u{code:04x}"),
                    _ => format!("\\U{code:08x}"),
                });
            }
            _ => out.push(c),
        }
    }
    out.push(quote);
    Ok(out)
}

/// How one value is to be written.
#[derive(Debug, Default)]
struct Spec {
    fill: Option<char>,
    /// `<`, `>`, `^`, or `=`: behind the sign.
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

impl Spec {
    /// `prefix` (a sign, `0x`) and `body`, filled up to the width.
    fn pad(&self, prefix: &str, body: &str, align: char, budget: &Budget) -> Result<String> {
        let length = prefix.chars().count() + body.chars().count();
        let missing = self.width.saturating_sub(length);
        budget.bytes(missing.saturating_mul(4))?;
        let fill = |count: usize| self.fill.unwrap_or(' ').to_string().repeat(count);
        Ok(match self.align.unwrap_or(align) {
            '<' => format!("{prefix}{body}{}", fill(missing)),
            '^' => format!("{}{prefix}{body}{}", fill(missing / 2), fill(missing - missing / 2)),
            '=' => format!("{prefix}{}{body}", fill(missing)),
            _ => format!("{}{prefix}{body}", fill(missing)),
        })
    }

    fn text(&self, text: &str, budget: &Budget, align: char) -> Result<String> {
        let cut: String = text.chars().take(self.precision.unwrap_or(usize::MAX)).collect();
        self.pad("", &cut, align, budget)
    }

    fn sign_of(&self, negative: bool) -> &'static str {
        match self.sign {
            _ if negative => "-",
            Some('+') => "+",
            Some(' ') => " ",
            _ => "",
        }
    }

    fn int(&self, number: i64, budget: &Budget) -> Result<String> {
        let value = number.unsigned_abs();
        let (prefix, mut digits) = match self.kind {
            Some('x') => ("0x", format!("{value:x}")),
            Some('X') => ("0X", format!("{value:X}")),
            Some('o') => ("0o", format!("{value:o}")),
            Some('b') => ("0b", format!("{value:b}")),
            _ => ("", value.to_string()),
        };
        if let Some(least) = self.precision {
            budget.bytes(least)?;
            digits = format!("{digits:0>least$}");
        }
        let prefix = if self.alternate { prefix } else { "" };
        let digits = self.grouped(&digits, if prefix.is_empty() { 3 } else { 4 })?;
        self.pad(&format!("{}{prefix}", self.sign_of(number < 0)), &digits, '>', budget)
    }

    fn float(&self, number: f64, budget: &Budget) -> Result<String> {
        if self.alternate {
            return refuse("formatting a float with # is not supported");
        }
        let precision = self.precision.unwrap_or(6);
        budget.bytes(precision.saturating_add(400))?;
        if precision > 400 {
            return refuse(format!("formatting a float with {precision} digits is not supported"));
        }
        let value = number.abs();
        let upper = matches!(self.kind, Some('E' | 'F' | 'G'));
        let body = match self.kind {
            _ if !number.is_finite() => if number.is_nan() { "nan" } else { "inf" }.into(),
            Some('e' | 'E') => scientific(value, precision),
            Some('g' | 'G') => general(value, precision),
            Some('%') => format!("{:.precision$}%", value * 100.0),
            Some('f' | 'F') => format!("{value:.precision$}"),
            _ if self.precision.is_some() => {
                return refuse("formatting a float with a precision and no type is not supported");
            }
            _ => float_repr(value),
        };
        let body = if upper { body.to_uppercase() } else { body };
        let (whole, fraction) = body.split_at(body.find(['.', 'e', '%']).unwrap_or(body.len()));
        let body = format!("{}{fraction}", self.grouped(whole, 3)?);
        self.pad(self.sign_of(number.is_sign_negative() && !number.is_nan()), &body, '>', budget)
    }

    /// Digits with a sign between groups.
    fn grouped(&self, digits: &str, size: usize) -> Result<String> {
        let Some(separator) = self.grouping else { return Ok(digits.to_owned()) };
        if self.align == Some('=') || size != 3 || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return refuse("grouping of padded digits, or of digits to another base, is not supported");
        }
        let mut out = String::new();
        for (index, digit) in digits.chars().enumerate() {
            if index > 0 && (digits.len() - index).is_multiple_of(size) {
                out.push(separator);
            }
            out.push(digit);
        }
        Ok(out)
    }
}

fn scientific(value: f64, precision: usize) -> String {
    let text = format!("{value:.precision$e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    format!("{digits}e{}", signed_exponent(exponent.parse().unwrap_or(0)))
}

/// C's `%g`.
fn general(value: f64, precision: usize) -> String {
    let precision = precision.max(1);
    let text = format!("{value:.*e}", precision - 1);
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let shorten = |digits: &str| match digits.contains('.') {
        true => digits.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => digits.to_owned(),
    };
    if exponent < -4 || exponent >= precision as i32 {
        return format!("{}e{}", shorten(digits), signed_exponent(exponent));
    }
    let decimals = usize::try_from(precision as i32 - 1 - exponent).unwrap_or(0);
    shorten(&format!("{value:.decimals$}"))
}

/// A code point's character, as `%c` writes it.
fn character(value: &Value) -> Result<String> {
    let code = value.as_int().and_then(|code| u32::try_from(code).ok()).and_then(char::from_u32);
    match (code, value.as_str()) {
        (Some(c), _) => Ok(c.to_string()),
        (None, Some(text)) if text.chars().count() == 1 => Ok(text.to_owned()),
        _ => refuse(format!("a {} is no character", value.type_name())),
    }
}

/// A count in a format.
fn count(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Result<Option<usize>> {
    let mut digits = String::new();
    while let Some(digit) = chars.next_if(char::is_ascii_digit) {
        digits.push(digit);
    }
    match digits.parse::<u32>() {
        Ok(count) => Ok(Some(count as usize)),
        Err(_) if digits.is_empty() => Ok(None),
        Err(_) => refuse(format!("a format asks for {digits} characters")),
    }
}

/// `format % value`
pub(super) fn percent(format: &str, value: &Value, budget: &Budget) -> Result<String> {
    let (positional, is_mapping) = match value {
        Value::Tuple(items) => (items.items.clone(), false),
        Value::List(_) | Value::Dict(_) | Value::Range(_) | Value::Undefined => (vec![value.clone()], true),
        _ => (vec![value.clone()], false),
    };
    let mut left = positional.into_iter();
    let mut out = String::new();
    let mut chars = format.chars().peekable();
    let mut named = false;
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut key = None;
        if chars.next_if_eq(&'(').is_some() {
            let name: String = chars.by_ref().take_while(|&c| c != ')').collect();
            let Value::Dict(dict) = value else { return refuse("%(name) needs a map") };
            key = dict.get(&Value::from(name.as_str()), budget)?;
            if key.is_none() || name.contains('(') {
                return refuse(format!("the map has no {name:?}, which a format asks for"));
            }
        }
        let mut spec = Spec::default();
        let mut zero = false;
        while let Some(flag) = chars.next_if(|c| "-+ #0".contains(*c)) {
            match flag {
                '-' => spec.align = Some('<'),
                '+' => spec.sign = Some('+'),
                ' ' => spec.sign = spec.sign.or(Some(' ')),
                '#' => spec.alternate = true,
                _ => zero = true,
            }
        }
        spec.width = count(&mut chars)?.unwrap_or(0);
        if chars.next_if_eq(&'.').is_some() {
            spec.precision = Some(count(&mut chars)?.unwrap_or(0));
        }
        let Some(kind) = chars.next() else { return refuse("a format ends behind %") };
        if kind == '%' && spec.width == 0 && spec.precision.is_none() && key.is_none() {
            out.push('%');
            continue;
        }
        named |= key.is_some();
        let argument = match key {
            Some(argument) => argument,
            None if named => return refuse("a format with and without names is not supported"),
            None => match left.next() {
                Some(argument) => argument,
                None => return refuse("a format asks for more values than there are"),
            },
        };
        spec.kind = Some(kind);
        let is_number = !matches!(kind, 's' | 'r' | 'c');
        if zero && is_number && spec.align.is_none() {
            (spec.fill, spec.align) = (Some('0'), Some('='));
        }
        let mismatch = || refuse(format!("%{kind} cannot format a {}", argument.type_name()));
        let written = match kind {
            's' => spec.text(&argument.to_text(budget)?, budget, '>')?,
            'r' => spec.text(&argument.repr(budget)?, budget, '>')?,
            'c' => {
                spec.precision = None;
                spec.text(&character(&argument)?, budget, '>')?
            }
            'd' | 'i' | 'u' => match (argument.as_int(), &argument) {
                (Some(number), _) => spec.int(number, budget)?,
                (None, Value::Float(number)) if number.abs() < 9e18 => {
                    spec.int(number.trunc() as i64, budget)?
                }
                _ => return mismatch(),
            },
            'x' | 'X' | 'o' => match argument.as_int() {
                Some(number) => spec.int(number, budget)?,
                None => return mismatch(),
            },
            'e' | 'E' | 'f' | 'F' | 'g' | 'G' => match argument.as_exact_float()? {
                Some(number) => spec.float(number, budget)?,
                None => return mismatch(),
            },
            _ => return refuse(format!("the format %{kind} is not supported")),
        };
        budget.bytes(written.len())?;
        out.push_str(&written);
    }
    if left.next().is_some() && !is_mapping && !named {
        return refuse("a format does not use all its values");
    }
    Ok(out)
}

/// `format.format(…)`
pub(super) fn format(
    format: &str,
    positional: &[Value],
    named: &[(String, Value)],
    budget: &Budget,
) -> Result<String> {
    let mut out = String::new();
    let mut rest = format;
    let (mut automatic, mut manual) = (0, false);
    while let Some(at) = rest.find(['{', '}']) {
        out.push_str(&rest[..at]);
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if let Some(behind) = rest.strip_prefix(brace) {
            out.push_str(brace);
            rest = behind;
            continue;
        }
        let end = rest.find('}').filter(|_| brace == "{");
        let Some(end) = end else { return refuse("a format has a single brace") };
        let field = &rest[..end];
        rest = &rest[end + 1..];
        let (name, spec) = field.split_once(':').unwrap_or((field, ""));
        let (name, conversion) = match name.split_once('!') {
            Some((name, conversion)) => (name, Some(conversion)),
            None => (name, None),
        };
        let mut value = if name.is_empty() {
            automatic += 1;
            positional.get(automatic - 1).cloned()
        } else if name.bytes().all(|b| b.is_ascii_digit()) {
            manual = true;
            name.parse::<usize>().ok().and_then(|index| positional.get(index).cloned())
        } else {
            named.iter().find(|(other, _)| other == name).map(|(_, value)| value.clone())
        };
        match conversion {
            None => {}
            Some("s") => value = value.map(|v| v.to_text(budget).map(Value::Str)).transpose()?,
            Some("r") => value = value.map(|v| v.repr(budget).map(Value::from)).transpose()?,
            Some(other) => return refuse(format!("the conversion !{other} in a format is not supported")),
        }
        let Some(value) = value.filter(|_| automatic == 0 || !manual) else {
            return refuse(format!("the field {{{field}}} of a format is not supported"));
        };
        let written = format_value(&value, spec, budget)?;
        budget.bytes(written.len())?;
        out.push_str(&written);
    }
    out.push_str(rest);
    Ok(out)
}

/// Python's `format(value, spec)`.
fn format_value(value: &Value, text: &str, budget: &Budget) -> Result<String> {
    if text.is_empty() {
        return Ok(value.to_text(budget)?.as_ref().to_owned());
    }
    let unsupported = || refuse(format!("the format {text:?} of a {} is not supported", value.type_name()));
    let mut spec = Spec::default();
    let mut chars = text.chars().peekable();
    let is_align = |c: char| matches!(c, '<' | '>' | '^' | '=');
    if text.chars().nth(1).is_some_and(is_align) {
        spec.fill = chars.next();
        spec.align = chars.next();
    } else if let Some(align) = chars.next_if(|&c| is_align(c)) {
        spec.align = Some(align);
    }
    spec.sign = chars.next_if(|&c| matches!(c, '+' | '-' | ' '));
    spec.alternate = chars.next_if_eq(&'#').is_some();
    if chars.next_if_eq(&'0').is_some() {
        if spec.align.is_some() || value.as_str().is_some() {
            return unsupported();
        }
        (spec.fill, spec.align) = (Some('0'), Some('='));
    }
    spec.width = count(&mut chars)?.unwrap_or(0);
    spec.grouping = chars.next_if(|&c| matches!(c, ',' | '_'));
    if chars.next_if_eq(&'.').is_some() {
        spec.precision = count(&mut chars)?;
        if spec.precision.is_none() {
            return unsupported();
        }
    }
    spec.kind = chars.next();
    if chars.next().is_some() {
        return unsupported();
    }
    match (value, spec.kind) {
        (Value::Str(text), None | Some('s'))
            if spec.sign.is_none()
                && !spec.alternate
                && spec.grouping.is_none()
                && spec.align != Some('=') =>
        {
            spec.text(text, budget, '<')
        }
        (Value::Int(_) | Value::Bool(_), None | Some('d' | 'x' | 'X' | 'o' | 'b'))
            if spec.precision.is_none() =>
        {
            spec.int(value.as_int().unwrap_or(0), budget)
        }
        (Value::Float(number), None | Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%')) => {
            spec.float(*number, budget)
        }
        (Value::Int(_) | Value::Bool(_), Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%')) => {
            spec.float(value.as_exact_float()?.unwrap_or(0.0), budget)
        }
        _ => unsupported(),
    }
}
