//! A checkpoint's files: its own folder, and behind it, where it is an adapter, what that stands on.

use std::borrow::Cow;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::folder::{Folder, read_path};
use super::lora::{ADAPTER_CONFIG, ADAPTER_WEIGHTS};
use super::shards::{self, INDEX, WEIGHTS};
use super::tensors::Inventory;
use super::{CONVERTER, CheckpointError, python_json};

/// The most folders that may stand on each other.
const MAX_FOLDERS: usize = 8;

const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const REWARD_CONFIG: &str = "reward_config.json";
/// Why a profile is taken that is named.
pub(in crate::model) const NAMED: &str = "it is named";

/// A checkpoint's files, by name.
#[derive(Debug, Clone)]
pub struct CheckpointFiles {
    /// The checkpoint's own folder first; each but the last is an adapter on the next.
    folders: Vec<Folder>,
    /// Stands in place of the checkpoint's own `reward_config.json`.
    reward_config: Option<RewardConfigFile>,
    /// Says what none of the folders says, but for weights.
    stand_in: Option<Folder>,
}

/// What stands in place of a checkpoint's own `reward_config.json`.
#[derive(Debug, Clone)]
enum RewardConfigFile {
    Path(PathBuf),
    Carried { name: &'static str, text: &'static [u8], reason: &'static str },
}

/// What several files can say. Where a folder says anything of a subject it says all of it: files of one folder are
/// not mixed with those of another, whatever their names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Subject {
    Tokenizer,
    ChatTemplate,
    Pictures,
}

impl Subject {
    fn of(file: &str) -> Option<Self> {
        match file {
            "tokenizer.json"
            | "vocab.json"
            | "merges.txt"
            | "added_tokens.json"
            | "special_tokens_map.json"
            | TOKENIZER_CONFIG => Some(Self::Tokenizer),
            "chat_template.jinja" | "chat_template.json" => Some(Self::ChatTemplate),
            "preprocessor_config.json" | "processor_config.json" => Some(Self::Pictures),
            _ => None,
        }
    }

    /// Whether a folder says something of it.
    fn is_in(self, folder: &Folder) -> Result<bool, CheckpointError> {
        let holds = |file: &str, key: &str| {
            let json = folder.json::<Value>(file)?;
            Ok(json.and_then(|json| json.get(key).map(|value| !value.is_null())).unwrap_or(false))
        };
        match self {
            Self::Tokenizer => Ok(folder.exists("tokenizer.json") || folder.exists("vocab.json")),
            Self::ChatTemplate => Ok(folder.exists("chat_template.jinja")
                || folder.exists("chat_template.json")
                || holds("processor_config.json", "chat_template")?
                || holds(TOKENIZER_CONFIG, "chat_template")?),
            Self::Pictures => Ok(folder.exists("preprocessor_config.json")
                || holds("processor_config.json", "image_processor")?),
        }
    }
}

/// `adapter_config.json`, as far as it says what the adapter stands on.
#[derive(Deserialize)]
struct Standing {
    base_model_name_or_path: Option<String>,
    revision: Option<String>,
}

impl CheckpointFiles {
    /// Finds a checkpoint.
    ///
    /// `name` is [`super::BUILT_IN_NAME`], a directory, or a hub id (`owner/model`), which is fetched into the hub's
    /// cache. `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean for `huggingface_hub`.
    /// `reward_config` names a file that stands in place of the checkpoint's own `reward_config.json`, for
    /// checkpoints that have none.
    ///
    /// # Errors
    /// There is no such checkpoint, or what an adapter stands on leads nowhere or in a circle.
    pub fn open(
        name: &str,
        revision: Option<&str>,
        reward_config: Option<&Path>,
    ) -> Result<Self, CheckpointError> {
        let mut folders = vec![Folder::find(name, revision, false)?];
        while let Some(base) = folders.last().and_then(|folder| base_of(folder).transpose()) {
            let base = base?;
            let circle = folders.iter().any(|folder| folder.identity() == base.identity());
            if circle || folders.len() == MAX_FOLDERS {
                let label = folders.last().map(|folder| folder.label(ADAPTER_CONFIG)).unwrap_or_default();
                return Err(CheckpointError::invalid(
                    &label,
                    format!(
                        "base_model_name_or_path {:?} leads {}; it must lead to a model with weights of its own",
                        base.name(),
                        if circle {
                            "back to the adapter itself".into()
                        } else {
                            format!("on, past {MAX_FOLDERS} folders")
                        }
                    ),
                ));
            }
            folders.push(base);
        }
        let reward_config = reward_config.map(|path| RewardConfigFile::Path(path.to_path_buf()));
        Ok(Self { folders, reward_config, stand_in: None })
    }

    /// The name by which the checkpoint was asked for.
    pub fn name(&self) -> &str {
        self.own().name()
    }

    /// The hub's commit, or `sha256:` and the digest of the names and contents of all files that are read; of an
    /// adapter, and of each that it stands on, joined by `+`. To be asked for once headers have been judged: it reads
    /// all weights.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn revision(&self) -> Result<String, CheckpointError> {
        let own = self.folders.iter().map(|folder| folder.revision(&weight_files(folder)?));
        let base = self.stand_in.iter().map(|folder| folder.revision(&[]));
        Ok(own.chain(base).collect::<Result<Vec<_>, _>>()?.join("+"))
    }

    /// The bytes of a file, or `None` where the checkpoint has none of that name.
    ///
    /// # Errors
    /// It cannot be read, is no regular file, or is too long.
    pub fn read(&self, file: &str) -> Result<Option<Cow<'static, [u8]>>, CheckpointError> {
        match &self.reward_config {
            Some(RewardConfigFile::Path(path)) if file == REWARD_CONFIG => {
                read_path(path).map(|bytes| Some(Cow::Owned(bytes)))
            }
            Some(RewardConfigFile::Carried { text, .. }) if file == REWARD_CONFIG => {
                Ok(Some(Cow::Borrowed(text)))
            }
            _ => self.holder(file)?.read(file),
        }
    }

    /// Takes this text in place of the checkpoint's own `reward_config.json`.
    pub fn take_reward_config(&mut self, name: &'static str, text: &'static [u8], reason: &'static str) {
        self.reward_config = Some(RewardConfigFile::Carried { name, text, reason });
    }

    /// What the reward is read by: the name of a profile that ships, or the file that says it.
    pub fn profile(&self) -> String {
        match &self.reward_config {
            Some(RewardConfigFile::Path(path)) => path.display().to_string(),
            Some(RewardConfigFile::Carried { name, .. }) => (*name).to_owned(),
            None => REWARD_CONFIG.to_owned(),
        }
    }

    /// Why it is that.
    pub fn profile_reason(&self) -> &'static str {
        match &self.reward_config {
            Some(RewardConfigFile::Path(_)) => NAMED,
            Some(RewardConfigFile::Carried { reason, .. }) => reason,
            None => "the checkpoint's own",
        }
    }

    /// Has the checkpoint of this name stand for what none of the folders says, but for weights.
    ///
    /// # Errors
    /// There is none.
    pub fn take_base(&mut self, name: &str) -> Result<(), CheckpointError> {
        // A checkpoint that has all of it needs no other.
        let whole = |files: &Self| {
            let says = |subject| files.first(subject).map(|folder| folder.is_some());
            let subjects = [Subject::Tokenizer, Subject::ChatTemplate, Subject::Pictures];
            Ok::<_, CheckpointError>(
                subjects.into_iter().map(says).collect::<Result<Vec<_>, _>>()?.into_iter().all(|said| said)
                    && files.read("config.json")?.is_some(),
            )
        };
        if !whole(self)? {
            let base = Folder::find_settings(name).map_err(|error| {
                let reason = format!("base: {error}");
                CheckpointError::invalid(REWARD_CONFIG, reason)
            })?;
            self.stand_in = Some(base);
        }
        Ok(())
    }

    /// The names of the tensors of the weights, as they are on disk.
    ///
    /// # Errors
    /// The weights are missing or broken.
    pub fn tensor_names(&self) -> Result<Vec<String>, CheckpointError> {
        let inventory = Inventory::open(self, |key| Some(key.to_owned()))?;
        Ok(inventory.names().map(str::to_owned).collect())
    }

    /// The bytes of a file that a checkpoint must have.
    ///
    /// # Errors
    /// As [`CheckpointFiles::read`], or there is none.
    pub fn require(&self, file: &str) -> Result<Cow<'static, [u8]>, CheckpointError> {
        self.read(file)?.ok_or_else(|| CheckpointError::MissingFile(file.to_owned()))
    }

    /// A JSON file, or `None` where the checkpoint has none of that name.
    ///
    /// # Errors
    /// As [`CheckpointFiles::read`], or it is not what is expected.
    pub fn json<T: DeserializeOwned>(&self, file: &str) -> Result<Option<T>, CheckpointError> {
        let Some(bytes) = self.read(file)? else { return Ok(None) };
        let label = self.holder(file)?.label(file);
        let refuse = |reason| CheckpointError::invalid(&label, reason);
        let value = python_json::parse(&bytes).map_err(refuse)?;
        T::deserialize(value).map(Some).map_err(|e| refuse(e.to_string()))
    }

    /// A JSON file that a checkpoint must have.
    ///
    /// # Errors
    /// As [`CheckpointFiles::json`], or there is none.
    pub fn require_json<T: DeserializeOwned>(&self, file: &str) -> Result<T, CheckpointError> {
        self.json(file)?.ok_or_else(|| CheckpointError::MissingFile(file.to_owned()))
    }

    /// The files of the folder that says what the chat template is. In an adapter's folder it may stand in a
    /// `tokenizer_config.json` beside which the base's `chat_template.jinja` has nothing to say, and the other way
    /// round.
    ///
    /// # Errors
    /// A file that could hold it cannot be read.
    pub fn of_chat_template(&self) -> Result<Self, CheckpointError> {
        let folder = self.first(Subject::ChatTemplate)?.unwrap_or_else(|| self.own());
        Ok(Self { folders: vec![folder.clone()], reward_config: None, stand_in: None })
    }

    /// The folder that has weights of its own.
    pub(super) fn base(&self) -> &Folder {
        &self.folders[self.folders.len() - 1]
    }

    /// The folders that hold adapters, in the order in which they are merged. The last folder may have one beside its
    /// own weights.
    pub(super) fn adapters(&self) -> impl Iterator<Item = &Folder> {
        self.folders.iter().rev().filter(|folder| folder.exists(ADAPTER_CONFIG))
    }

    /// Weights that trainers leave as pickles, beside those that are read.
    pub fn pickles(&self) -> Vec<String> {
        self.own().pickles()
    }

    fn own(&self) -> &Folder {
        &self.folders[0]
    }

    /// The first folder that says something of a subject.
    fn first(&self, subject: Subject) -> Result<Option<&Folder>, CheckpointError> {
        for folder in self.folders.iter().chain(&self.stand_in) {
            if subject.is_in(folder)? {
                return Ok(Some(folder));
            }
        }
        Ok(None)
    }

    /// The folder in which a file is looked for.
    fn holder(&self, file: &str) -> Result<&Folder, CheckpointError> {
        let subject = Subject::of(file);
        if let Some(subject @ (Subject::ChatTemplate | Subject::Pictures)) = subject
            && let Some(folder) = self.first(subject)?
        {
            return Ok(folder);
        }
        for folder in self.folders.iter().chain(&self.stand_in) {
            // Settings alone may stand before the base's vocabulary, but not behind one of their folder's own.
            if folder.exists(file)
                || subject == Some(Subject::Tokenizer) && Subject::Tokenizer.is_in(folder)?
            {
                return Ok(folder);
            }
        }
        Ok(self.own())
    }
}

/// What an adapter without weights of its own stands on, as its configuration names it.
fn base_of(folder: &Folder) -> Result<Option<Folder>, CheckpointError> {
    if folder.exists(ADAPTER_WEIGHTS) && !folder.exists(ADAPTER_CONFIG) {
        return Err(CheckpointError::invalid(
            &folder.label(ADAPTER_WEIGHTS),
            format!("{ADAPTER_CONFIG} is missing beside it, without which nobody knows what it adds"),
        ));
    }
    if folder.exists(WEIGHTS) || folder.exists(INDEX) || !folder.exists(ADAPTER_CONFIG) {
        return Ok(None);
    }
    let pickled = folder.pickles();
    if !folder.exists(ADAPTER_WEIGHTS) && !pickled.is_empty() {
        return Err(CheckpointError::Pickles(pickled));
    }
    let standing: Option<Standing> = folder.json(ADAPTER_CONFIG)?;
    match standing {
        Some(Standing { base_model_name_or_path: Some(name), revision }) if !name.is_empty() => {
            Folder::find(&name, revision.as_deref(), true).map(Some).map_err(|error| match error {
                CheckpointError::NotFound(_) => CheckpointError::invalid(
                    &folder.label(ADAPTER_CONFIG),
                    format!("base_model_name_or_path: {error}"),
                ),
                other => other,
            })
        }
        _ => Err(CheckpointError::invalid(
            &folder.label(ADAPTER_CONFIG),
            format!("base_model_name_or_path is not said, and there is no {WEIGHTS}"),
        )),
    }
}

/// The weights of a folder that are read.
fn weight_files(folder: &Folder) -> Result<Vec<String>, CheckpointError> {
    let mut files = shards::weight_files(folder)?;
    if folder.exists(ADAPTER_CONFIG) {
        files.push(ADAPTER_WEIGHTS.to_owned());
    }
    Ok(files)
}

/// That there are no weights in a folder, with what to do where there are pickles.
pub(super) fn no_weights(folder: &Folder) -> CheckpointError {
    match folder.pickles() {
        none if none.is_empty() => {
            CheckpointError::MissingFile(folder.label(&format!("{WEIGHTS} (or {INDEX} and its shards)")))
        }
        pickled => CheckpointError::Pickles(pickled),
    }
}

/// What to do about pickles.
pub(super) fn pickled(files: &[String]) -> String {
    format!(
        "{} {} pickled by Python, which this server never reads; convert the folder once with `{CONVERTER} FOLDER \
         OUT`, see training/README.md",
        files.join(", "),
        if files.len() == 1 { "is" } else { "are" }
    )
}
