//! Calls: of filters, methods, macros, loops and the environment's functions.

use std::cell::RefCell;
use std::rc::Rc;

use super::{Bound, Interpreter, LoopState, MAX_RANGE, MacroValue, Scope, attribute_of_namespace};
use crate::processor::jinja::operators::attribute;
use crate::processor::jinja::syntax::{Arguments, Expr, MacroBody};
use crate::processor::jinja::value::{Range, Value};
use crate::processor::jinja::{Result, methods, refuse};

impl Interpreter {
    /// A filter, or a chain of them, of a block's text.
    pub(super) fn filtered(&mut self, filter: &Expr, text: Value, scope: &Rc<Scope>) -> Result<Value> {
        let Expr::Filter(of, name, arguments) = filter else { return self.eval(filter, scope) };
        let of = match of {
            Some(inner) => self.filtered(inner, text, scope)?,
            None => text,
        };
        let arguments = self.bind(name, arguments, scope)?;
        self.filter(of, arguments)
    }

    pub(super) fn bind(&mut self, name: &str, arguments: &Arguments, scope: &Rc<Scope>) -> Result<Bound> {
        let positional = self.eval_all(&arguments.positional, scope)?;
        let named = |(key, expr): &(String, Expr)| Ok((key.clone(), self.eval(expr, scope)?));
        let named = arguments.named.iter().map(named).collect::<Result<_>>()?;
        Ok(Bound { name: name.to_owned(), positional, named })
    }

    pub(super) fn call(&mut self, callee: &Expr, arguments: &Arguments, scope: &Rc<Scope>) -> Result<Value> {
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

    pub(super) fn call_macro(
        &mut self,
        called: &MacroValue,
        arguments: Bound,
        caller: Value,
    ) -> Result<Value> {
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
