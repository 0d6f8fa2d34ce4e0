//! Several models: `[[models]]` of the file, `--model` of the flags, and what is loaded while the server serves.

use std::str::FromStr;

use config::Value;

use super::{Fault, ModelSettings};
use crate::device::{Devices, Dtype};

/// The setting that lists models.
pub(super) const SETTING: &str = "models";
/// The most models.
pub const MOST_MODELS: usize = 64;
/// The most bytes of a model's name.
const MOST_NAME: usize = 64;
/// What a model may say of itself.
const KEYS: &str = "name, checkpoint, revision, profile, device, dtype";

/// What is said of a model, key by key.
#[derive(Debug, Clone, Default)]
pub struct Table {
    /// How its faults name it.
    pub place: String,
    /// Where it was said.
    pub origin: String,
    /// The keys and their values.
    pub keys: Vec<(String, String)>,
}

impl Table {
    /// Of `NAME=CHECKPOINT[,key=value…]`. A piece that has no key is part of the one before it: devices are separated by
    /// commas too.
    pub fn of_flag(index: usize, text: &str, origin: &str) -> Self {
        let mut keys: Vec<(String, String)> = Vec::new();
        for piece in text.split(',') {
            match (piece.split_once('='), keys.last_mut()) {
                (Some((name, checkpoint)), None) => {
                    keys.push(("name".to_owned(), name.to_owned()));
                    keys.push(("checkpoint".to_owned(), checkpoint.to_owned()));
                }
                (Some((key, value)), Some(_)) => keys.push((key.to_owned(), value.to_owned())),
                (None, Some((_, value))) => *value += &format!(",{piece}"),
                (None, None) => keys.push(("name=checkpoint".to_owned(), piece.to_owned())),
            }
        }
        Self { place: format!("{SETTING}[{index}]"), origin: origin.to_owned(), keys }
    }

    fn fault(&self, key: &str, value: Option<&str>, problem: impl Into<String>) -> Fault {
        let place = &self.place;
        let name = if key.is_empty() { place.clone() } else { format!("{place}.{key}") };
        Fault {
            name,
            given: value.map(|value| (value.to_owned(), self.origin.clone())),
            problem: problem.into(),
        }
    }

    /// The model that it describes; what it does not say is as `common` has it.
    ///
    /// # Errors
    /// All that is wrong with it.
    pub fn model(&self, common: &ModelSettings) -> Result<ModelSettings, Vec<Fault>> {
        let (mut name, mut checkpoint, mut faults) = (None, None, Vec::new());
        let mut model = ModelSettings { revision: None, profile: None, ..common.clone() };
        let some = |value: &str| Some(value.to_owned()).filter(|value| !value.is_empty());
        for (key, value) in &self.keys {
            let mut refuse = |problem: String| faults.push(self.fault(key, Some(value), problem));
            match key.as_str() {
                "name" => name = Some(value.as_str()),
                "checkpoint" => checkpoint = Some(value.as_str()),
                "revision" => model.revision = some(value),
                "profile" => model.profile = some(value),
                "device" => take(&mut model.device, value, Devices::FORMS, refuse),
                "dtype" => take(&mut model.dtype, value, Dtype::FORMS, refuse),
                "name=checkpoint" => {
                    let problem = "must be NAME=CHECKPOINT[,profile=…,device=…,dtype=…]";
                    return Err(vec![self.fault("", Some(value), problem)]);
                }
                _ => refuse(format!("there is no such key; a model has {KEYS}")),
            }
        }
        match name {
            Some(name) if is_name(name) => model.name = Some(name.to_owned()),
            Some(name) => faults.push(self.fault(
                "name",
                Some(name),
                format!("must be 1 to {MOST_NAME} letters, digits, '-', '_' and '.', the first a letter or a digit"),
            )),
            None => faults.push(self.fault("name", None, "is missing: callers ask for the model by it")),
        }
        match checkpoint {
            Some("") => {
                let problem = "must be a directory, a hub id (owner/model) or what is built in";
                faults.push(self.fault("checkpoint", Some(""), problem));
            }
            Some(checkpoint) => model.checkpoint = checkpoint.to_owned(),
            None => faults.push(self.fault(
                "checkpoint",
                None,
                "is missing: a directory or a hub id (owner/model)",
            )),
        }
        if faults.is_empty() { Ok(model) } else { Err(faults) }
    }
}

fn take<T: FromStr>(into: &mut T, value: &str, forms: &str, refuse: impl FnOnce(String)) {
    match value.parse() {
        Ok(value) => *into = value,
        Err(_) => refuse(format!("must be {forms}")),
    }
}

/// Whether a text can be a model's name, which stands in paths, labels and logs.
pub fn is_name(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    text.len() <= MOST_NAME
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(plain)
}

/// The tables of the file.
pub(super) fn in_file(value: Option<Value>, origin: &str) -> Result<Vec<Table>, Fault> {
    let Some(value) = value else { return Ok(Vec::new()) };
    let wrong = |text: String| Fault {
        name: SETTING.to_owned(),
        given: Some((text, origin.to_owned())),
        problem: "must be tables, each begun with [[models]]".to_owned(),
    };
    let text = value.to_string();
    let tables = value.into_array().map_err(|_| wrong(text))?;
    let table = |(index, value): (usize, Value)| {
        let text = value.to_string();
        let table = value.into_table().map_err(|_| wrong(text))?;
        let mut keys: Vec<_> = table.into_iter().map(|(key, value)| (key, value.to_string())).collect();
        keys.sort();
        Ok(Table { place: format!("{SETTING}[{index}]"), origin: origin.to_owned(), keys })
    };
    tables.into_iter().enumerate().map(table).collect()
}

/// The models of these tables. What is wrong is added to `faults`.
pub(super) fn all(tables: Vec<Table>, common: &ModelSettings, faults: &mut Vec<Fault>) -> Vec<ModelSettings> {
    if tables.len() > MOST_MODELS {
        let problem = format!("there are {}; at most {MOST_MODELS} are served", tables.len());
        faults.push(Fault { name: SETTING.to_owned(), given: None, problem });
    }
    let mut models: Vec<ModelSettings> = Vec::new();
    for table in tables {
        let model = match table.model(common) {
            Ok(model) => model,
            Err(wrong) => {
                faults.extend(wrong);
                common.clone()
            }
        };
        if let Some(name) = model.name.as_deref()
            && models.iter().any(|other| other.name == model.name)
        {
            faults.push(table.fault("name", Some(name), "another model has this name"));
        }
        models.push(model);
    }
    models
}
