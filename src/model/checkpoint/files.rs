//! Where a checkpoint's files are: in the binary, in a directory, or on the Hugging Face hub.

use std::borrow::Cow;
use std::env;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use include_dir::{Dir, include_dir};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::{CheckpointError, python_json};

/// The checkpoint that the binary carries.
static BUILT_IN: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/models/spatialscore-mini");

/// The name by which the built-in checkpoint is asked for.
pub const BUILT_IN_NAME: &str = "spatialscore-mini";

/// Files that a checkpoint on the hub may have beside its weights. Those it lacks are not an error here: whoever
/// needs one says so.
const SMALL_FILES: [&str; 14] = [
    "config.json",
    "reward_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "adapter_config.json",
    "model.safetensors.index.json",
];

/// A checkpoint's files, by name.
#[derive(Debug, Clone)]
pub struct CheckpointFiles {
    name: String,
    root: Root,
    /// Stands in place of the checkpoint's own `reward_config.json`.
    reward_config: Option<PathBuf>,
    /// Where an adapter that stands alone has its other files.
    base: Option<Box<CheckpointFiles>>,
}

#[derive(Debug, Clone)]
enum Root {
    BuiltIn,
    Directory { path: PathBuf, revision: Option<String> },
}

impl CheckpointFiles {
    /// Finds a checkpoint.
    ///
    /// `name` is [`BUILT_IN_NAME`], a directory, or a hub id (`owner/model`), which is fetched into the hub's cache.
    /// `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean for `huggingface_hub`.
    /// `reward_config` names a file that stands in place of the checkpoint's own `reward_config.json`, for
    /// checkpoints that have none.
    pub fn open(
        name: &str,
        revision: Option<&str>,
        reward_config: Option<&Path>,
    ) -> Result<Self, CheckpointError> {
        let root = if name == BUILT_IN_NAME {
            Root::BuiltIn
        } else if Path::new(name).is_dir() {
            Root::Directory { path: PathBuf::from(name), revision: None }
        } else if is_hub_id(name) {
            from_hub(name, revision.unwrap_or("main"))?
        } else {
            return Err(CheckpointError::NotFound(name.to_owned()));
        };
        let mut files = Self {
            name: name.to_owned(),
            root,
            reward_config: reward_config.map(Path::to_path_buf),
            base: None,
        };
        files.base = files.find_base()?.map(Box::new);
        Ok(files)
    }

    /// The checkpoint that an adapter without weights of its own was trained on, as its configuration names it.
    fn find_base(&self) -> Result<Option<Self>, CheckpointError> {
        #[derive(Deserialize)]
        struct AdapterConfig {
            base_model_name_or_path: Option<String>,
        }
        if self.exists("model.safetensors") || self.exists("model.safetensors.index.json") {
            return Ok(None);
        }
        let config = self.json::<AdapterConfig>("adapter_config.json")?;
        match config.and_then(|c| c.base_model_name_or_path) {
            Some(base) if base != self.name => Self::open(&base, None, None).map(Some),
            _ => Ok(None),
        }
    }

    /// The name by which the checkpoint was asked for.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The hub's commit, or `sha256:` and the digest of all files' names and contents.
    pub fn revision(&self) -> Result<String, CheckpointError> {
        if let Root::Directory { revision: Some(commit), .. } = &self.root {
            return Ok(commit.clone());
        }
        let mut digest = Sha256::new();
        for file in self.list()? {
            digest.update(file.as_bytes());
            digest.update([0]);
            match self.path(&file) {
                Some(path) => {
                    io::copy(
                        &mut fs::File::open(&path).map_err(|e| CheckpointError::io(&file, e))?,
                        &mut digest,
                    )
                    .map_err(|e| CheckpointError::io(&file, e))?;
                }
                None => digest.update(self.require(&file)?),
            }
        }
        if let Some(base) = &self.base {
            digest.update(base.revision()?);
        }
        let hex: String = digest.finalize().iter().map(|b| format!("{b:02x}")).collect();
        Ok(format!("sha256:{hex}"))
    }

    /// The bytes of a file, or `None` where the checkpoint has none of that name.
    pub fn read(&self, file: &str) -> Result<Option<Cow<'static, [u8]>>, CheckpointError> {
        match self.path(file) {
            Some(path) => match fs::read(path) {
                Ok(bytes) => Ok(Some(Cow::Owned(bytes))),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(CheckpointError::io(file, e)),
            },
            None => Ok(self.read_static(file).map(Cow::Borrowed)),
        }
    }

    /// Whether there is a file of that name.
    pub fn exists(&self, file: &str) -> bool {
        self.path(file).map_or_else(|| self.read_static(file).is_some(), |path| path.is_file())
    }

    /// The bytes of a file that a checkpoint must have.
    pub fn require(&self, file: &str) -> Result<Cow<'static, [u8]>, CheckpointError> {
        self.read(file)?.ok_or_else(|| CheckpointError::MissingFile(file.to_owned()))
    }

    /// A JSON file, or `None` where the checkpoint has none of that name.
    pub fn json<T: DeserializeOwned>(&self, file: &str) -> Result<Option<T>, CheckpointError> {
        let Some(bytes) = self.read(file)? else { return Ok(None) };
        let refuse = |reason| CheckpointError::invalid(file, reason);
        let value = python_json::parse(&bytes).map_err(refuse)?;
        T::deserialize(value).map(Some).map_err(|e| refuse(e.to_string()))
    }

    /// A JSON file that a checkpoint must have.
    pub fn require_json<T: DeserializeOwned>(&self, file: &str) -> Result<T, CheckpointError> {
        self.json(file)?.ok_or_else(|| CheckpointError::MissingFile(file.to_owned()))
    }

    /// Where a file is on disk; `None` for the built-in checkpoint.
    pub(super) fn path(&self, file: &str) -> Option<PathBuf> {
        match (&self.reward_config, &self.root) {
            (Some(path), _) if file == "reward_config.json" => Some(path.clone()),
            (_, Root::Directory { path, .. }) => {
                let own = path.join(file);
                match &self.base {
                    Some(base) if !own.is_file() => base.path(file),
                    _ => Some(own),
                }
            }
            (_, Root::BuiltIn) => None,
        }
    }

    /// A file that the binary carries.
    pub(super) fn read_static(&self, file: &str) -> Option<&'static [u8]> {
        match (&self.root, &self.base) {
            (Root::BuiltIn, _) => BUILT_IN.get_file(file).map(include_dir::File::contents),
            (Root::Directory { .. }, Some(base)) => base.read_static(file),
            (Root::Directory { .. }, None) => None,
        }
    }

    /// The names of the files that make the checkpoint what it is, sorted.
    fn list(&self) -> Result<Vec<String>, CheckpointError> {
        let mut names: Vec<String> = match &self.root {
            Root::BuiltIn => BUILT_IN.files().filter_map(|f| f.path().to_str().map(str::to_owned)).collect(),
            Root::Directory { path, .. } => fs::read_dir(path)
                .and_then(|entries| {
                    entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect()
                })
                .map_err(|e| CheckpointError::io(&self.name, e))?,
        };
        names.retain(|n| [".json", ".jinja", ".safetensors"].iter().any(|end| n.ends_with(end)));
        names.sort_unstable();
        Ok(names)
    }
}

fn is_hub_id(name: &str) -> bool {
    let part = |s: &str| {
        !s.is_empty()
            && !s.starts_with('.')
            && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    matches!(name.split_once('/'), Some((owner, model)) if part(owner) && part(model))
}

/// The snapshot of a hub repository, fetched into the hub's cache where it is not there yet.
fn from_hub(id: &str, revision: &str) -> Result<Root, CheckpointError> {
    let repo = || Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
    let offline = env::var("HF_HUB_OFFLINE")
        .is_ok_and(|v| matches!(v.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"));
    let hub_error =
        |reason: String| CheckpointError::Hub { id: id.to_owned(), revision: revision.to_owned(), reason };
    let config = if offline {
        let cache = Cache::from_env().repo(repo());
        // A branch or tag is a reference in the cache, a commit the name of a snapshot.
        let commit = cache.pointer_path(revision).join("config.json");
        cache
            .get("config.json")
            .or_else(|| commit.is_file().then_some(commit))
            .ok_or_else(|| hub_error("HF_HUB_OFFLINE is set and the cache does not hold it".into()))?
    } else {
        let mut builder = ApiBuilder::from_env();
        if let Ok(token) = env::var("HF_TOKEN") {
            builder = builder.with_token(Some(token));
        }
        let api = builder.build().map_err(|e| hub_error(e.to_string()))?.repo(repo());
        fetch(&api).map_err(|e| hub_error(e.to_string()))?
    };
    let path = config.parent().map(Path::to_path_buf).unwrap_or_default();
    // The cache names a snapshot's folder by its commit.
    let revision = path.file_name().map(|n| n.to_string_lossy().into_owned());
    Ok(Root::Directory { path, revision })
}

/// Fetches every file that a checkpoint can consist of; returns where one of them lies.
fn fetch(repo: &ApiRepo) -> Result<PathBuf, ApiError> {
    let info = repo.info()?;
    let mut place = None;
    for file in info.siblings.iter().map(|s| s.rfilename.as_str()) {
        if SMALL_FILES.contains(&file) || (file.ends_with(".safetensors") && !file.contains('/')) {
            place = Some(repo.get(file)?);
        }
    }
    match place {
        Some(path) => Ok(path),
        None => repo.get("config.json"),
    }
}
