//! Checkpoints on the Hugging Face hub.

use std::env;
use std::path::{Path, PathBuf};

use hf_hub::api::sync::{ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::CheckpointError;

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

/// Whether a name has the form of a hub id, `owner/model`.
pub(super) fn is_hub_id(name: &str) -> bool {
    let part = |s: &str| {
        !s.is_empty()
            && !s.starts_with('.')
            && s.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
    };
    matches!(name.split_once('/'), Some((owner, model)) if part(owner) && part(model))
}

/// The folder and the commit of a hub repository, fetched into the hub's cache where it is not there yet.
pub(super) fn snapshot(id: &str, revision: &str) -> Result<(PathBuf, Option<String>), CheckpointError> {
    find(id, revision, true)
}

/// The same without its weights.
pub(super) fn settings(id: &str, revision: &str) -> Result<(PathBuf, Option<String>), CheckpointError> {
    find(id, revision, false)
}

fn find(id: &str, revision: &str, weights: bool) -> Result<(PathBuf, Option<String>), CheckpointError> {
    let repo = || Repo::with_revision(id.to_owned(), RepoType::Model, revision.to_owned());
    let offline = env::var("HF_HUB_OFFLINE")
        .is_ok_and(|v| matches!(v.to_uppercase().as_str(), "1" | "ON" | "YES" | "TRUE"));
    let hub_error =
        |reason: String| CheckpointError::Hub { id: id.to_owned(), revision: revision.to_owned(), reason };
    let file = if offline {
        let cache = Cache::from_env().repo(repo());
        // A branch or tag is a reference in the cache, a commit the name of a snapshot. An adapter may have no
        // config.json, and what has a base may be weights alone.
        let find = |file: &str| {
            let commit = cache.pointer_path(revision).join(file);
            cache.get(file).or_else(|| commit.is_file().then_some(commit))
        };
        find("config.json")
            .or_else(|| find("adapter_config.json"))
            .or_else(|| any_weights(&cache, revision))
            .ok_or_else(|| hub_error("HF_HUB_OFFLINE is set and the cache does not hold it".into()))?
    } else {
        let mut builder = ApiBuilder::from_env();
        if let Ok(token) = env::var("HF_TOKEN") {
            builder = builder.with_token(Some(token));
        }
        let api = builder.build().map_err(|e| hub_error(e.to_string()))?.repo(repo());
        fetch(&api, weights).map_err(|e| hub_error(e.to_string()))?
    };
    let path = file.parent().map(Path::to_path_buf).unwrap_or_default();
    // The cache names a snapshot's folder by its commit.
    let commit = path.file_name().map(|n| n.to_string_lossy().into_owned());
    Ok((path, commit))
}

/// A file of weights of a snapshot that has nothing else.
fn any_weights(cache: &CacheRepo, revision: &str) -> Option<PathBuf> {
    let folder = cache.pointer_path(revision);
    // A reference's file holds the commit.
    let commit = std::fs::read_to_string(folder.parent()?.parent()?.join("refs").join(revision)).ok();
    let folder = commit.map_or(folder.clone(), |commit| cache.pointer_path(commit.trim()));
    let files = std::fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    files.into_iter().find(|path| path.extension().is_some_and(|end| end == "safetensors"))
}

/// Fetches every file that a checkpoint can consist of; returns where one of them lies.
fn fetch(repo: &ApiRepo, weights: bool) -> Result<PathBuf, ApiError> {
    let info = repo.info()?;
    let mut place = None;
    for file in info.siblings.iter().map(|s| s.rfilename.as_str()) {
        if SMALL_FILES.contains(&file) || weights && file.ends_with(".safetensors") && !file.contains('/') {
            place = Some(repo.get(file)?);
        }
    }
    match place {
        Some(path) => Ok(path),
        None => repo.get("config.json"),
    }
}
