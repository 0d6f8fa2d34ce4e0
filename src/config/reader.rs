//! Settings by name: where each comes from (defaults < file < environment < flags), and what is wrong with it.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use config::{Config, Environment, File, FileFormat, Source, Value, ValueKind};

use super::models::{self, Table};
use super::{
    AuditSettings, EXAMPLE, Fault, ModelSettings, RecentSettings, ShadowSettings, Sources, TlsSettings,
};
use crate::files;

/// Where a value came from, as the `config` crate calls the environment, and as we call a flag.
const ENVIRONMENT: &str = "the environment";
const FLAG: &str = "a flag";
/// The most files of an audit log.
const MOST_FILES: usize = 1000;
/// How an address is written.
const ADDRESS: &str = "an address and a port, as in 127.0.0.1:";
/// The name of this machine's own address, which needs nobody to look it up.
const LOCALHOST: &str = "localhost:";

/// Where a socket listens, as a setting has it: numbers, or `localhost`.
struct Address(SocketAddr);

impl Address {
    fn local(port: u16) -> Self {
        Self((Ipv4Addr::LOCALHOST, port).into())
    }
}

impl FromStr for Address {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text.strip_prefix(LOCALHOST) {
            Some(port) => port.parse().map(Self::local).map_err(drop),
            None => text.parse().map(Self).map_err(drop),
        }
    }
}

/// Reads settings by name and notes what is wrong with them.
///
/// A faulty setting reads as some value of its type; no one sees it, since one fault refuses the settings whole.
#[derive(Default)]
pub(super) struct Reader {
    /// The file as its user named it.
    file: String,
    values: BTreeMap<String, Value>,
    /// The names that were asked for: all the settings there are.
    pub(super) known: Vec<&'static str>,
    pub(super) faults: Vec<Fault>,
    /// The models of the flags.
    models: Vec<String>,
}

impl Reader {
    /// Merges the sources. One that cannot be read is a fault, and the others are still checked.
    pub(super) fn collect(&mut self, sources: &Sources) {
        self.models.clone_from(&sources.models);
        let mut builder = Config::builder().add_source(File::from_str(EXAMPLE, FileFormat::Toml));
        if let Some(path) = &sources.file {
            let file = File::from(path.as_path()).format(FileFormat::Toml);
            self.file = path.display().to_string();
            let read = files::read(path).map_err(|error| error.to_string());
            match read.and_then(|_| file.collect().map_err(|error| error.to_string())) {
                Ok(_) => builder = builder.add_source(file),
                Err(error) => self.source_fault(self.file.clone(), error),
            }
        }
        builder = builder.add_source(
            Environment::with_prefix("SPATIALSCORE")
                .prefix_separator("__")
                .separator("__")
                .source(Some(sources.environment.clone())),
        );
        for (name, value) in &sources.flags {
            let value = Value::new(Some(&FLAG.to_owned()), value.as_str());
            match builder.clone().set_override(name, value) {
                Ok(with) => builder = with,
                Err(error) => self.source_fault(name.clone(), error.to_string()),
            }
        }
        match builder.build().and_then(|config| config.collect()) {
            Ok(values) => flatten("", values, &mut self.values),
            Err(error) => self.source_fault("settings".into(), error.to_string()),
        }
    }

    /// The models of the flags, else of `[[models]]`, each with what it does not say from `common`; without any, that alone.
    pub(super) fn models(&mut self, common: &ModelSettings) -> Vec<ModelSettings> {
        let in_file = self.values.remove(models::SETTING);
        let flags = std::mem::take(&mut self.models);
        let tables = if flags.is_empty() {
            models::in_file(in_file, &format!("from {}", self.file))
        } else {
            Ok(flags
                .iter()
                .enumerate()
                .map(|(index, text)| Table::of_flag(index, text, "from a flag"))
                .collect())
        };
        let models = match tables {
            Ok(tables) => models::all(tables, common, &mut self.faults),
            Err(fault) => {
                self.faults.push(fault);
                Vec::new()
            }
        };
        if models.is_empty() {
            return vec![common.clone()];
        }
        // Named beside them, it is not clear whether it should be served too.
        for key in ["model.checkpoint", "model.revision", "model.reward_config"] {
            if self.values.get(key).is_some_and(|value| value.origin().is_some()) {
                self.fault(key, "there are models beside it, by [[models]] or --model; each says its own");
            }
        }
        models
    }

    fn source_fault(&mut self, name: String, problem: String) {
        self.faults.push(Fault { name, given: None, problem });
    }

    pub(super) fn fault(&mut self, name: &str, problem: impl Into<String>) {
        let given = self.values.get(name).map(|value| {
            let origin = match value.origin() {
                None => "the defaults",
                Some(origin @ (ENVIRONMENT | FLAG)) => origin,
                Some(_) => &self.file,
            };
            (value.kind.to_string(), format!("from {origin}"))
        });
        self.faults.push(Fault { name: name.to_owned(), given, problem: problem.into() });
    }

    fn is_faulty(&self, name: &str) -> bool {
        self.faults.iter().any(|fault| fault.name == name)
    }

    /// The setting's text, whatever type the source gave it.
    pub(super) fn text(&mut self, name: &'static str) -> String {
        self.known.push(name);
        match self.values.get(name).map(|value| &value.kind) {
            Some(ValueKind::Nil | ValueKind::Table(_) | ValueKind::Array(_)) => {
                self.fault(name, "must be a single value");
                String::new()
            }
            Some(kind) => kind.to_string(),
            None => {
                self.fault(name, "is missing: its section was given as a single value");
                String::new()
            }
        }
    }

    pub(super) fn parse<T: FromStr>(&mut self, name: &'static str, forms: &str, otherwise: T) -> T {
        let text = self.text(name);
        text.parse().unwrap_or_else(|_| {
            if !self.is_faulty(name) {
                self.fault(name, format!("must be {forms}"));
            }
            otherwise
        })
    }

    pub(super) fn number<T>(&mut self, name: &'static str, range: RangeInclusive<T>) -> T
    where
        T: FromStr + PartialOrd + Copy + Display,
    {
        let (least, most) = (*range.start(), *range.end());
        let forms = format!("{least} to {most}");
        let number = self.parse(name, &forms, least);
        if !range.contains(&number) {
            self.fault(name, format!("must be {forms}"));
        }
        number
    }

    /// A number of threads, of which 0 stands for one per core.
    pub(super) fn threads(&mut self, name: &'static str) -> Option<usize> {
        Some(self.number(name, 0..=1024)).filter(|&threads| threads > 0)
    }

    pub(super) fn address(&mut self, name: &'static str, port: u16) -> SocketAddr {
        self.parse(name, &format!("{ADDRESS}{port}"), Address::local(port)).0
    }

    pub(super) fn optional_address(&mut self, name: &'static str, port: u16) -> Option<SocketAddr> {
        let off = self.values.get(name).is_some_and(|value| value.kind.to_string().is_empty());
        if off {
            self.text(name);
            return None;
        }
        Some(self.parse(name, &format!("{ADDRESS}{port}; empty for off"), Address::local(port)).0)
    }

    /// A number of seconds, of which 0 stands for never.
    pub(super) fn seconds(&mut self, name: &'static str, range: RangeInclusive<u64>) -> Option<Duration> {
        Some(self.number(name, range)).filter(|&seconds| seconds > 0).map(Duration::from_secs)
    }

    /// A path; nothing stands for none.
    pub(super) fn path(&mut self, name: &'static str) -> Option<PathBuf> {
        Some(self.text(name)).filter(|text| !text.is_empty()).map(PathBuf::from)
    }

    pub(super) fn tls(&mut self) -> Option<TlsSettings> {
        let [certificate, key, client_ca] = ["tls.certificate", "tls.key", "tls.client_ca"];
        match (self.path(certificate), self.path(key), self.path(client_ca)) {
            (Some(certificate), Some(key), client_ca) => Some(TlsSettings { certificate, key, client_ca }),
            (None, None, None) => None,
            (None, ..) => {
                self.fault(certificate, "is missing: TLS needs a certificate and its key");
                None
            }
            (Some(_), None, _) => {
                self.fault(key, "is missing: TLS needs a certificate and its key");
                None
            }
        }
    }

    pub(super) fn audit(&mut self) -> Option<AuditSettings> {
        let path = self.path("audit.path");
        let max_file_bytes = self.number("audit.max_file_bytes", 4096..=1 << 40);
        let max_files = self.number("audit.max_files", 1..=MOST_FILES);
        let [prompts, pictures] =
            ["audit.prompts", "audit.pictures"].map(|name| self.parse(name, "true or false", false));
        path.map(|path| AuditSettings { path, max_file_bytes, max_files, prompts, pictures })
    }

    pub(super) fn shadow(&mut self) -> Option<ShadowSettings> {
        let [model, of] = ["shadow.model", "shadow.of"].map(|name| self.text(name));
        let share = self.number("shadow.share", 0.0..=1.0);
        let max_items = self.number("shadow.max_items", 1..=1 << 16);
        if share > 0.0 && model.is_empty() {
            self.fault("shadow.share", "there is no shadow.model");
        }
        (share > 0.0).then_some(ShadowSettings { model, of, share, max_items })
    }

    pub(super) fn recent(&mut self) -> Option<RecentSettings> {
        let keep = self.seconds("recent.keep", 0..=86400);
        let max_bytes = self.number("recent.max_bytes", 1 << 20..=1 << 34);
        let [prompts, thumbnails] =
            ["recent.prompts", "recent.thumbnails"].map(|name| self.parse(name, "true or false", false));
        keep.map(|keep| RecentSettings { keep, max_bytes, prompts, thumbnails })
    }

    pub(super) fn endpoint(&mut self, name: &'static str) -> Option<String> {
        let text = self.text(name);
        if text.is_empty() {
            return None;
        }
        let uri = text.parse::<http::Uri>();
        if !uri.is_ok_and(|uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some()) {
            self.fault(name, "must be a URL, as in http://127.0.0.1:4317; empty for off");
        }
        Some(text)
    }

    pub(super) fn at_most(&mut self, name: &str, value: usize, bound: &str, most: usize) {
        if value > most && !self.is_faulty(name) && !self.is_faulty(bound) {
            self.fault(name, format!("must be at most {bound}, which is {most}"));
        }
    }

    pub(super) fn refuse_unknown(&mut self) {
        let unknown: Vec<String> =
            self.values.keys().filter(|name| !self.known.contains(&name.as_str())).cloned().collect();
        for name in unknown {
            let section = name.split_once('.').map_or("", |(section, _)| section);
            let siblings: Vec<&str> = self
                .known
                .iter()
                .filter(|known| known.split_once('.').is_some_and(|(s, _)| s == section))
                .copied()
                .collect();
            let problem = if siblings.is_empty() {
                "there is no such setting; `spatialscore serve --help` says where all are listed".to_owned()
            } else {
                format!("there is no such setting; this section has {}", siblings.join(", "))
            };
            self.fault(&name, problem);
        }
    }
}

/// Dotted names in place of nested tables.
pub(super) fn flatten(prefix: &str, values: HashMap<String, Value>, into: &mut BTreeMap<String, Value>) {
    for (key, value) in values {
        let name = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
        match value.kind {
            ValueKind::Table(table) => flatten(&name, table, into),
            _ => {
                into.insert(name, value);
            }
        }
    }
}
