//! From a template's text to its tree: Jinja's lexer and parser, with `trim_blocks`, `lstrip_blocks` and the tags
//! that transformers adds.

use std::rc::Rc;

use super::value::{Value, is_space};
use super::{Result, filters, refuse};

/// How deep tags and expressions may stand in each other, so that no template exhausts the stack.
const MAX_DEPTH: usize = 48;

/// Spellings of operators, the longest first.
const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}", ">", "<",
    "=", ".", ":", "|", ",", ";",
];

#[derive(Debug, Clone, PartialEq)]
enum Token {
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

/// A statement, and the line on which it begins.
#[derive(Debug)]
pub(super) struct Statement {
    pub line: usize,
    pub kind: Kind,
}

#[derive(Debug)]
pub(super) enum Kind {
    Text(String),
    Print(Vec<Expr>),
    For(Rc<For>),
    /// Conditions with their bodies, and the body behind `else`.
    If(Vec<(Expr, Vec<Statement>)>, Vec<Statement>),
    Set(Target, Expr),
    /// `{% set x | filter %}…{% endset %}`
    SetBlock(Target, Option<Expr>, Vec<Statement>),
    With(Vec<(Target, Expr)>, Vec<Statement>),
    Macro(String, Rc<MacroBody>),
    /// The call, and what `caller()` runs.
    Call(Expr, Rc<MacroBody>),
    FilterBlock(Expr, Vec<Statement>),
    /// transformers' `{% generation %}`, which renders its body in a scope of its own.
    Generation(Vec<Statement>),
    Break,
    Continue,
}

#[derive(Debug)]
pub(super) struct For {
    pub target: Target,
    pub items: Expr,
    pub test: Option<Expr>,
    pub recursive: bool,
    pub body: Vec<Statement>,
    pub otherwise: Vec<Statement>,
}

#[derive(Debug)]
pub(super) struct MacroBody {
    pub name: String,
    pub parameters: Vec<String>,
    /// Of the last parameters.
    pub defaults: Vec<Expr>,
    pub body: Vec<Statement>,
}

/// What is assigned to.
#[derive(Debug)]
pub(super) enum Target {
    Name(String),
    Tuple(Vec<Target>),
    /// `{% set namespace.attribute = … %}`
    Attribute(String, String),
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Binary {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Mod,
    Pow,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Comparison {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
}

#[derive(Debug, Default)]
pub(super) struct Arguments {
    pub positional: Vec<Expr>,
    pub named: Vec<(String, Expr)>,
}

#[derive(Debug)]
pub(super) enum Expr {
    Const(Value),
    Name(String),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Negative(Box<Expr>),
    Positive(Box<Expr>),
    Not(Box<Expr>),
    And(Box<Expr>, Box<Expr>),
    Or(Box<Expr>, Box<Expr>),
    Binary(Binary, Box<Expr>, Box<Expr>),
    Concat(Vec<Expr>),
    Compare(Box<Expr>, Vec<(Comparison, Expr)>),
    /// Condition, value, and the value behind `else`.
    Conditional(Box<Expr>, Box<Expr>, Option<Box<Expr>>),
    Attribute(Box<Expr>, String),
    Item(Box<Expr>, Box<Expr>),
    Slice(Box<Expr>, [Option<Box<Expr>>; 3]),
    Call(Box<Expr>, Arguments),
    /// No expression: the body of a block.
    Filter(Option<Box<Expr>>, String, Arguments),
    Test(Box<Expr>, String, Arguments),
}

/// Reads a template.
pub(super) fn parse(source: &str) -> Result<Vec<Statement>> {
    let tokens = Lexer::run(source)?;
    let mut parser = Parser { tokens, at: 0, depth: 0, loops: 0 };
    let body = parser.statements(&[])?;
    Ok(body)
}

/// Cuts a template into tokens.
struct Lexer<'a> {
    source: &'a str,
    at: usize,
    line: usize,
    tokens: Vec<(Token, usize)>,
    /// Whether the last match ended a line, so that a tag's indentation may be stripped.
    line_starting: bool,
}

impl Lexer<'_> {
    fn run(source: &str) -> Result<Vec<(Token, usize)>> {
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

struct Parser {
    tokens: Vec<(Token, usize)>,
    at: usize,
    depth: usize,
    /// How many loops a `break` at this place could end.
    loops: usize,
}

impl Parser {
    fn current(&self) -> &Token {
        self.tokens.get(self.at).map_or(&Token::End, |(token, _)| token)
    }

    fn ahead(&self) -> &Token {
        self.tokens.get(self.at + 1).map_or(&Token::End, |(token, _)| token)
    }

    fn line(&self) -> usize {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(1, |(_, line)| *line)
    }

    fn next(&mut self) -> Token {
        let token = self.current().clone();
        self.at += 1;
        token
    }

    fn is_op(&self, operator: &str) -> bool {
        matches!(self.current(), Token::Op(o) if *o == operator)
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.current(), Token::Name(n) if n == name)
    }

    fn skip_op(&mut self, operator: &str) -> bool {
        let found = self.is_op(operator);
        self.at += usize::from(found);
        found
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        self.at += usize::from(found);
        found
    }

    fn expect_op(&mut self, operator: &str) -> Result<()> {
        if self.skip_op(operator) { Ok(()) } else { self.unexpected(&format!("{operator:?}")) }
    }

    fn expect_name(&mut self) -> Result<String> {
        match self.next() {
            Token::Name(name) => Ok(name),
            _ => {
                self.at -= 1;
                self.unexpected("a name")
            }
        }
    }

    fn unexpected<T>(&self, expected: &str) -> Result<T> {
        let found = match self.current() {
            Token::Data(_) | Token::BlockBegin | Token::VariableBegin => "text".into(),
            Token::BlockEnd | Token::VariableEnd => "the tag's end".into(),
            Token::Name(name) => format!("{name:?}"),
            Token::Text(text) => format!("the text {text:?}"),
            Token::Int(number) => number.to_string(),
            Token::Float(number) => number.to_string(),
            Token::Op(operator) => format!("{operator:?}"),
            Token::End => "the template's end".into(),
        };
        refuse(format!("line {}: {found} stands where {expected} should", self.line()))
    }

    fn nested<T>(&mut self, inner: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.depth >= MAX_DEPTH {
            return refuse(format!(
                "line {}: more than {MAX_DEPTH} tags and brackets stand in each other",
                self.line()
            ));
        }
        self.depth += 1;
        let result = inner(self);
        self.depth -= 1;
        result
    }

    /// Statements up to a tag of one of these names, which is left to be read; up to the end where there is none.
    fn statements(&mut self, ends: &[&str]) -> Result<Vec<Statement>> {
        self.nested(|parser| {
            let mut body = Vec::new();
            loop {
                let line = parser.line();
                let kind = match parser.next() {
                    Token::Data(text) => Kind::Text(text),
                    Token::VariableBegin => {
                        let expr = parser.tuple(true, &[])?;
                        if parser.next() != Token::VariableEnd {
                            parser.at -= 1;
                            return parser.unexpected("\"}}\"");
                        }
                        Kind::Print(vec![expr])
                    }
                    Token::BlockBegin => {
                        if matches!(parser.current(), Token::Name(name) if ends.contains(&name.as_str())) {
                            return Ok(body);
                        }
                        let kind = parser.statement()?;
                        parser.block_end()?;
                        kind
                    }
                    Token::End if ends.is_empty() => return Ok(body),
                    _ => {
                        parser.at -= 1;
                        return parser.unexpected(&format!("the tag {}", ends.join(" or ")));
                    }
                };
                body.push(Statement { line, kind });
            }
        })
    }

    fn block_end(&mut self) -> Result<()> {
        if *self.current() != Token::BlockEnd {
            return self.unexpected("\"%}\"");
        }
        self.at += 1;
        Ok(())
    }

    /// The body behind a tag, and the name of the tag that ends it, which has been read.
    fn body(&mut self, ends: &[&str]) -> Result<(Vec<Statement>, String)> {
        self.block_end()?;
        let body = self.statements(ends)?;
        Ok((body, self.expect_name()?))
    }

    /// A body that becomes a function, or of whose output something is made: no `break` leaves it.
    fn closed_body(&mut self, end: &str) -> Result<Vec<Statement>> {
        let loops = std::mem::take(&mut self.loops);
        let result = self.body(&[end]);
        self.loops = loops;
        Ok(result?.0)
    }

    fn statement(&mut self) -> Result<Kind> {
        let line = self.line();
        let tag = self.expect_name()?;
        match tag.as_str() {
            "for" => self.for_loop(),
            "if" => self.condition(),
            "set" => self.set(),
            "with" => {
                let mut values = Vec::new();
                while *self.current() != Token::BlockEnd {
                    if !values.is_empty() {
                        self.expect_op(",")?;
                    }
                    let target = self.target(&[], false)?;
                    self.expect_op("=")?;
                    values.push((target, self.expression()?));
                }
                Ok(Kind::With(values, self.body(&["endwith"])?.0))
            }
            "macro" => {
                let name = self.expect_name()?;
                let (parameters, defaults) = self.signature()?;
                let body = self.closed_body("endmacro")?;
                let body = MacroBody { name: name.clone(), parameters, defaults, body };
                Ok(Kind::Macro(assignable(name)?, Rc::new(body)))
            }
            "call" => {
                let (parameters, defaults) =
                    if self.is_op("(") { self.signature()? } else { (Vec::new(), Vec::new()) };
                let call = self.expression()?;
                if !matches!(call, Expr::Call(..)) {
                    return refuse(format!("line {line}: {{% call %}} must call something"));
                }
                let body = self.closed_body("endcall")?;
                Ok(Kind::Call(call, Rc::new(MacroBody { name: "caller".into(), parameters, defaults, body })))
            }
            "filter" => {
                let filter = self.filters(None, true)?;
                Ok(Kind::FilterBlock(filter, self.closed_body("endfilter")?))
            }
            "generation" => Ok(Kind::Generation(self.closed_body("endgeneration")?)),
            "print" => {
                let mut printed = Vec::new();
                while *self.current() != Token::BlockEnd {
                    if !printed.is_empty() {
                        self.expect_op(",")?;
                    }
                    printed.push(self.expression()?);
                }
                Ok(Kind::Print(printed))
            }
            "break" | "continue" if self.loops == 0 => {
                refuse(format!("line {line}: {{% {tag} %}} stands in no loop"))
            }
            "break" => Ok(Kind::Break),
            "continue" => Ok(Kind::Continue),
            "block" | "extends" | "include" | "import" | "from" | "autoescape" => {
                refuse(format!("line {line}: the tag {{% {tag} %}} is not supported"))
            }
            _ => refuse(format!("line {line}: there is no tag {{% {tag} %}}")),
        }
    }

    fn for_loop(&mut self) -> Result<Kind> {
        let target = self.target(&["in"], false)?;
        if !self.skip_name("in") {
            return self.unexpected("\"in\"");
        }
        let items = self.tuple(false, &["recursive"])?;
        let test = if self.skip_name("if") { Some(self.expression()?) } else { None };
        let recursive = self.skip_name("recursive");
        self.loops += 1;
        let body = self.body(&["endfor", "else"]);
        self.loops -= 1;
        let (body, end) = body?;
        let otherwise = if end == "else" { self.body(&["endfor"])?.0 } else { Vec::new() };
        Ok(Kind::For(Rc::new(For { target, items, test, recursive, body, otherwise })))
    }

    fn condition(&mut self) -> Result<Kind> {
        let mut branches = Vec::new();
        loop {
            let test = self.tuple(false, &[])?;
            let (body, end) = self.body(&["elif", "else", "endif"])?;
            branches.push((test, body));
            match end.as_str() {
                "elif" => {}
                "else" => return Ok(Kind::If(branches, self.body(&["endif"])?.0)),
                _ => return Ok(Kind::If(branches, Vec::new())),
            }
        }
    }

    fn set(&mut self) -> Result<Kind> {
        let target = self.target(&[], true)?;
        if self.skip_op("=") {
            return Ok(Kind::Set(target, self.tuple(true, &[])?));
        }
        let filter = if self.is_op("|") { Some(self.filters(None, false)?) } else { None };
        Ok(Kind::SetBlock(target, filter, self.closed_body("endset")?))
    }

    fn signature(&mut self) -> Result<(Vec<String>, Vec<Expr>)> {
        self.expect_op("(")?;
        let (mut parameters, mut defaults) = (Vec::new(), Vec::new());
        while !self.is_op(")") {
            if !parameters.is_empty() {
                self.expect_op(",")?;
            }
            let name = assignable(self.expect_name()?)?;
            if parameters.contains(&name) || name == "caller" {
                return refuse(format!("line {}: a parameter {name:?} is not supported here", self.line()));
            }
            parameters.push(name);
            if self.skip_op("=") {
                defaults.push(self.expression()?);
            } else if !defaults.is_empty() {
                return refuse(format!(
                    "line {}: a parameter without default stands behind one with",
                    self.line()
                ));
            }
        }
        self.expect_op(")")?;
        Ok((parameters, defaults))
    }

    fn target(&mut self, ends: &[&str], namespaces: bool) -> Result<Target> {
        let mut targets = Vec::new();
        loop {
            let ended = matches!(self.current(), Token::BlockEnd | Token::Op(")" | "="))
                || matches!(self.current(), Token::Name(n) if ends.contains(&n.as_str()));
            if ended && !targets.is_empty() {
                return Ok(Target::Tuple(targets));
            }
            let target = if self.skip_op("(") {
                let inner = self.nested(|parser| parser.target(&[], false))?;
                self.expect_op(")")?;
                inner
            } else {
                let name = assignable(self.expect_name()?)?;
                if namespaces && self.skip_op(".") {
                    Target::Attribute(name, self.expect_name()?)
                } else {
                    Target::Name(name)
                }
            };
            targets.push(target);
            if !self.skip_op(",") {
                return match targets.len() {
                    1 => Ok(targets.swap_remove(0)),
                    _ => Ok(Target::Tuple(targets)),
                };
            }
        }
    }

    /// Expressions between commas: a tuple, where there is a comma.
    fn tuple(&mut self, conditional: bool, ends: &[&str]) -> Result<Expr> {
        let mut items = Vec::new();
        let mut commas = false;
        loop {
            let ended = matches!(self.current(), Token::VariableEnd | Token::BlockEnd | Token::Op(")"))
                || matches!(self.current(), Token::Name(n) if ends.contains(&n.as_str()));
            if ended {
                break;
            }
            items.push(if conditional { self.expression()? } else { self.nested(Self::or)? });
            if !self.skip_op(",") {
                break;
            }
            commas = true;
        }
        match (commas, items.pop()) {
            (false, Some(only)) => Ok(only),
            (false, None) => self.unexpected("an expression"),
            (true, last) => {
                items.extend(last);
                Ok(Expr::Tuple(items))
            }
        }
    }

    fn expression(&mut self) -> Result<Expr> {
        self.nested(|parser| {
            let mut expr = parser.or()?;
            while parser.skip_name("if") {
                let test = parser.or()?;
                let otherwise =
                    if parser.skip_name("else") { Some(Box::new(parser.expression()?)) } else { None };
                expr = Expr::Conditional(Box::new(test), Box::new(expr), otherwise);
            }
            Ok(expr)
        })
    }

    /// Operators of one rank, which bind to the left. Each adds to the depth of the tree.
    fn left_to_right(
        &mut self,
        operand: fn(&mut Self) -> Result<Expr>,
        mut operator: impl FnMut(&mut Self) -> Option<fn(Box<Expr>, Box<Expr>) -> Expr>,
    ) -> Result<Expr> {
        let mut left = operand(self)?;
        let depth = self.depth;
        while let Some(join) = operator(self) {
            let right = self.nested(operand)?;
            // The tree leans to the left, and is as deep as there are operators.
            self.depth += 1;
            left = join(Box::new(left), Box::new(right));
        }
        self.depth = depth;
        Ok(left)
    }

    fn or(&mut self) -> Result<Expr> {
        self.left_to_right(Self::and, |parser| parser.skip_name("or").then_some(Expr::Or as _))
    }

    fn and(&mut self) -> Result<Expr> {
        self.left_to_right(Self::not, |parser| parser.skip_name("and").then_some(Expr::And as _))
    }

    fn not(&mut self) -> Result<Expr> {
        if self.skip_name("not") {
            return Ok(Expr::Not(Box::new(self.nested(Self::not)?)));
        }
        self.comparison()
    }

    fn comparison(&mut self) -> Result<Expr> {
        let left = self.sum()?;
        let mut others = Vec::new();
        loop {
            let operator = match self.current() {
                Token::Op("==") => Comparison::Eq,
                Token::Op("!=") => Comparison::Ne,
                Token::Op("<") => Comparison::Lt,
                Token::Op("<=") => Comparison::Le,
                Token::Op(">") => Comparison::Gt,
                Token::Op(">=") => Comparison::Ge,
                Token::Name(name) if name == "in" => Comparison::In,
                Token::Name(name) if name == "not" && *self.ahead() == Token::Name("in".into()) => {
                    self.at += 1;
                    Comparison::NotIn
                }
                _ if others.is_empty() => return Ok(left),
                _ => return Ok(Expr::Compare(Box::new(left), others)),
            };
            self.at += 1;
            others.push((operator, self.sum()?));
        }
    }

    fn sum(&mut self) -> Result<Expr> {
        self.left_to_right(Self::concat, |parser| {
            if parser.skip_op("+") {
                Some(|a, b| Expr::Binary(Binary::Add, a, b))
            } else if parser.skip_op("-") {
                Some(|a, b| Expr::Binary(Binary::Sub, a, b))
            } else {
                None
            }
        })
    }

    fn concat(&mut self) -> Result<Expr> {
        let first = self.product()?;
        if !self.is_op("~") {
            return Ok(first);
        }
        let mut parts = vec![first];
        while self.skip_op("~") {
            parts.push(self.product()?);
        }
        Ok(Expr::Concat(parts))
    }

    fn product(&mut self) -> Result<Expr> {
        self.left_to_right(Self::power, |parser| {
            if parser.skip_op("*") {
                Some(|a, b| Expr::Binary(Binary::Mul, a, b))
            } else if parser.skip_op("//") {
                Some(|a, b| Expr::Binary(Binary::FloorDiv, a, b))
            } else if parser.skip_op("/") {
                Some(|a, b| Expr::Binary(Binary::Div, a, b))
            } else if parser.skip_op("%") {
                Some(|a, b| Expr::Binary(Binary::Mod, a, b))
            } else {
                None
            }
        })
    }

    fn power(&mut self) -> Result<Expr> {
        self.left_to_right(
            |parser| parser.unary(true),
            |parser| parser.skip_op("**").then_some(|a, b| Expr::Binary(Binary::Pow, a, b)),
        )
    }

    fn unary(&mut self, with_filters: bool) -> Result<Expr> {
        let mut expr = if self.skip_op("-") {
            Expr::Negative(Box::new(self.nested(|parser| parser.unary(false))?))
        } else if self.skip_op("+") {
            Expr::Positive(Box::new(self.nested(|parser| parser.unary(false))?))
        } else {
            self.primary()?
        };
        let depth = self.depth;
        expr = self.postfix(expr)?;
        if with_filters {
            loop {
                self.deeper()?;
                expr = match self.current() {
                    Token::Op("|") => self.filters(Some(expr), false)?,
                    Token::Op("(") => Expr::Call(Box::new(expr), self.arguments()?),
                    Token::Name(name) if name == "is" => self.test(expr)?,
                    _ => break,
                };
            }
        }
        self.depth = depth;
        Ok(expr)
    }

    /// One step deeper into the tree, until whoever knows the depth before sets it back.
    fn deeper(&mut self) -> Result<()> {
        self.nested(|_| Ok(()))?;
        self.depth += 1;
        Ok(())
    }

    fn primary(&mut self) -> Result<Expr> {
        match self.next() {
            Token::Name(name) => Ok(match name.as_str() {
                "true" | "True" => Expr::Const(Value::Bool(true)),
                "false" | "False" => Expr::Const(Value::Bool(false)),
                "none" | "None" => Expr::Const(Value::None),
                _ => Expr::Name(name),
            }),
            Token::Text(mut text) => {
                while let Token::Text(more) = self.current() {
                    text.push_str(more);
                    self.at += 1;
                }
                Ok(Expr::Const(Value::from(text)))
            }
            Token::Int(number) => Ok(Expr::Const(Value::Int(number))),
            Token::Float(number) => Ok(Expr::Const(Value::Float(number))),
            Token::Op("(") => {
                if self.skip_op(")") {
                    return Ok(Expr::Tuple(Vec::new()));
                }
                let expr = self.nested(|parser| parser.tuple(true, &[]))?;
                self.expect_op(")")?;
                Ok(expr)
            }
            Token::Op("[") => {
                let mut items = Vec::new();
                while !self.skip_op("]") {
                    if !items.is_empty() {
                        self.expect_op(",")?;
                        if self.skip_op("]") {
                            break;
                        }
                    }
                    items.push(self.expression()?);
                }
                Ok(Expr::List(items))
            }
            Token::Op("{") => {
                let mut entries = Vec::new();
                while !self.skip_op("}") {
                    if !entries.is_empty() {
                        self.expect_op(",")?;
                        if self.skip_op("}") {
                            break;
                        }
                    }
                    let key = self.expression()?;
                    self.expect_op(":")?;
                    entries.push((key, self.expression()?));
                }
                Ok(Expr::Dict(entries))
            }
            _ => {
                self.at -= 1;
                self.unexpected("an expression")
            }
        }
    }

    fn postfix(&mut self, mut expr: Expr) -> Result<Expr> {
        loop {
            match self.current() {
                Token::Op(".") => {
                    self.at += 1;
                    expr = match self.next() {
                        Token::Name(name) => Expr::Attribute(Box::new(expr), name),
                        Token::Int(index) => {
                            Expr::Item(Box::new(expr), Box::new(Expr::Const(Value::Int(index))))
                        }
                        _ => {
                            self.at -= 1;
                            return self.unexpected("a name or a number");
                        }
                    };
                }
                Token::Op("[") => {
                    self.at += 1;
                    expr = self.nested(|parser| parser.subscript(expr))?;
                    self.expect_op("]")?;
                }
                Token::Op("(") => expr = Expr::Call(Box::new(expr), self.arguments()?),
                _ => return Ok(expr),
            }
            self.deeper()?;
        }
    }

    fn subscript(&mut self, of: Expr) -> Result<Expr> {
        let ended = |parser: &Self| parser.is_op("]") || parser.is_op(",");
        let first = if self.is_op(":") { None } else { Some(Box::new(self.expression()?)) };
        let expr = match first {
            Some(index) if !self.is_op(":") => Expr::Item(Box::new(of), index),
            first => {
                self.expect_op(":")?;
                let mut rest = [None, None];
                if !ended(self) && !self.is_op(":") {
                    rest[0] = Some(Box::new(self.expression()?));
                }
                if self.skip_op(":") && !ended(self) {
                    rest[1] = Some(Box::new(self.expression()?));
                }
                let [second, third] = rest;
                Expr::Slice(Box::new(of), [first, second, third])
            }
        };
        if self.is_op(",") {
            return refuse(format!("line {}: several subscripts at once are not supported", self.line()));
        }
        Ok(expr)
    }

    fn arguments(&mut self) -> Result<Arguments> {
        self.expect_op("(")?;
        let mut arguments = Arguments::default();
        let mut first = true;
        while !self.skip_op(")") {
            if !first {
                self.expect_op(",")?;
                if self.skip_op(")") {
                    break;
                }
            }
            first = false;
            if self.is_op("*") || self.is_op("**") {
                return refuse(format!("line {}: * and ** in a call are not supported", self.line()));
            }
            if matches!(self.ahead(), Token::Op("=")) && matches!(self.current(), Token::Name(_)) {
                let name = self.expect_name()?;
                self.at += 1;
                if arguments.named.iter().any(|(other, _)| *other == name) {
                    return refuse(format!("line {}: the argument {name:?} is given twice", self.line()));
                }
                arguments.named.push((name, self.expression()?));
            } else if arguments.named.is_empty() {
                arguments.positional.push(self.expression()?);
            } else {
                return refuse(format!(
                    "line {}: an argument without name stands behind one with",
                    self.line()
                ));
            }
        }
        Ok(arguments)
    }

    fn filters(&mut self, of: Option<Expr>, mut inline: bool) -> Result<Expr> {
        let mut expr = of;
        while inline || self.is_op("|") {
            if !inline {
                self.at += 1;
            }
            inline = false;
            self.deeper()?;
            let name = self.known(filters::FILTERS, "filter")?;
            let arguments = if self.is_op("(") { self.arguments()? } else { Arguments::default() };
            expr = Some(Expr::Filter(expr.map(Box::new), name, arguments));
        }
        match expr {
            Some(expr) => Ok(expr),
            None => self.unexpected("a filter"),
        }
    }

    /// The name of a filter or test, which must be one of those that are supported.
    fn known(&mut self, names: &[&str], what: &str) -> Result<String> {
        let line = self.line();
        let mut name = self.expect_name()?;
        while self.skip_op(".") {
            name = format!("{name}.{}", self.expect_name()?);
        }
        if names.contains(&name.as_str()) {
            return Ok(name);
        }
        refuse(format!("line {line}: the {what} {name:?} is not supported"))
    }

    fn test(&mut self, of: Expr) -> Result<Expr> {
        self.at += 1;
        let negated = self.skip_name("not");
        let name = self.known(filters::TESTS, "test")?;
        let takes_one = match self.current() {
            Token::Name(word) if word == "is" => {
                return refuse(format!("line {}: tests with \"is\" cannot be chained", self.line()));
            }
            Token::Name(word) => !matches!(word.as_str(), "else" | "or" | "and"),
            Token::Text(_) | Token::Int(_) | Token::Float(_) | Token::Op("[" | "{") => true,
            _ => false,
        };
        let arguments = if self.is_op("(") {
            self.arguments()?
        } else if takes_one {
            let depth = self.depth;
            let argument = self.primary()?;
            let argument = self.postfix(argument)?;
            self.depth = depth;
            Arguments { positional: vec![argument], named: Vec::new() }
        } else {
            Arguments::default()
        };
        let test = Expr::Test(Box::new(of), name, arguments);
        Ok(if negated { Expr::Not(Box::new(test)) } else { test })
    }
}

/// A name that may be assigned to.
fn assignable(name: String) -> Result<String> {
    match name.as_str() {
        "true" | "True" | "false" | "False" | "none" | "None" | "loop" => {
            refuse(format!("{name} cannot be assigned to"))
        }
        _ => Ok(name),
    }
}
