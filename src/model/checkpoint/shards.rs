//! Which files of a folder hold its weights.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::CheckpointError;
use super::folder::Folder;
use super::lora::ADAPTER_WEIGHTS;

/// The most shards: each is held open.
const MAX_SHARDS: usize = 500;

/// The weights in one file.
pub(super) const WEIGHTS: &str = "model.safetensors";
/// The list of the shards that hold the weights.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The shards that a folder's index names, sorted; none where it has no index.
fn shards(folder: &Folder) -> Result<Option<Vec<String>>, CheckpointError> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let Some(index) = folder.json::<Index>(INDEX)? else { return Ok(None) };
    let shards: BTreeSet<String> = index.weight_map.into_values().collect();
    let refuse = |reason: String| Err(CheckpointError::invalid(&folder.label(INDEX), reason));
    // A name that leads out of the folder would read whatever the server may.
    let is_name = |s: &String| s.ends_with(".safetensors") && !s.contains(['/', '\\', '\0']);
    if let Some(other) = shards.iter().find(|shard| !is_name(shard)) {
        return refuse(format!("weight_map names {other:?}; a shard is a .safetensors file of this folder"));
    }
    if shards.is_empty() || shards.len() > MAX_SHARDS {
        return refuse(format!("weight_map names {} shards; there must be 1 to {MAX_SHARDS}", shards.len()));
    }
    Ok(Some(shards.into_iter().collect()))
}

/// The files of a folder's own weights: one of the usual name, or the shards of an index, or where there is neither the only
/// one that there is, as HPSv3's makers publish it.
pub(super) fn weight_files(folder: &Folder) -> Result<Vec<String>, CheckpointError> {
    if folder.exists(WEIGHTS) {
        return Ok(vec![WEIGHTS.to_owned()]);
    }
    if let Some(shards) = shards(folder)? {
        return Ok(shards);
    }
    let mut others = folder.safetensors();
    others.retain(|file| file != ADAPTER_WEIGHTS);
    Ok(if others.len() == 1 { others } else { Vec::new() })
}
