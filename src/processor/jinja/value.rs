//! Python's values, as far as templates meet them.

mod budget;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

pub(super) use self::budget::Budget;
use super::formatting::{float_repr, text_repr};
use super::interpreter::{LoopState, MacroValue};
use super::{Result, refuse};

/// The items of a list or a tuple.
#[derive(Debug)]
pub(in crate::processor) struct Sequence {
    pub items: Vec<Value>,
    depth: u32,
}

/// A map, in the order in which its keys came.
#[derive(Debug)]
pub(in crate::processor) struct Dict {
    pub entries: Vec<(Value, Value)>,
    depth: u32,
}

impl Dict {
    fn position(&self, key: &Value, budget: &Budget) -> Result<Option<usize>> {
        budget.step(self.entries.len() / 8)?;
        for (at, (other, _)) in self.entries.iter().enumerate() {
            if other.equals(key, budget)? {
                return Ok(Some(at));
            }
        }
        Ok(None)
    }

    pub(super) fn get(&self, key: &Value, budget: &Budget) -> Result<Option<Value>> {
        Ok(self.position(key, budget)?.map(|at| self.entries[at].1.clone()))
    }
}

/// What of a map is looked at.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(in crate::processor) enum View {
    Keys,
    Values,
    Items,
}

/// `range(start, stop, step)`
#[derive(Debug, Clone, Copy)]
pub(in crate::processor) struct Range {
    pub start: i64,
    pub stop: i64,
    pub step: i64,
}

impl Range {
    pub fn items(self) -> Vec<Value> {
        let mut at = self.start;
        let mut items = Vec::new();
        while if self.step > 0 { at < self.stop } else { at > self.stop } {
            items.push(Value::Int(at));
            let Some(next) = at.checked_add(self.step) else { break };
            at = next;
        }
        items
    }
}

/// A value of a template.
#[derive(Debug, Clone)]
pub(in crate::processor) enum Value {
    Undefined,
    None,
    Bool(bool),
    Int(i64),
    Float(f64),
    Str(Rc<str>),
    /// A text that is marked as safe: it can be printed, and nothing else.
    Markup(Rc<str>),
    List(Rc<Sequence>),
    Tuple(Rc<Sequence>),
    Dict(Rc<Dict>),
    View(View, Rc<Dict>),
    Range(Range),
    /// What can be looked at once.
    Iterator(Rc<RefCell<VecDeque<Value>>>),
    Namespace(Rc<RefCell<Vec<(String, Value)>>>),
    Macro(Rc<MacroValue>),
    Loop(Rc<LoopState>),
    /// A function of the environment, by its name.
    Function(&'static str),
}

impl From<String> for Value {
    fn from(text: String) -> Self {
        Self::Str(text.into())
    }
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Self::Str(text.into())
    }
}

impl Value {
    /// A list, for whoever calls a template.
    pub fn list(items: Vec<Value>) -> Self {
        let depth = items.iter().map(Self::depth).max().unwrap_or(0) + 1;
        Self::List(Rc::new(Sequence { items, depth }))
    }

    /// A map whose keys are different texts, for whoever calls a template.
    pub fn map<const N: usize>(entries: [(&str, Value); N]) -> Self {
        let depth = entries.iter().map(|(_, value)| value.depth()).max().unwrap_or(0) + 1;
        let entries = entries.into_iter().map(|(key, value)| (Self::from(key), value)).collect();
        Self::Dict(Rc::new(Dict { entries, depth }))
    }

    fn depth(&self) -> u32 {
        match self {
            Self::List(sequence) | Self::Tuple(sequence) => sequence.depth,
            Self::Dict(dict) => dict.depth,
            _ => 0,
        }
    }

    /// What the type is called in messages.
    pub(super) fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined => "undefined value",
            Self::None => "None",
            Self::Bool(_) => "boolean",
            Self::Int(_) => "integer",
            Self::Float(_) => "float",
            Self::Str(_) => "text",
            Self::Markup(_) => "text marked as safe",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Dict(_) => "map",
            Self::View(..) => "view of a map",
            Self::Range(_) => "range",
            Self::Iterator(_) => "iterator",
            Self::Namespace(_) => "namespace",
            Self::Macro(_) => "macro",
            Self::Loop(_) => "loop",
            Self::Function(_) => "function",
        }
    }

    pub(super) fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) => Some(text),
            _ => None,
        }
    }

    /// An integer, or a boolean as Python counts with it.
    pub(super) fn as_int(&self) -> Option<i64> {
        match self {
            Self::Int(number) => Some(*number),
            Self::Bool(flag) => Some(i64::from(*flag)),
            _ => None,
        }
    }

    /// A number as Python's `float` takes it.
    pub(super) fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(number) => Some(*number),
            _ => self.as_int().map(|number| number as f64),
        }
    }

    pub(super) fn is_true(&self) -> bool {
        match self {
            Self::Undefined | Self::None => false,
            Self::Bool(flag) => *flag,
            Self::Int(number) => *number != 0,
            Self::Float(number) => *number != 0.0,
            Self::Str(text) | Self::Markup(text) => !text.is_empty(),
            Self::List(sequence) | Self::Tuple(sequence) => !sequence.items.is_empty(),
            Self::Dict(dict) | Self::View(_, dict) => !dict.entries.is_empty(),
            Self::Range(range) => {
                if range.step > 0 {
                    range.start < range.stop
                } else {
                    range.start > range.stop
                }
            }
            _ => true,
        }
    }

    fn is_hashable(&self) -> bool {
        match self {
            Self::Tuple(sequence) => sequence.items.iter().all(Self::is_hashable),
            Self::None | Self::Bool(_) | Self::Int(_) | Self::Float(_) | Self::Str(_) => true,
            _ => false,
        }
    }

    /// Python's `str`.
    pub(super) fn to_text(&self, budget: &Budget) -> Result<Rc<str>> {
        match self {
            Self::Str(text) | Self::Markup(text) => Ok(text.clone()),
            Self::Undefined => Ok("".into()),
            _ => self.repr(budget).map(Into::into),
        }
    }

    /// Python's `repr`.
    pub(super) fn repr(&self, budget: &Budget) -> Result<String> {
        let mut out = String::new();
        self.write_repr(&mut out, budget)?;
        Ok(out)
    }

    fn write_repr(&self, out: &mut String, budget: &Budget) -> Result<()> {
        let list = |out: &mut String, open: &str, items: &[Self], close: &str| -> Result<()> {
            out.push_str(open);
            for (index, item) in items.iter().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                item.write_repr(out, budget)?;
            }
            out.push_str(close);
            Ok(())
        };
        budget.step(1)?;
        let before = out.len();
        match self {
            Self::Undefined => out.push_str("Undefined"),
            Self::None => out.push_str("None"),
            Self::Bool(flag) => out.push_str(if *flag { "True" } else { "False" }),
            Self::Int(number) => out.push_str(&number.to_string()),
            Self::Float(number) => out.push_str(&float_repr(*number)),
            Self::Str(text) => out.push_str(&text_repr(text)?),
            Self::List(sequence) => list(out, "[", &sequence.items, "]")?,
            Self::Tuple(sequence) => {
                list(out, "(", &sequence.items, if sequence.items.len() == 1 { ",)" } else { ")" })?;
            }
            Self::Dict(dict) => {
                out.push('{');
                for (index, (key, value)) in dict.entries.iter().enumerate() {
                    out.push_str(if index > 0 { ", " } else { "" });
                    key.write_repr(out, budget)?;
                    out.push_str(": ");
                    value.write_repr(out, budget)?;
                }
                out.push('}');
            }
            Self::View(view, _) => {
                let name = match view {
                    View::Keys => "dict_keys([",
                    View::Values => "dict_values([",
                    View::Items => "dict_items([",
                };
                list(out, name, &self.items(budget)?, "])")?;
            }
            Self::Range(Range { start, stop, step }) => out.push_str(&match step {
                1 => format!("range({start}, {stop})"),
                _ => format!("range({start}, {stop}, {step})"),
            }),
            _ => return refuse(format!("a {} cannot be printed", self.type_name())),
        }
        budget.bytes(out.len() - before)
    }

    /// The items that a loop over this value sees.
    pub(super) fn items(&self, budget: &Budget) -> Result<Vec<Self>> {
        let items: Vec<Self> = match self {
            Self::Undefined => Vec::new(),
            Self::Str(text) => {
                budget.step(text.len())?;
                text.chars().map(|c| Self::from(c.to_string())).collect()
            }
            Self::List(sequence) | Self::Tuple(sequence) => {
                budget.step(sequence.items.len())?;
                sequence.items.clone()
            }
            Self::Dict(dict) | Self::View(View::Keys, dict) => {
                budget.step(dict.entries.len())?;
                dict.entries.iter().map(|(key, _)| key.clone()).collect()
            }
            Self::View(View::Values, dict) => {
                budget.step(dict.entries.len())?;
                dict.entries.iter().map(|(_, value)| value.clone()).collect()
            }
            Self::View(View::Items, dict) => {
                let pairs = dict.entries.iter().map(|(k, v)| budget.tuple(vec![k.clone(), v.clone()]));
                pairs.collect::<Result<_>>()?
            }
            Self::Range(range) => {
                let items = range.items();
                budget.step(items.len())?;
                items
            }
            Self::Iterator(items) => items.borrow_mut().drain(..).collect(),
            _ => return refuse(format!("a {} has no items", self.type_name())),
        };
        budget.bytes(items.len().saturating_mul(size_of::<Self>()))?;
        Ok(items)
    }

    /// Python's `len`.
    pub(super) fn length(&self, budget: &Budget) -> Result<usize> {
        match self {
            Self::Undefined => Ok(0),
            Self::Str(text) => Ok(text.chars().count()),
            Self::List(sequence) | Self::Tuple(sequence) => Ok(sequence.items.len()),
            Self::Dict(dict) | Self::View(_, dict) => Ok(dict.entries.len()),
            Self::Range(_) => Ok(self.items(budget)?.len()),
            _ => refuse(format!("a {} has no length", self.type_name())),
        }
    }

    /// Python's `==`.
    pub(super) fn equals(&self, other: &Self, budget: &Budget) -> Result<bool> {
        budget.step(1)?;
        Ok(match (self, other) {
            (Self::Undefined, Self::Undefined) | (Self::None, Self::None) => true,
            (Self::Str(a), Self::Str(b)) => a == b,
            (Self::List(a), Self::List(b)) | (Self::Tuple(a), Self::Tuple(b)) => {
                if a.items.len() != b.items.len() {
                    return Ok(false);
                }
                for (a, b) in a.items.iter().zip(&b.items) {
                    if !a.equals(b, budget)? {
                        return Ok(false);
                    }
                }
                true
            }
            (Self::Dict(a), Self::Dict(b)) => {
                if a.entries.len() != b.entries.len() {
                    return Ok(false);
                }
                for (key, value) in &a.entries {
                    match b.get(key, budget)? {
                        Some(other) if value.equals(&other, budget)? => {}
                        _ => return Ok(false),
                    }
                }
                true
            }
            (Self::Range(a), Self::Range(b)) => {
                let (a, b) = (budget.list(a.items())?, budget.list(b.items())?);
                return a.equals(&b, budget);
            }
            _ if self.is_opaque() || other.is_opaque() => {
                return refuse(format!(
                    "a {} and a {} cannot be compared here",
                    self.type_name(),
                    other.type_name()
                ));
            }
            _ => match (self.as_int(), other.as_int()) {
                (Some(a), Some(b)) => a == b,
                _ => match (self.as_exact_float()?, other.as_exact_float()?) {
                    (Some(a), Some(b)) => a == b,
                    _ => false,
                },
            },
        })
    }

    /// Whether comparing it is not worth what could go wrong.
    fn is_opaque(&self) -> bool {
        matches!(
            self,
            Self::Markup(_)
                | Self::View(..)
                | Self::Iterator(_)
                | Self::Namespace(_)
                | Self::Macro(_)
                | Self::Loop(_)
                | Self::Function(_)
        )
    }

    /// The number as a float, if it is a number that a float holds exactly.
    pub(super) fn as_exact_float(&self) -> Result<Option<f64>> {
        match self.as_int() {
            Some(number) if number.unsigned_abs() > 1 << 53 => {
                refuse(format!("the integer {number} beside a float is not supported"))
            }
            _ => Ok(self.as_float()),
        }
    }

    /// Python's `<`.
    pub(super) fn is_less(&self, other: &Self, budget: &Budget) -> Result<bool> {
        budget.step(1)?;
        match (self, other) {
            (Self::Str(a), Self::Str(b)) => return Ok(a < b),
            (Self::List(a), Self::List(b)) | (Self::Tuple(a), Self::Tuple(b)) => {
                for (a, b) in a.items.iter().zip(&b.items) {
                    if !a.equals(b, budget)? {
                        return a.is_less(b, budget);
                    }
                }
                return Ok(a.items.len() < b.items.len());
            }
            _ => {}
        }
        if let (Some(a), Some(b)) = (self.as_int(), other.as_int()) {
            return Ok(a < b);
        }
        match (self.as_exact_float()?, other.as_exact_float()?) {
            (Some(a), Some(b)) => Ok(a < b),
            _ => refuse(format!("a {} and a {} have no order", self.type_name(), other.type_name())),
        }
    }

    /// Python's `item in self`.
    pub(super) fn contains(&self, item: &Self, budget: &Budget) -> Result<bool> {
        match self {
            Self::Str(text) => match item {
                Self::Str(part) => Ok(text.contains(&**part)),
                _ => refuse(format!("a {} cannot be looked for in a text", item.type_name())),
            },
            Self::Dict(dict) | Self::View(View::Keys, dict) => {
                if !item.is_hashable() {
                    return refuse(format!("a {} cannot be looked for in a map", item.type_name()));
                }
                Ok(dict.get(item, budget)?.is_some())
            }
            Self::Iterator(_) => refuse("\"in\" an iterator is not supported"),
            _ => {
                for other in self.items(budget)? {
                    if other.equals(item, budget)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
        }
    }
}

/// What Python calls a space.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}
