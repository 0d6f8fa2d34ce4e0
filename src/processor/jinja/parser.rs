//! From tokens to a template's tree: Jinja's statements, and the tags that transformers adds.

mod expressions;

use std::rc::Rc;

use super::lexer::{Lexer, Token};
use super::syntax::{Expr, For, Kind, MacroBody, Statement, Target};
use super::{Result, refuse};

/// How deep tags and expressions may stand in each other, so that no template exhausts the stack.
const MAX_DEPTH: usize = 48;

/// Reads a template.
pub(super) fn parse(source: &str) -> Result<Vec<Statement>> {
    let tokens = Lexer::run(source)?;
    let mut parser = Parser { tokens, at: 0, depth: 0, loops: 0 };
    let body = parser.statements(&[])?;
    Ok(body)
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
