//! Runs a template: statements, scopes and expressions.

mod calls;

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use super::operators::{attribute, binary, compare, item, slice};
use super::syntax::{Expr, For, Kind, MacroBody, Statement, Target};
use super::value::{Budget, Value};
use super::{Result, refuse};

/// How deep calls, bodies and expressions may run in each other, so that no template exhausts the stack.
const MAX_DEPTH: usize = 300;
/// The longest `range`, as in the reference's sandbox.
const MAX_RANGE: i64 = 100_000;

/// Names that a body assigns, and the body around it.
#[derive(Debug, Default)]
pub(super) struct Scope {
    names: RefCell<HashMap<String, Value>>,
    outer: Option<Rc<Scope>>,
}

impl Scope {
    fn inside(outer: &Rc<Scope>) -> Rc<Self> {
        Rc::new(Self { names: RefCell::default(), outer: Some(outer.clone()) })
    }

    fn set(&self, name: &str, value: Value) {
        self.names.borrow_mut().insert(name.to_owned(), value);
    }

    fn get(&self, name: &str) -> Option<Value> {
        match self.names.borrow().get(name) {
            Some(value) => Some(value.clone()),
            None => self.outer.as_ref().and_then(|outer| outer.get(name)),
        }
    }
}

/// A macro with the scope in which it stands.
#[derive(Debug)]
pub(in crate::processor) struct MacroValue {
    body: Rc<MacroBody>,
    scope: Rc<Scope>,
}

/// The variable `loop`.
#[derive(Debug)]
pub(in crate::processor) struct LoopState {
    pub(super) items: Vec<Value>,
    pub(super) index: Cell<usize>,
    changed: RefCell<Option<Vec<Value>>>,
    pub(super) depth: usize,
    /// What `loop(…)` runs again.
    recursive: Option<(Rc<For>, Rc<Scope>)>,
}

/// The arguments of one call.
#[derive(Debug, Default)]
pub(super) struct Bound {
    /// What is called, for messages.
    pub name: String,
    pub positional: Vec<Value>,
    pub named: Vec<(String, Value)>,
}

impl Bound {
    /// The arguments for these parameters, where each has one at most.
    pub fn take<const N: usize>(self, parameters: [&str; N]) -> Result<[Option<Value>; N]> {
        let name = self.name;
        if self.positional.len() > N {
            return refuse(format!("{name} takes {N} arguments, and not {}", self.positional.len()));
        }
        let mut taken = [const { None }; N];
        for (place, value) in taken.iter_mut().zip(self.positional) {
            *place = Some(value);
        }
        for (key, value) in self.named {
            match parameters.iter().position(|parameter| *parameter == key) {
                Some(at) if taken[at].is_none() => taken[at] = Some(value),
                Some(_) => return refuse(format!("{name} has the argument {key:?} twice")),
                None => return refuse(format!("{name} takes no argument {key:?}")),
            }
        }
        Ok(taken)
    }

    /// The same, where no argument has a name.
    pub fn unnamed(self) -> Result<Self> {
        match self.named.first() {
            Some((key, _)) => refuse(format!("{} takes no argument {key:?}", self.name)),
            None => Ok(self),
        }
    }
}

/// Where a body went on to.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Flow {
    Next,
    Break,
    Continue,
}

/// Renders one template once.
pub(super) struct Interpreter {
    pub budget: Budget,
    variables: HashMap<String, Value>,
    depth: usize,
}

impl Interpreter {
    pub fn new(variables: Vec<(String, Value)>) -> Self {
        Self { budget: Budget::new(), variables: variables.into_iter().collect(), depth: 0 }
    }

    pub fn render(mut self, body: &[Statement]) -> Result<String> {
        let mut out = String::new();
        self.run(body, &Rc::default(), &mut out)?;
        Ok(out)
    }

    fn deeper<T>(&mut self, inner: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        self.budget.step(1)?;
        if self.depth >= MAX_DEPTH {
            return refuse(format!("more than {MAX_DEPTH} calls, tags and expressions run in each other"));
        }
        self.depth += 1;
        let result = inner(self);
        self.depth -= 1;
        result
    }

    fn write(&self, text: &str, out: &mut String) -> Result<()> {
        self.budget.bytes(text.len())?;
        out.push_str(text);
        Ok(())
    }

    fn run(&mut self, body: &[Statement], scope: &Rc<Scope>, out: &mut String) -> Result<Flow> {
        self.deeper(|this| {
            for statement in body {
                let flow = this.statement(&statement.kind, scope, out);
                match flow.map_err(|e| e.on_line(statement.line))? {
                    Flow::Next => {}
                    flow => return Ok(flow),
                }
            }
            Ok(Flow::Next)
        })
    }

    fn captured(&mut self, body: &[Statement], scope: &Rc<Scope>) -> Result<Value> {
        let mut text = String::new();
        self.run(body, scope, &mut text)?;
        Ok(Value::from(text))
    }

    fn statement(&mut self, kind: &Kind, scope: &Rc<Scope>, out: &mut String) -> Result<Flow> {
        self.budget.step(1)?;
        match kind {
            Kind::Text(text) => self.write(text, out)?,
            Kind::Print(expressions) => {
                for expr in expressions {
                    let text = self.eval(expr, scope)?.to_text(&self.budget)?;
                    self.write(&text, out)?;
                }
            }
            Kind::For(node) => {
                let items = self.eval(&node.items, scope)?;
                self.for_loop(node, items, 1, scope, out)?;
            }
            Kind::If(branches, otherwise) => {
                for (test, body) in branches {
                    if self.eval(test, scope)?.is_true() {
                        return self.run(body, scope, out);
                    }
                }
                return self.run(otherwise, scope, out);
            }
            Kind::Set(target, expr) => {
                let value = self.eval(expr, scope)?;
                self.assign(target, value, scope)?;
            }
            Kind::SetBlock(target, filter, body) => {
                let mut value = self.captured(body, &Scope::inside(scope))?;
                if let Some(filter) = filter {
                    value = self.filtered(filter, value, scope)?;
                }
                self.assign(target, value, scope)?;
            }
            Kind::With(values, body) => {
                let inner = Scope::inside(scope);
                for (target, expr) in values {
                    let value = self.eval(expr, scope)?;
                    self.assign(target, value, &inner)?;
                }
                return self.run(body, &inner, out);
            }
            Kind::Macro(name, body) => {
                let value = MacroValue { body: body.clone(), scope: scope.clone() };
                scope.set(name, Value::Macro(Rc::new(value)));
            }
            Kind::Call(call, body) => {
                let caller = MacroValue { body: body.clone(), scope: scope.clone() };
                let caller = Value::Macro(Rc::new(caller));
                let Expr::Call(callee, arguments) = call else {
                    return refuse("{% call %} must call something");
                };
                let Value::Macro(called) = self.eval(callee, scope)? else {
                    return refuse("{% call %} of something other than a macro is not supported");
                };
                let arguments = self.bind(&called.body.name, arguments, scope)?;
                let text = self.call_macro(&called, arguments, caller)?.to_text(&self.budget)?;
                self.write(&text, out)?;
            }
            Kind::FilterBlock(filter, body) => {
                let text = self.captured(body, &Scope::inside(scope))?;
                let text = self.filtered(filter, text, scope)?.to_text(&self.budget)?;
                self.write(&text, out)?;
            }
            Kind::Generation(body) => return self.run(body, &Scope::inside(scope), out),
            Kind::Break => return Ok(Flow::Break),
            Kind::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    fn for_loop(
        &mut self,
        node: &Rc<For>,
        items: Value,
        depth: usize,
        scope: &Rc<Scope>,
        out: &mut String,
    ) -> Result<()> {
        let mut items = items.items(&self.budget)?;
        if let Some(test) = &node.test {
            let mut kept = Vec::new();
            for item in items {
                let inner = Scope::inside(scope);
                // The condition sees no loop: it decides what the loop is over.
                inner.set("loop", Value::Undefined);
                self.assign(&node.target, item.clone(), &inner)?;
                if self.eval(test, &inner)?.is_true() {
                    kept.push(item);
                }
            }
            items = kept;
        }
        if items.is_empty() {
            self.run(&node.otherwise, &Scope::inside(scope), out)?;
            return Ok(());
        }
        let recursive = node.recursive.then(|| (node.clone(), scope.clone()));
        let state =
            Rc::new(LoopState { items, index: Cell::new(0), changed: RefCell::new(None), depth, recursive });
        for (index, item) in state.items.iter().enumerate() {
            self.budget.step(1)?;
            state.index.set(index);
            let inner = Scope::inside(scope);
            inner.set("loop", Value::Loop(state.clone()));
            self.assign(&node.target, item.clone(), &inner)?;
            if self.run(&node.body, &inner, out)? == Flow::Break {
                break;
            }
        }
        Ok(())
    }

    fn assign(&mut self, target: &Target, value: Value, scope: &Rc<Scope>) -> Result<()> {
        match target {
            Target::Name(name) => scope.set(name, value),
            Target::Tuple(targets) => {
                let items = value.items(&self.budget)?;
                if items.len() != targets.len() {
                    return refuse(format!("{} values stand where {} should", items.len(), targets.len()));
                }
                for (target, item) in targets.iter().zip(items) {
                    self.assign(target, item, scope)?;
                }
            }
            Target::Attribute(name, attribute) => {
                let Value::Namespace(namespace) = self.name(name, scope)? else {
                    return refuse(format!("{name}.{attribute} cannot be set: {name} is no namespace"));
                };
                let (key, value) = attribute_of_namespace(attribute.clone(), value)?;
                let mut entries = namespace.borrow_mut();
                match entries.iter_mut().find(|(other, _)| *other == key) {
                    Some(entry) => entry.1 = value,
                    None => entries.push((key, value)),
                }
            }
        }
        Ok(())
    }

    fn name(&self, name: &str, scope: &Rc<Scope>) -> Result<Value> {
        if let Some(value) = scope.get(name).or_else(|| self.variables.get(name).cloned()) {
            return Ok(value);
        }
        Ok(match name {
            "range" => Value::Function("range"),
            "dict" => Value::Function("dict"),
            "namespace" => Value::Function("namespace"),
            "raise_exception" => Value::Function("raise_exception"),
            "strftime_now" => Value::Function("strftime_now"),
            "lipsum" | "cycler" | "joiner" | "self" | "varargs" | "kwargs" => {
                return refuse(format!("{name} is not supported"));
            }
            _ => Value::Undefined,
        })
    }

    pub fn eval(&mut self, expr: &Expr, scope: &Rc<Scope>) -> Result<Value> {
        self.deeper(|this| this.eval_inner(expr, scope))
    }

    fn eval_all(&mut self, expressions: &[Expr], scope: &Rc<Scope>) -> Result<Vec<Value>> {
        expressions.iter().map(|expr| self.eval(expr, scope)).collect()
    }

    fn eval_inner(&mut self, expr: &Expr, scope: &Rc<Scope>) -> Result<Value> {
        match expr {
            Expr::Const(value) => Ok(value.clone()),
            Expr::Name(name) => self.name(name, scope),
            Expr::List(items) => {
                let items = self.eval_all(items, scope)?;
                self.budget.list(items)
            }
            Expr::Tuple(items) => {
                let items = self.eval_all(items, scope)?;
                self.budget.tuple(items)
            }
            Expr::Dict(entries) => {
                let pair =
                    |(key, value): &(Expr, Expr)| Ok((self.eval(key, scope)?, self.eval(value, scope)?));
                let entries = entries.iter().map(pair).collect::<Result<_>>()?;
                self.budget.dict(entries)
            }
            Expr::Negative(expr) => match self.eval(expr, scope)? {
                Value::Float(number) => Ok(Value::Float(-number)),
                value => match value.as_int().and_then(i64::checked_neg) {
                    Some(number) => Ok(Value::Int(number)),
                    None => refuse(format!("- of a {} is not supported", value.type_name())),
                },
            },
            Expr::Positive(expr) => match self.eval(expr, scope)? {
                Value::Float(number) => Ok(Value::Float(number)),
                value => match value.as_int() {
                    Some(number) => Ok(Value::Int(number)),
                    None => refuse(format!("+ of a {} is not supported", value.type_name())),
                },
            },
            Expr::Not(expr) => Ok(Value::Bool(!self.eval(expr, scope)?.is_true())),
            Expr::And(left, right) => {
                let left = self.eval(left, scope)?;
                if left.is_true() { self.eval(right, scope) } else { Ok(left) }
            }
            Expr::Or(left, right) => {
                let left = self.eval(left, scope)?;
                if left.is_true() { Ok(left) } else { self.eval(right, scope) }
            }
            Expr::Binary(operator, left, right) => {
                let (left, right) = (self.eval(left, scope)?, self.eval(right, scope)?);
                binary(*operator, &left, &right, &self.budget)
            }
            Expr::Concat(parts) => {
                let mut out = String::new();
                for part in self.eval_all(parts, scope)? {
                    let text = part.to_text(&self.budget)?;
                    self.write(&text, &mut out)?;
                }
                Ok(Value::from(out))
            }
            Expr::Compare(left, others) => {
                let mut left = self.eval(left, scope)?;
                for (operator, right) in others {
                    let right = self.eval(right, scope)?;
                    if !compare(*operator, &left, &right, &self.budget)? {
                        return Ok(Value::Bool(false));
                    }
                    left = right;
                }
                Ok(Value::Bool(true))
            }
            Expr::Conditional(test, value, otherwise) => {
                if self.eval(test, scope)?.is_true() {
                    self.eval(value, scope)
                } else {
                    otherwise.as_ref().map_or(Ok(Value::Undefined), |otherwise| self.eval(otherwise, scope))
                }
            }
            Expr::Attribute(of, name) => {
                let of = self.eval(of, scope)?;
                attribute(&of, name, &self.budget)
            }
            Expr::Item(of, key) => {
                let (of, key) = (self.eval(of, scope)?, self.eval(key, scope)?);
                item(&of, &key, &self.budget)
            }
            Expr::Slice(of, bounds) => {
                let of = self.eval(of, scope)?;
                let mut values = [None; 3];
                for (value, bound) in values.iter_mut().zip(bounds) {
                    let Some(bound) = bound else { continue };
                    *value = match self.eval(bound, scope)? {
                        Value::None => None,
                        other => match other.as_int() {
                            Some(number) => Some(number),
                            None => return refuse(format!("a {} cannot bound a slice", other.type_name())),
                        },
                    };
                }
                slice(&of, values, &self.budget)
            }
            Expr::Call(callee, arguments) => self.call(callee, arguments, scope),
            Expr::Filter(Some(of), name, arguments) => {
                let of = self.eval(of, scope)?;
                let arguments = self.bind(name, arguments, scope)?;
                self.filter(of, arguments)
            }
            Expr::Filter(None, name, _) => refuse(format!("the filter {name:?} has nothing to filter")),
            Expr::Test(of, name, arguments) => {
                let of = self.eval(of, scope)?;
                let arguments = self.bind(name, arguments, scope)?;
                self.test(&of, arguments).map(Value::Bool)
            }
        }
    }
}

/// What a namespace can hold.
fn attribute_of_namespace(name: String, value: Value) -> Result<(String, Value)> {
    if name.starts_with('_') {
        return refuse(format!("a namespace cannot hold {name:?}: it begins with an underscore"));
    }
    if matches!(value, Value::Namespace(_) | Value::Iterator(_) | Value::Loop(_) | Value::Macro(_)) {
        return refuse(format!("a {} in a namespace is not supported", value.type_name()));
    }
    Ok((name, value))
}
