//! Runs a template: statements, scopes, expressions and calls.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;

use super::formatting;
use super::methods;
use super::syntax::{Arguments, Binary, Comparison, Expr, For, Kind, MacroBody, Statement, Target};
use super::value::{Budget, Range, Value};
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
    items: Vec<Value>,
    index: Cell<usize>,
    changed: RefCell<Option<Vec<Value>>>,
    depth: usize,
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

    /// A filter, or a chain of them, of a block's text.
    fn filtered(&mut self, filter: &Expr, text: Value, scope: &Rc<Scope>) -> Result<Value> {
        let Expr::Filter(of, name, arguments) = filter else { return self.eval(filter, scope) };
        let of = match of {
            Some(inner) => self.filtered(inner, text, scope)?,
            None => text,
        };
        let arguments = self.bind(name, arguments, scope)?;
        self.filter(of, arguments)
    }

    fn bind(&mut self, name: &str, arguments: &Arguments, scope: &Rc<Scope>) -> Result<Bound> {
        let positional = self.eval_all(&arguments.positional, scope)?;
        let named = |(key, expr): &(String, Expr)| Ok((key.clone(), self.eval(expr, scope)?));
        let named = arguments.named.iter().map(named).collect::<Result<_>>()?;
        Ok(Bound { name: name.to_owned(), positional, named })
    }

    fn call(&mut self, callee: &Expr, arguments: &Arguments, scope: &Rc<Scope>) -> Result<Value> {
        if let Expr::Attribute(of, name) = callee {
            let of = self.eval(of, scope)?;
            if let Value::Loop(state) = &of {
                let arguments = self.bind(name, arguments, scope)?;
                return self.loop_method(state, arguments);
            }
            if methods::has_attribute(&of, name) {
                let arguments = self.bind(name, arguments, scope)?;
                return methods::call(&of, name, arguments, &self.budget);
            }
            let called = attribute(&of, name, &self.budget)?;
            if !matches!(called, Value::Macro(_)) {
                return refuse(format!("a {} has no method {name}()", of.type_name()));
            }
            return self.call_value(called, name, arguments, scope);
        }
        let called = self.eval(callee, scope)?;
        let name = if let Expr::Name(name) = callee { name.as_str() } else { "it" };
        self.call_value(called, name, arguments, scope)
    }

    fn call_value(
        &mut self,
        called: Value,
        name: &str,
        arguments: &Arguments,
        scope: &Rc<Scope>,
    ) -> Result<Value> {
        let arguments = self.bind(name, arguments, scope)?;
        match called {
            Value::Macro(called) => self.call_macro(&called, arguments, Value::Undefined),
            Value::Function(name) => self.function(name, arguments),
            Value::Loop(state) => {
                let [Some(items)] = arguments.unnamed()?.take(["items"])? else {
                    return refuse("loop() takes what it loops over");
                };
                let Some((node, scope)) = &state.recursive else {
                    return refuse("the loop is not recursive");
                };
                let mut out = String::new();
                self.for_loop(node, items, state.depth + 1, scope, &mut out)?;
                Ok(Value::from(out))
            }
            other => refuse(format!("{name} is a {}, which cannot be called", other.type_name())),
        }
    }

    fn call_macro(&mut self, called: &MacroValue, arguments: Bound, caller: Value) -> Result<Value> {
        let MacroBody { name, parameters, defaults, body } = &*called.body;
        if arguments.positional.len() > parameters.len() {
            return refuse(format!(
                "{name} takes {} arguments, and not {}",
                parameters.len(),
                arguments.positional.len()
            ));
        }
        let scope = Scope::inside(&called.scope);
        scope.set("caller", caller);
        for (parameter, value) in parameters.iter().zip(arguments.positional) {
            scope.set(parameter, value);
        }
        for (key, value) in arguments.named {
            if !parameters.contains(&key) || scope.names.borrow().contains_key(&key) {
                return refuse(format!("{name} takes no argument {key:?}, or takes it once"));
            }
            scope.set(&key, value);
        }
        let first_default = parameters.len() - defaults.len();
        for (index, parameter) in parameters.iter().enumerate() {
            if scope.names.borrow().contains_key(parameter) {
                continue;
            }
            // A default sees the parameters before it, and none behind it.
            let value = match index.checked_sub(first_default).and_then(|at| defaults.get(at)) {
                Some(default) => self.eval(default, &scope)?,
                None => Value::Undefined,
            };
            scope.set(parameter, value);
        }
        self.captured(body, &scope)
    }

    fn loop_method(&mut self, state: &LoopState, arguments: Bound) -> Result<Value> {
        let arguments = arguments.unnamed()?;
        match (arguments.name.as_str(), arguments.positional.len()) {
            ("cycle", 1..) => {
                let at = state.index.get() % arguments.positional.len();
                Ok(arguments.positional[at].clone())
            }
            ("changed", _) => {
                let values = self.budget.tuple(arguments.positional.clone())?;
                let before = state.changed.replace(Some(arguments.positional));
                let before = before.map(|before| self.budget.tuple(before)).transpose()?;
                let same = before.map_or(Ok(false), |before| before.equals(&values, &self.budget))?;
                Ok(Value::Bool(!same))
            }
            (name, _) => refuse(format!("loop.{name}() is not supported")),
        }
    }

    fn function(&mut self, name: &str, arguments: Bound) -> Result<Value> {
        match name {
            "range" => {
                let numbers: Option<Vec<i64>> = arguments.positional.iter().map(Value::as_int).collect();
                let range = match (numbers.as_deref(), arguments.named.is_empty()) {
                    (Some(&[stop]), true) => Range { start: 0, stop, step: 1 },
                    (Some(&[start, stop]), true) => Range { start, stop, step: 1 },
                    (Some(&[start, stop, step]), true) if step != 0 => Range { start, stop, step },
                    _ => return refuse("range() takes one to three integers, the last of them not 0"),
                };
                let Range { start, stop, step } = range;
                let length = i128::from(stop).abs_diff(i128::from(start)) / u128::from(step.unsigned_abs());
                if Value::Range(range).is_true() && length >= MAX_RANGE as u128 {
                    return refuse(format!("range() may have {MAX_RANGE} items"));
                }
                Ok(Value::Range(range))
            }
            "dict" => {
                let entries = self.entries(arguments)?;
                self.budget.dict(entries)
            }
            "namespace" => {
                let entries = self.entries(arguments)?;
                let mut attributes = Vec::new();
                for (key, value) in entries {
                    let Value::Str(key) = key else { return refuse("namespace() takes names") };
                    let entry = attribute_of_namespace(key.to_string(), value)?;
                    attributes.retain(|(other, _)| *other != entry.0);
                    attributes.push(entry);
                }
                Ok(Value::Namespace(Rc::new(RefCell::new(attributes))))
            }
            "raise_exception" => match arguments.take(["message"])? {
                [Some(Value::Str(message))] => refuse(format!("it raises an exception: {message}")),
                _ => refuse("it raises an exception"),
            },
            // The template is rendered once, at load: a date in it would be the day of the start, and a score that
            // depends on the day is no score.
            _ => refuse(format!("{name} writes today's date, on which no score may depend")),
        }
    }

    /// What `dict(…)` and `namespace(…)` are given.
    fn entries(&mut self, arguments: Bound) -> Result<Vec<(Value, Value)>> {
        let mut entries = Vec::new();
        match arguments.positional.as_slice() {
            [] => {}
            [Value::Dict(dict)] => {
                self.budget.step(dict.entries.len())?;
                entries.extend(dict.entries.iter().cloned());
            }
            [Value::List(pairs) | Value::Tuple(pairs)] => {
                for pair in &pairs.items {
                    let mut pair = pair.items(&self.budget)?;
                    match (pair.pop(), pair.pop(), pair.is_empty()) {
                        (Some(value), Some(key), true) => entries.push((key, value)),
                        _ => return refuse(format!("{}() takes pairs", arguments.name)),
                    }
                }
            }
            _ => return refuse(format!("{}() takes a map or pairs", arguments.name)),
        }
        let named = arguments.named.into_iter().map(|(key, value)| (Value::from(key), value));
        entries.extend(named);
        Ok(entries)
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

/// `of.name`
fn attribute(of: &Value, name: &str, budget: &Budget) -> Result<Value> {
    if name.starts_with("__") || (name.starts_with('_') && !matches!(of, Value::Dict(_))) {
        return refuse(format!("the attribute {name} is not supported"));
    }
    if methods::has_attribute(of, name) {
        return refuse(format!("the method {name} of a {} is not called", of.type_name()));
    }
    match of {
        Value::Undefined => refuse(format!("{name:?} is read of a value that is undefined")),
        Value::Dict(dict) => Ok(dict.get(&Value::from(name), budget)?.unwrap_or(Value::Undefined)),
        Value::Namespace(entries) => {
            let entries = entries.borrow();
            let value = entries.iter().find(|(other, _)| other == name);
            Ok(value.map_or(Value::Undefined, |(_, value)| value.clone()))
        }
        Value::Loop(state) => loop_attribute(state, name),
        Value::Iterator(_) | Value::View(..) | Value::Macro(_) | Value::Function(_) | Value::Markup(_) => {
            refuse(format!("the attribute {name} of a {} is not supported", of.type_name()))
        }
        _ => Ok(Value::Undefined),
    }
}

fn loop_attribute(state: &LoopState, name: &str) -> Result<Value> {
    let (index, length) = (state.index.get(), state.items.len());
    let count = |number: usize| Ok(Value::Int(number as i64));
    match name {
        "index" => count(index + 1),
        "index0" => count(index),
        "revindex" => count(length - index),
        "revindex0" => count(length - index - 1),
        "length" => count(length),
        "depth" => count(state.depth),
        "depth0" => count(state.depth - 1),
        "first" => Ok(Value::Bool(index == 0)),
        "last" => Ok(Value::Bool(index + 1 == length)),
        "previtem" => Ok(index.checked_sub(1).map_or(Value::Undefined, |at| state.items[at].clone())),
        "nextitem" => Ok(state.items.get(index + 1).cloned().unwrap_or(Value::Undefined)),
        "cycle" | "changed" => refuse(format!("loop.{name} is not called")),
        _ => Ok(Value::Undefined),
    }
}

/// `of[key]`
pub(super) fn item(of: &Value, key: &Value, budget: &Budget) -> Result<Value> {
    let at = |items: &[Value], index: i64| {
        let index = if index < 0 { index + items.len() as i64 } else { index };
        usize::try_from(index).ok().and_then(|index| items.get(index).cloned()).unwrap_or(Value::Undefined)
    };
    match (of, key.as_int()) {
        (Value::List(sequence) | Value::Tuple(sequence), Some(index)) => {
            return Ok(at(&sequence.items, index));
        }
        (Value::Str(_) | Value::Range(_), Some(index)) => return Ok(at(&of.items(budget)?, index)),
        (Value::Dict(dict), _) => {
            if matches!(key, Value::Undefined) {
                return refuse("an undefined value as a key is not supported");
            }
            if let Some(value) = dict.get(key, budget)? {
                return Ok(value);
            }
        }
        (Value::Undefined, _) => return refuse("an item is read of a value that is undefined"),
        (
            Value::View(..) | Value::Iterator(_) | Value::Markup(_) | Value::Macro(_) | Value::Loop(_),
            None,
        ) if key.as_str().is_none() => {
            return refuse(format!("an item of a {} is not supported", of.type_name()));
        }
        _ => {}
    }
    match key {
        Value::Str(name) => attribute(of, name, budget),
        Value::Markup(_) => refuse("a text marked as safe as a key is not supported"),
        _ => Ok(Value::Undefined),
    }
}

/// `of[start:stop:step]`
fn slice(of: &Value, [start, stop, step]: [Option<i64>; 3], budget: &Budget) -> Result<Value> {
    if !matches!(of, Value::Str(_) | Value::List(_) | Value::Tuple(_)) {
        return refuse(format!("a slice of a {} is not supported", of.type_name()));
    }
    let items = of.items(budget)?;
    let step = step.unwrap_or(1);
    if step == 0 {
        return refuse("the step of a slice is 0");
    }
    let length = items.len() as i64;
    // Where the bounds are clipped to, as Python's slices do.
    let (low, high) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let clip = |bound: Option<i64>, default: i64| {
        bound.map_or(default, |b| if b < 0 { b.saturating_add(length) } else { b }.clamp(low, high))
    };
    let (start, stop) =
        if step > 0 { (clip(start, low), clip(stop, high)) } else { (clip(start, high), clip(stop, low)) };
    let chosen: Vec<Value> = Range { start, stop, step }
        .items()
        .into_iter()
        .filter_map(|index| items.get(usize::try_from(index.as_int()?).ok()?).cloned())
        .collect();
    match of {
        Value::Str(_) => {
            let text: String = chosen.iter().filter_map(Value::as_str).collect();
            budget.text(text)
        }
        Value::Tuple(_) => budget.tuple(chosen),
        _ => budget.list(chosen),
    }
}

fn compare(operator: Comparison, left: &Value, right: &Value, budget: &Budget) -> Result<bool> {
    match operator {
        Comparison::Eq => left.equals(right, budget),
        Comparison::Ne => Ok(!left.equals(right, budget)?),
        Comparison::Lt => left.is_less(right, budget),
        Comparison::Gt => right.is_less(left, budget),
        Comparison::Le | Comparison::Ge => {
            let (low, high) = if operator == Comparison::Le { (left, right) } else { (right, left) };
            Ok(low.is_less(high, budget)? || low.equals(high, budget)?)
        }
        Comparison::In => right.contains(left, budget),
        Comparison::NotIn => Ok(!right.contains(left, budget)?),
    }
}

/// Arithmetic, and what Python's operators do with texts and lists.
pub(super) fn binary(operator: Binary, left: &Value, right: &Value, budget: &Budget) -> Result<Value> {
    match (operator, left, right) {
        (Binary::Mod, Value::Str(format), _) => {
            return budget.text(formatting::percent(format, right, budget)?);
        }
        (Binary::Add, Value::Str(a), Value::Str(b)) => {
            budget.bytes(a.len() + b.len())?;
            return Ok(Value::from(format!("{a}{b}")));
        }
        (Binary::Add, Value::List(a), Value::List(b)) => {
            return budget.list([a.items.as_slice(), b.items.as_slice()].concat());
        }
        (Binary::Add, Value::Tuple(a), Value::Tuple(b)) => {
            return budget.tuple([a.items.as_slice(), b.items.as_slice()].concat());
        }
        (Binary::Mul, of @ (Value::Str(_) | Value::List(_) | Value::Tuple(_)), count)
        | (Binary::Mul, count, of @ (Value::Str(_) | Value::List(_) | Value::Tuple(_))) => {
            let Some(count) = count.as_int() else {
                return refuse(format!(
                    "* of a {} and a {} is not supported",
                    left.type_name(),
                    right.type_name()
                ));
            };
            return repeat(of, usize::try_from(count).unwrap_or(0), budget);
        }
        _ => {}
    }
    if let (Some(a), Some(b), false) = (left.as_int(), right.as_int(), operator == Binary::Div) {
        return integers(operator, a, b);
    }
    match (left.as_exact_float()?, right.as_exact_float()?) {
        (Some(a), Some(b)) => floats(operator, a, b).map(Value::Float),
        _ => refuse(format!(
            "an operator between a {} and a {} is not supported",
            left.type_name(),
            right.type_name()
        )),
    }
}

fn repeat(of: &Value, count: usize, budget: &Budget) -> Result<Value> {
    match of {
        Value::Str(text) => {
            budget.bytes(text.len().saturating_mul(count))?;
            Ok(Value::from(text.repeat(count)))
        }
        Value::List(sequence) | Value::Tuple(sequence) => {
            budget.bytes(sequence.items.len().saturating_mul(count).saturating_mul(size_of::<Value>()))?;
            let items: Vec<Value> = std::iter::repeat_n(&sequence.items, count).flatten().cloned().collect();
            if matches!(of, Value::List(_)) { budget.list(items) } else { budget.tuple(items) }
        }
        _ => refuse("only a text, a list or a tuple can be repeated"),
    }
}

fn integers(operator: Binary, a: i64, b: i64) -> Result<Value> {
    if b == 0 && matches!(operator, Binary::FloorDiv | Binary::Mod) {
        return refuse("it divides by 0");
    }
    let result = match operator {
        Binary::Add => a.checked_add(b),
        Binary::Sub => a.checked_sub(b),
        Binary::Mul => a.checked_mul(b),
        Binary::FloorDiv => {
            a.checked_div(b).map(|quotient| quotient - i64::from(a % b != 0 && (a < 0) != (b < 0)))
        }
        Binary::Mod => {
            a.checked_rem(b).map(|rest| if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest })
        }
        Binary::Pow if b < 0 => return floats(operator, a as f64, b as f64).map(Value::Float),
        Binary::Pow => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
        Binary::Div => None,
    };
    match result {
        Some(number) => Ok(Value::Int(number)),
        None => refuse("an integer of more than 64 bits is not supported"),
    }
}

fn floats(operator: Binary, a: f64, b: f64) -> Result<f64> {
    if b == 0.0 && matches!(operator, Binary::Div | Binary::FloorDiv | Binary::Mod) {
        return refuse("it divides by 0");
    }
    // Python's float_divmod: the remainder has the divisor's sign.
    let rest = a % b;
    let adjusted = rest != 0.0 && (b < 0.0) != (rest < 0.0);
    let modulo = if adjusted {
        rest + b
    } else if rest == 0.0 {
        0.0_f64.copysign(b)
    } else {
        rest
    };
    Ok(match operator {
        Binary::Add => a + b,
        Binary::Sub => a - b,
        Binary::Mul => a * b,
        Binary::Div => a / b,
        Binary::Mod => modulo,
        Binary::FloorDiv => {
            let quotient = (a - rest) / b - if adjusted { 1.0 } else { 0.0 };
            if quotient == 0.0 {
                return Ok(0.0_f64.copysign(a / b));
            }
            let floor = quotient.floor();
            if quotient - floor > 0.5 { floor + 1.0 } else { floor }
        }
        Binary::Pow => {
            let power = a.powf(b);
            let finite = a.is_finite() && b.is_finite();
            if finite && !power.is_finite() {
                return refuse("a power that is no finite number is not supported");
            }
            power
        }
    })
}
