//! The profiles that ship, and how a checkpoint finds its own.

use std::path::Path;

use include_dir::{Dir, include_dir};

use super::{FILE, RewardConfig};
use crate::model::checkpoint::{CheckpointError, CheckpointFiles, NAMED};

/// A file for each, of the form of `reward_config.json`.
static SHIPPED: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/src/model/profile/shipped");

/// Why a profile is taken that nobody named.
const KNOWN: &str = "the checkpoint's tensors can only be of it";

/// Their names.
pub fn names() -> impl Iterator<Item = &'static str> {
    SHIPPED.files().filter_map(|file| file.path().file_stem()?.to_str())
}

/// The name and the text of a profile that ships.
pub fn shipped(name: &str) -> Option<(&'static str, &'static [u8])> {
    let file = SHIPPED.get_file(format!("{name}.json"))?;
    Some((file.path().file_stem()?.to_str()?, file.contents()))
}

/// Finds a checkpoint and what its reward is read by: `profile`, the name of one that ships or a file, comes before its own
/// `reward_config.json`; one without either takes a profile that ships where its tensors can only be of that.
///
/// # Errors
/// There is no such checkpoint, profile or base.
pub fn open(
    name: &str,
    revision: Option<&str>,
    profile: Option<&str>,
) -> Result<CheckpointFiles, CheckpointError> {
    let mut files =
        CheckpointFiles::open(name, revision, profile.filter(|p| shipped(p).is_none()).map(Path::new))?;
    let named = match profile {
        Some(profile) => shipped(profile).map(|found| (found, NAMED)),
        None if files.read(FILE)?.is_none() => {
            recognised(&files)?.and_then(shipped).map(|found| (found, KNOWN))
        }
        None => None,
    };
    if let Some(((name, text), reason)) = named {
        files.take_reward_config(name, text, reason);
    }
    // What is wrong with it is said by who reads it.
    if let Some(RewardConfig { base: Some(base), .. }) = files.json(FILE).ok().flatten() {
        files.take_base(&base)?;
    }
    Ok(files)
}

/// The profile whose tensors no other checkpoint has.
fn recognised(files: &CheckpointFiles) -> Result<Option<&'static str>, CheckpointError> {
    // What cannot be read is told by who reads it.
    let Ok(keys) = files.tensor_names() else { return Ok(None) };
    let has = |name: &str| keys.iter().any(|key| key == name);
    let two_heads = has("rm_heads.head_0.0.weight") && has("rm_heads.head_1.5.weight");
    let alone = files.read("config.json")?.is_none();
    // Qwen2-VL's merger and the head of HPSv3, and no file beside them: as its makers publish it.
    let hpsv3 = has("visual.merger.ln_q.bias") && has("rm_head.0.weight") && has("rm_head.5.weight");
    Ok(if two_heads {
        Some("editreward")
    } else if alone && hpsv3 {
        Some("hpsv3")
    } else {
        None
    })
}

/// There is no `reward_config.json`, and what to do about it.
pub(super) fn missing(files: &CheckpointFiles) -> CheckpointError {
    let names: Vec<&str> = names().collect();
    let has_head = files.tensor_names().is_ok_and(|keys| keys.iter().any(|key| key.starts_with("rm_head")));
    let which = if has_head {
        "its head says nothing of the prompt it was trained with"
    } else {
        "it has no head, so its answers can be read"
    };
    CheckpointError::MissingFile(format!(
        "{FILE} (or --profile with a file, or with one of {}: {which})",
        names.join(", ")
    ))
}
