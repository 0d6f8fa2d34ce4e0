//! From a template's text to its tokens: Jinja's lexer, with `trim_blocks` and `lstrip_blocks`.

use super::value::is_space;
use super::{Result, refuse};

/// Spellings of operators, the longest first.
const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<",
    "=", ".", ":", "|", ",", ";",
];

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Token {
    Data(String),
    VariableBegin,
    VariableEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Text(String),
    Int(i64),
    Float(f64),
    Op(&'static str),
    End,
}

/// Cuts a template into tokens.
pub(super) struct Lexer<'a> {
    source: &'a str,
    at: usize,
    line: usize,
    tokens: Vec<(Token, usize)>,
    /// Whether the last match ended a line, so that a tag's indentation may be stripped.
    line_starting: bool,
}

impl Lexer<'_> {
    pub fn run(source: &str) -> Result<Vec<(Token, usize)>> {
        let lines = source.replace("\r\n", "\n").replace('\r', "\n");
        let source = lines.strip_suffix('\n').unwrap_or(&lines);
        let mut lexer = Lexer { source, at: 0, line: 1, tokens: Vec::new(), line_starting: true };
        lexer.root().map_err(|e| e.on_line(lexer.line))?;
        lexer.push(Token::End);
        Ok(lexer.tokens)
    }

    fn rest(&self) -> &str {
        &self.source[self.at..]
    }

    fn push(&mut self, token: Token) {
        self.tokens.push((token, self.line));
    }

    /// Goes on by so many bytes.
    fn skip(&mut self, length: usize) {
        let end = self.at + length;
        self.line += self.source[self.at..end].matches('\n').count();
        if length > 0 {
            self.line_starting = self.source[..end].ends_with('\n');
        }
        self.at = end;
    }

    fn skip_spaces(&mut self) {
        let length = self.rest().len() - self.rest().trim_start_matches(is_space).len();
        self.skip(length);
    }

    fn root(&mut self) -> Result<()> {
        loop {
            let rest = self.rest();
            let Some(begin) = ["{%", "{{", "{#"].iter().filter_map(|tag| rest.find(tag)).min() else {
                if !rest.is_empty() {
                    let token = Token::Data(rest.to_owned());
                    self.push(token);
                }
                return Ok(());
            };
            let (tag, behind) = (rest.as_bytes()[begin + 1], &rest[begin + 2..]);
            let sign = behind.chars().next().filter(|c| matches!(c, '-' | '+'));
            let text = self.before_tag(&rest[..begin], sign, tag != b'{');
            self.data(text);
            self.skip(begin + 2 + usize::from(sign.is_some()));
            match tag {
                b'#' => self.comment()?,
                b'%' => match self.raw_begin() {
                    Some(length) => self.raw(length)?,
                    None => self.tag(Token::BlockBegin, Token::BlockEnd, "%}")?,
                },
                _ => self.tag(Token::VariableBegin, Token::VariableEnd, "}}")?,
            }
        }
    }

    /// The text that stands before a tag, without what the tag strips.
    fn before_tag(&self, text: &str, sign: Option<char>, strips_indent: bool) -> String {
        if sign == Some('-') {
            return text.trim_end_matches(is_space).to_owned();
        }
        if sign.is_none() && strips_indent {
            let line = text.rfind('\n').map_or(0, |at| at + 1);
            if (line > 0 || self.line_starting) && text[line..].chars().all(is_space) {
                return text[..line].to_owned();
            }
        }
        text.to_owned()
    }

    fn data(&mut self, text: String) {
        if !text.is_empty() {
            self.push(Token::Data(text));
        }
    }

    /// Skips a tag's end: spaces behind `-`, one line's end behind neither `-` nor `+`.
    fn end_tag(&mut self, sign: Option<char>, trims: bool) {
        self.skip(2);
        match sign {
            Some('-') => self.skip_spaces(),
            None if trims && self.rest().starts_with('\n') => self.skip(1),
            _ => {}
        }
    }

    fn comment(&mut self) -> Result<()> {
        let Some(end) = self.rest().find("#}") else { return refuse("a comment has no end") };
        let sign = self.rest()[..end].chars().next_back().filter(|c| matches!(c, '-' | '+'));
        self.skip(end);
        self.end_tag(sign, true);
        Ok(())
    }

    /// The length of `raw %}` behind the start of a block, if that is what stands there.
    fn raw_begin(&self) -> Option<usize> {
        let rest = self.rest();
        let word = rest.trim_start_matches(is_space).strip_prefix("raw")?;
        let end = word.trim_start_matches(is_space);
        let behind = match end.strip_prefix("-%}") {
            Some(behind) => behind.trim_start_matches(is_space),
            None => end.strip_prefix("%}")?,
        };
        Some(rest.len() - behind.len())
    }

    fn raw(&mut self, begin: usize) -> Result<()> {
        self.skip(begin);
        let rest = self.rest();
        for (at, _) in rest.match_indices("{%") {
            let behind = &rest[at + 2..];
            let sign = behind.chars().next().filter(|c| matches!(c, '-' | '+'));
            let word = behind[usize::from(sign.is_some())..].trim_start_matches(is_space);
            let Some(end) = word.strip_prefix("endraw").map(|w| w.trim_start_matches(is_space)) else {
                continue;
            };
            let closing = end.chars().next().filter(|c| matches!(c, '-' | '+'));
            if !end[usize::from(closing.is_some())..].starts_with("%}") {
                continue;
            }
            let length = rest.len() - end.len() + usize::from(closing.is_some());
            let text = self.before_tag(&rest[..at], sign, true);
            self.data(text);
            self.skip(length);
            self.end_tag(closing, true);
            return Ok(());
        }
        refuse("a raw block has no end")
    }

    /// The inside of a block or of a printed expression.
    fn tag(&mut self, begin: Token, end: Token, closing: &'static str) -> Result<()> {
        self.push(begin);
        let trims = closing == "%}";
        let mut open = Vec::new();
        loop {
            let rest = self.rest();
            if open.is_empty() {
                let sign = rest.chars().next().filter(|&c| c == '-' || (c == '+' && trims));
                if rest[usize::from(sign.is_some())..].starts_with(closing) {
                    self.skip(usize::from(sign.is_some()));
                    self.end_tag(sign, trims);
                    self.push(end);
                    return Ok(());
                }
            }
            let Some(first) = rest.chars().next() else { return refuse("a tag has no end") };
            if is_space(first) {
                self.skip_spaces();
            } else if first.is_ascii_digit() {
                self.number()?;
            } else if first.is_ascii_alphabetic() || first == '_' {
                let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
                if rest[end..].starts_with(char::is_alphanumeric) {
                    return refuse("a name with letters outside ASCII is not supported");
                }
                let token = Token::Name(rest[..end].to_owned());
                self.push(token);
                self.skip(end);
            } else if matches!(first, '\'' | '"') {
                self.text(first)?;
            } else {
                let Some(operator) = OPERATORS.into_iter().find(|o| rest.starts_with(o)) else {
                    return refuse(format!("{first:?} cannot stand in a tag"));
                };
                match operator {
                    "(" => open.push(")"),
                    "[" => open.push("]"),
                    "{" => open.push("}"),
                    ")" | "]" | "}" if open.pop() != Some(operator) => {
                        return refuse(format!("{operator:?} closes nothing"));
                    }
                    _ => {}
                }
                self.push(Token::Op(operator));
                self.skip(operator.len());
            }
        }
    }

    fn number(&mut self) -> Result<()> {
        let rest = self.rest();
        let digits = |text: &str, of: &dyn Fn(char) -> bool| {
            // Digits with single underscores between them.
            let mut length = 0;
            let mut previous = '_';
            for c in text.chars() {
                match c {
                    '_' if previous != '_' => {}
                    c if of(c) => length += usize::from(previous == '_' && length > 0) + 1,
                    _ => break,
                }
                previous = c;
            }
            length
        };
        let decimal = |text: &str| digits(text, &|c| c.is_ascii_digit());
        let whole = decimal(rest);
        let mut length = whole;
        let behind_dot =
            matches!(self.tokens.last(), Some((Token::Op("."), _))) && self.source[..self.at].ends_with('.');
        if !behind_dot {
            if let Some(fraction) = rest[length..].strip_prefix('.') {
                let count = decimal(fraction);
                length += if count > 0 { count + 1 } else { 0 };
            }
            if let Some(exponent) = rest[length..].strip_prefix(['e', 'E']) {
                let sign = usize::from(exponent.starts_with(['+', '-']));
                let count = decimal(&exponent[sign..]);
                length += if count > 0 { 1 + sign + count } else { 0 };
            }
            if length > whole {
                let Ok(number) = rest[..length].replace('_', "").parse() else {
                    return refuse(format!("{:?} is no number", &rest[..length]));
                };
                self.push(Token::Float(number));
                self.skip(length);
                return Ok(());
            }
        }
        let (radix, length) = match rest.get(..2).map(str::to_ascii_lowercase).as_deref() {
            Some("0x") => (16, 2 + digits(&rest[2..], &|c| c.is_ascii_hexdigit())),
            Some("0o") => (8, 2 + digits(&rest[2..], &|c| ('0'..='7').contains(&c))),
            Some("0b") => (2, 2 + digits(&rest[2..], &|c| c == '0' || c == '1')),
            _ => (10, whole),
        };
        let text = rest[..length].replace('_', "");
        let digits = if radix == 10 { text.as_str() } else { &text[2..] };
        if radix == 10 && text.starts_with('0') && !text.trim_start_matches('0').is_empty() {
            return refuse(format!("{text:?} is no number: it begins with 0"));
        }
        let Ok(number) = i64::from_str_radix(digits, radix) else {
            return refuse(format!("the number {text} does not fit into 64 bits"));
        };
        self.push(Token::Int(number));
        self.skip(length);
        Ok(())
    }

    fn text(&mut self, quote: char) -> Result<()> {
        let mut escaped = false;
        let end = self.rest()[1..].char_indices().find(|&(_, c)| {
            let ends = c == quote && !escaped;
            escaped = c == '\\' && !escaped;
            ends
        });
        let Some((end, _)) = end else { return refuse("a text has no closing quote") };
        let token = Token::Text(unescape(&self.rest()[1..=end])?);
        self.push(token);
        self.skip(end + 2);
        Ok(())
    }
}

/// What Python's `unicode-escape` makes of a text.
fn unescape(text: &str) -> Result<String> {
    let mut result = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        result.push_str(&rest[..at]);
        let behind = &rest[at + 1..];
        let Some(kind) = behind.chars().next() else { return refuse("a text ends with a backslash") };
        if !kind.is_ascii() {
            return refuse(format!("the escape \\{kind} is not supported"));
        }
        let octal = behind.bytes().take(3).take_while(|b| (b'0'..=b'7').contains(b)).count();
        let (digits, radix) = match kind {
            'x' => (2, 16),
            'u' => (4, 16),
            'U' => (8, 16),
            _ if octal > 0 => (octal, 8),
            _ => (0, 0),
        };
        rest = &behind[1..];
        if digits > 0 {
            let code = if radix == 8 { behind.get(..octal) } else { rest.get(..digits) };
            let character = code
                .filter(|c| c.bytes().all(|b| b.is_ascii_hexdigit()))
                .and_then(|code| u32::from_str_radix(code, radix).ok())
                .and_then(char::from_u32);
            let Some(character) = character else {
                return refuse(format!("the escape \\{kind} does not name a character"));
            };
            result.push(character);
            rest = if radix == 8 { &behind[octal..] } else { &rest[digits..] };
            continue;
        }
        match kind {
            '\n' => {}
            '\\' | '\'' | '"' => result.push(kind),
            'a' => result.push('\u{7}'),
            'b' => result.push('\u{8}'),
            'f' => result.push('\u{c}'),
            'n' => result.push('\n'),
            'r' => result.push('\r'),
            't' => result.push('\t'),
            'v' => result.push('\u{b}'),
            'N' => return refuse("the escape \\N is not supported"),
            _ => {
                result.push('\\');
                result.push(kind);
            }
        }
    }
    result.push_str(rest);
    Ok(result)
}
