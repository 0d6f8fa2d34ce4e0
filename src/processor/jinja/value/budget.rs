//! What a rendering may still do, and the values that it pays for.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use super::{Dict, Sequence, Value};
use crate::processor::jinja::{Result, refuse};

/// The most that a template may do: evaluated expressions, items looked at.
const MAX_STEPS: u64 = 2_000_000;
/// The most bytes of texts and lists that a template may make.
const MAX_BYTES: usize = 32 << 20;
/// How deep lists and maps may stand in each other.
const MAX_NESTING: u32 = 64;

/// What one rendering may still do.
#[derive(Debug)]
pub(in crate::processor) struct Budget {
    steps: Cell<u64>,
    bytes: Cell<usize>,
}

impl Budget {
    pub fn new() -> Self {
        Self { steps: Cell::new(MAX_STEPS), bytes: Cell::new(MAX_BYTES) }
    }

    /// Pays for so many steps.
    pub fn step(&self, count: usize) -> Result<()> {
        match self.steps.get().checked_sub(count as u64) {
            Some(left) => {
                self.steps.set(left);
                Ok(())
            }
            None => refuse(format!("it takes more than {MAX_STEPS} steps")),
        }
    }

    /// Pays for so many bytes, before they are made.
    pub fn bytes(&self, count: usize) -> Result<()> {
        match self.bytes.get().checked_sub(count) {
            Some(left) => {
                self.bytes.set(left);
                Ok(())
            }
            None => refuse(format!("it makes more than {MAX_BYTES} bytes of text")),
        }
    }

    /// A text that has been made.
    pub fn text(&self, text: impl Into<String>) -> Result<Value> {
        let text = text.into();
        self.bytes(text.len())?;
        Ok(Value::from(text))
    }

    pub fn sequence(&self, items: Vec<Value>) -> Result<Rc<Sequence>> {
        self.step(items.len())?;
        self.bytes(items.len().saturating_mul(size_of::<Value>()))?;
        let depth = nesting(items.iter())?;
        Ok(Rc::new(Sequence { items, depth }))
    }

    pub fn list(&self, items: Vec<Value>) -> Result<Value> {
        Ok(Value::List(self.sequence(items)?))
    }

    pub fn tuple(&self, items: Vec<Value>) -> Result<Value> {
        Ok(Value::Tuple(self.sequence(items)?))
    }

    /// A list of these, as `filter|list` or a loop takes it: once.
    pub fn iterator(&self, items: Vec<Value>) -> Result<Value> {
        self.sequence(items.clone())?;
        Ok(Value::Iterator(Rc::new(RefCell::new(items.into()))))
    }

    pub fn dict(&self, entries: Vec<(Value, Value)>) -> Result<Value> {
        self.bytes(entries.len().saturating_mul(2 * size_of::<Value>()))?;
        let depth = nesting(entries.iter().flat_map(|(key, value)| [key, value]))?;
        let mut dict = Dict { entries: Vec::new(), depth };
        for (key, value) in entries {
            if !key.is_hashable() {
                return refuse(format!("a {} cannot be the key of a map", key.type_name()));
            }
            match dict.position(&key, self)? {
                Some(at) => dict.entries[at].1 = value,
                None => dict.entries.push((key, value)),
            }
        }
        Ok(Value::Dict(Rc::new(dict)))
    }
}

fn nesting<'a>(items: impl Iterator<Item = &'a Value>) -> Result<u32> {
    let mut deepest = 0;
    for item in items {
        deepest = deepest.max(match item {
            Value::List(sequence) | Value::Tuple(sequence) => sequence.depth,
            Value::Dict(dict) | Value::View(_, dict) => dict.depth,
            Value::Iterator(_) | Value::Namespace(_) | Value::Macro(_) | Value::Loop(_) => {
                return refuse(format!("a {} inside a list or a map is not supported", item.type_name()));
            }
            _ => 0,
        });
    }
    if deepest >= MAX_NESTING {
        return refuse(format!("more than {MAX_NESTING} lists and maps stand in each other"));
    }
    Ok(deepest + 1)
}
