//! One folder of a checkpoint: in the binary, in a directory, or in the hub's cache.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use include_dir::{Dir, include_dir};
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};

use super::{CheckpointError, hub};

/// The checkpoint that the binary carries.
static BUILT_IN: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/models/spatialscore-mini");

/// The name by which the built-in checkpoint is asked for.
pub const BUILT_IN_NAME: &str = "spatialscore-mini";

/// The most bytes of a file that is read whole: Qwen's `tokenizer.json` has 11 MB.
const MAX_WHOLE: u64 = 32 << 20;
/// The most bytes of a file that is no more than settings. A JSON value takes many times its text in memory.
const MAX_SETTINGS: u64 = 4 << 20;
/// Those that are longer by nature.
const LONG: [&str; 5] =
    ["tokenizer.json", "vocab.json", "merges.txt", "model.safetensors.index.json", "added_tokens.json"];

/// What git leaves in place of a large file that was not fetched.
const LFS_POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// A folder with a name, by which errors call it.
#[derive(Debug, Clone)]
pub(super) struct Folder {
    name: String,
    /// Whether an error must say in which folder a file is.
    named: bool,
    root: Root,
}

#[derive(Debug, Clone)]
enum Root {
    BuiltIn,
    Directory { path: PathBuf, commit: Option<String> },
}

/// A file that is open.
#[derive(Debug)]
pub(super) enum Opened {
    File(File),
    Static(&'static [u8]),
}

impl Folder {
    /// Finds what [`BUILT_IN_NAME`], a directory or a hub id names; `named` says whether errors repeat the name.
    pub fn find(name: &str, revision: Option<&str>, named: bool) -> Result<Self, CheckpointError> {
        let root = if name == BUILT_IN_NAME {
            Root::BuiltIn
        } else if Path::new(name).is_dir() {
            Root::Directory { path: PathBuf::from(name), commit: None }
        } else if hub::is_hub_id(name) {
            let (path, commit) = hub::snapshot(name, revision.unwrap_or("main"))?;
            Root::Directory { path, commit }
        } else {
            return Err(CheckpointError::NotFound(name.to_owned()));
        };
        Ok(Self { name: name.to_owned(), named, root })
    }

    /// As [`Folder::find`] for what stands behind a checkpoint without its weights, which are not fetched.
    pub fn find_settings(name: &str) -> Result<Self, CheckpointError> {
        if !Path::new(name).is_dir() && hub::is_hub_id(name) {
            let (path, commit) = hub::settings(name, "main")?;
            return Ok(Self { name: name.to_owned(), named: true, root: Root::Directory { path, commit } });
        }
        Self::find(name, None, true)
    }

    /// The names of its files of weights.
    pub fn safetensors(&self) -> Vec<String> {
        let Root::Directory { path, .. } = &self.root else { return Vec::new() };
        list(path).into_iter().flatten().filter(|name| name.ends_with(".safetensors")).collect()
    }

    /// The name by which it was asked for.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How an error calls one of its files.
    pub fn label(&self, file: &str) -> String {
        if self.named { format!("{}/{file}", self.name) } else { file.to_owned() }
    }

    /// What it is, whatever name leads to it.
    pub fn identity(&self) -> Option<PathBuf> {
        match &self.root {
            Root::BuiltIn => None,
            Root::Directory { path, .. } => Some(fs::canonicalize(path).unwrap_or_else(|_| path.clone())),
        }
    }

    /// Whether there is anything of that name, be it what cannot be read.
    pub fn exists(&self, file: &str) -> bool {
        match &self.root {
            Root::BuiltIn => BUILT_IN.get_file(file).is_some(),
            Root::Directory { path, .. } => fs::symlink_metadata(path.join(file)).is_ok(),
        }
    }

    /// Opens a file, if there is one.
    ///
    /// # Errors
    /// It is a device, a pipe or a directory, of which no end is known; or it is only the pointer to a file.
    pub fn open(&self, file: &str) -> Result<Option<Opened>, CheckpointError> {
        match &self.root {
            Root::BuiltIn => Ok(BUILT_IN.get_file(file).map(|f| Opened::Static(f.contents()))),
            Root::Directory { path, .. } => match open_regular(&path.join(file)) {
                Ok(opened) => Ok(Some(Opened::File(opened))),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(CheckpointError::io(&self.label(file), e)),
            },
        }
    }

    /// The bytes of a file that is read whole, if there is one.
    pub fn read(&self, file: &str) -> Result<Option<Cow<'static, [u8]>>, CheckpointError> {
        let label = self.label(file);
        match self.open(file)? {
            None => Ok(None),
            Some(Opened::Static(bytes)) => Ok(Some(Cow::Borrowed(bytes))),
            Some(Opened::File(opened)) => read_whole(opened, file, &label).map(|b| Some(Cow::Owned(b))),
        }
    }

    /// A JSON file, if there is one.
    pub fn json<T: DeserializeOwned>(&self, file: &str) -> Result<Option<T>, CheckpointError> {
        let Some(bytes) = self.read(file)? else { return Ok(None) };
        serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| CheckpointError::invalid(&self.label(file), e.to_string()))
    }

    /// The hub's commit, or the digest of the names and contents of `weights` and of every file of settings.
    pub fn revision(&self, weights: &[String]) -> Result<String, CheckpointError> {
        let mut names: Vec<String> = match &self.root {
            Root::Directory { commit: Some(commit), .. } => return Ok(commit.clone()),
            Root::BuiltIn => BUILT_IN.files().filter_map(|f| f.path().to_str().map(str::to_owned)).collect(),
            Root::Directory { path, .. } => {
                list(path).map_err(|e| CheckpointError::io(&self.name, e))?.collect()
            }
        };
        names.retain(|n| n.ends_with(".json") || n.ends_with(".jinja") || n == "merges.txt");
        names.extend_from_slice(weights);
        names.sort_unstable();
        names.dedup();
        let mut digest = Sha256::new();
        for file in names {
            digest.update(file.as_bytes());
            digest.update([0]);
            let io = |e| CheckpointError::io(&self.label(&file), e);
            match self.open(&file)? {
                None => {}
                Some(Opened::Static(bytes)) => digest.update(bytes),
                // Settings that nobody reads may be of any length; what is read has been found to be short.
                Some(Opened::File(opened)) => {
                    let limit = if weights.contains(&file) { u64::MAX } else { MAX_WHOLE };
                    io::copy(&mut opened.take(limit), &mut digest).map_err(io)?;
                }
            }
        }
        let hex: String = digest.finalize().iter().map(|b| format!("{b:02x}")).collect();
        Ok(format!("sha256:{hex}"))
    }

    /// Weights that trainers leave as Python's pickles, which no server should read, here or a folder below.
    pub fn pickles(&self) -> Vec<String> {
        const MOST: usize = 1000;
        let Root::Directory { path, .. } = &self.root else { return Vec::new() };
        let is_pickle = |name: &String| [".pth", ".pt", ".bin"].iter().any(|end| name.ends_with(end));
        let mut found = Vec::new();
        for name in list(path).into_iter().flatten().take(MOST) {
            if name.starts_with("checkpoint-") {
                let inner = path.join(&name);
                let below = list(&inner).into_iter().flatten().take(MOST).filter(is_pickle);
                found.extend(below.map(|file| format!("{name}/{file}")));
            } else if is_pickle(&name) {
                found.push(name);
            }
        }
        // What else a trainer keeps: the optimiser's state, its arguments, the random numbers.
        found.retain(|f| ["model", "state_dict", "pytorch_model"].iter().any(|part| f.contains(part)));
        found.sort_unstable();
        found
    }
}

fn list(path: &Path) -> io::Result<impl Iterator<Item = String> + use<>> {
    Ok(fs::read_dir(path)?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()))
}

fn open_regular(path: &Path) -> io::Result<File> {
    // Opening a pipe waits for its other end, so the look comes first.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::other("it must be a regular file, and is none"));
    }
    File::open(path)
}

/// The bytes of a file that is read whole and stands somewhere else.
pub(super) fn read_path(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let label = path.display().to_string();
    let opened = open_regular(path).map_err(|e| CheckpointError::open(&label, e))?;
    read_whole(opened, "", &label)
}

fn read_whole(opened: File, file: &str, label: &str) -> Result<Vec<u8>, CheckpointError> {
    let io = |e| CheckpointError::io(label, e);
    let limit = if LONG.contains(&file) { MAX_WHOLE } else { MAX_SETTINGS };
    let length = opened.metadata().map_err(io)?.len();
    if length > limit {
        return Err(CheckpointError::invalid(label, format!("{length} bytes; it may have {limit}")));
    }
    let mut bytes = Vec::new();
    opened.take(limit).read_to_end(&mut bytes).map_err(io)?;
    refuse_pointer(&bytes, label)?;
    Ok(bytes)
}

/// Refuses what git-lfs leaves where a file was not fetched.
pub(super) fn refuse_pointer(start: &[u8], label: &str) -> Result<(), CheckpointError> {
    if start.starts_with(LFS_POINTER) {
        return Err(CheckpointError::invalid(
            label,
            "only a Git LFS pointer to the file; fetch the file itself with `git lfs pull`",
        ));
    }
    Ok(())
}
