//! Jinja's expressions, from the operators that bind least to names and numbers.

use super::Parser;
use crate::processor::jinja::lexer::Token;
use crate::processor::jinja::syntax::{Arguments, Binary, Comparison, Expr};
use crate::processor::jinja::value::Value;
use crate::processor::jinja::{Result, filters, predicates, refuse};

impl Parser {
    /// Expressions between commas: a tuple, where there is a comma.
    pub(super) fn tuple(&mut self, conditional: bool, ends: &[&str]) -> Result<Expr> {
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

    pub(super) fn expression(&mut self) -> Result<Expr> {
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

    pub(super) fn or(&mut self) -> Result<Expr> {
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

    pub(super) fn unary(&mut self, with_filters: bool) -> Result<Expr> {
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

    pub(super) fn primary(&mut self) -> Result<Expr> {
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

    pub(super) fn arguments(&mut self) -> Result<Arguments> {
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

    pub(super) fn filters(&mut self, of: Option<Expr>, mut inline: bool) -> Result<Expr> {
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
        let name = self.known(predicates::TESTS, "test")?;
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
