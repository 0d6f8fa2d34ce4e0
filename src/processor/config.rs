//! What `config.json`, `preprocessor_config.json` and `reward_config.json` say of pictures.

use serde::Deserialize;

use super::image::Geometry;
use crate::model::Normalisation;
use crate::model::checkpoint::{CheckpointError, CheckpointFiles, RewardConfig};

const MODEL: &str = "config.json";
const PREPROCESSOR: &str = "preprocessor_config.json";
/// Holds the preprocessor's settings under `image_processor` since transformers 5.
const PROCESSOR: &str = "processor_config.json";

/// The bicubic filter's number in PIL, and so in `preprocessor_config.json`.
const BICUBIC: u32 = 3;

// What the reference takes where a key is absent: `Qwen2VLImageProcessor`, and the family's configuration.
const DEFAULT_PATCH: usize = 14;
const QWEN3_PATCH: usize = 16;
const DEFAULT_MERGE: usize = 2;
const DEFAULT_TEMPORAL: usize = 2;
const DEFAULT_MIN_PIXELS: u64 = 56 * 56;
const DEFAULT_MAX_PIXELS: u64 = 28 * 28 * 1280;
const DEFAULT_IMAGE_TOKEN_ID: u32 = 151_655;
const OPENAI_CLIP_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const OPENAI_CLIP_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// What a checkpoint says of pictures.
pub(super) struct PictureConfig {
    pub geometry: Geometry,
    pub normalisation: Normalisation,
    pub image_token_id: u32,
}

/// `preprocessor_config.json`. A key that is absent or null means the default of the reference's class.
#[derive(Deserialize)]
struct Preprocessor {
    do_resize: Option<bool>,
    resample: Option<u32>,
    do_rescale: Option<bool>,
    rescale_factor: Option<f32>,
    do_normalize: Option<bool>,
    image_mean: Option<[f32; 3]>,
    image_std: Option<[f32; 3]>,
    patch_size: Option<usize>,
    merge_size: Option<usize>,
    temporal_patch_size: Option<usize>,
    size: Option<Size>,
    min_pixels: Option<u64>,
    max_pixels: Option<u64>,
}

#[derive(Deserialize)]
struct Size {
    shortest_edge: Option<u64>,
    longest_edge: Option<u64>,
}

#[derive(Deserialize)]
struct ProcessorFile {
    image_processor: Option<Preprocessor>,
}

#[derive(Deserialize)]
struct ModelFile {
    model_type: Option<String>,
    image_token_id: Option<u32>,
    #[serde(default)]
    text_config: TextFile,
    #[serde(default)]
    vision_config: VisionFile,
}

#[derive(Default, Deserialize)]
struct TextFile {
    image_token_id: Option<u32>,
}

#[derive(Default, Deserialize)]
struct VisionFile {
    patch_size: Option<usize>,
    spatial_merge_size: Option<usize>,
    temporal_patch_size: Option<usize>,
}

impl PictureConfig {
    /// Reads what the checkpoint says of pictures and refuses what this processor does not do.
    pub fn load(files: &CheckpointFiles, reward: &RewardConfig) -> Result<Self, CheckpointError> {
        let model: ModelFile = files.require_json(MODEL)?;
        let (file, settings) = preprocessor(files)?;
        let refuse = |reason: String| CheckpointError::invalid(file, reason);
        if settings.do_resize == Some(false) {
            return Err(refuse("do_resize is false: pictures are always resized to whole patches".into()));
        }
        if let Some(other) = settings.resample.filter(|&r| r != BICUBIC) {
            return Err(refuse(format!("resample is {other}: only {BICUBIC} (bicubic) is supported")));
        }
        let geometry = geometry(&settings, reward).map_err(refuse)?;
        let patch = match model.model_type.as_deref() {
            Some("qwen3_vl") => QWEN3_PATCH,
            _ => DEFAULT_PATCH,
        };
        agree(file, &settings, &geometry, &model.vision_config, patch)?;
        Ok(Self {
            geometry,
            normalisation: normalisation(&settings).map_err(refuse)?,
            image_token_id: model
                .image_token_id
                .or(model.text_config.image_token_id)
                .unwrap_or(DEFAULT_IMAGE_TOKEN_ID),
        })
    }
}

/// The preprocessor's settings and the file they stand in. The nested form wins, as in the reference's
/// `ImageProcessingMixin.get_image_processor_dict`.
fn preprocessor(files: &CheckpointFiles) -> Result<(&'static str, Preprocessor), CheckpointError> {
    if let Some(ProcessorFile { image_processor: Some(nested) }) = files.json(PROCESSOR)? {
        return Ok((PROCESSOR, nested));
    }
    Ok((PREPROCESSOR, files.require_json(PREPROCESSOR)?))
}

/// `min_pixels` and `max_pixels` win over `size`, as in the reference, and `reward_config.json` over both.
fn geometry(settings: &Preprocessor, reward: &RewardConfig) -> Result<Geometry, String> {
    let size = settings.size.as_ref();
    let (shortest, longest) = match size {
        Some(size) => (size.shortest_edge, size.longest_edge),
        None => (Some(DEFAULT_MIN_PIXELS), Some(DEFAULT_MAX_PIXELS)),
    };
    let min_pixels = reward.min_pixels.or(settings.min_pixels).or(shortest);
    let max_pixels = reward.max_pixels.or(settings.max_pixels).or(longest);
    let (Some(min_pixels), Some(max_pixels)) = (min_pixels, max_pixels) else {
        return Err("size must have shortest_edge and longest_edge, in pixels of the whole picture".into());
    };
    if min_pixels == 0 || min_pixels > max_pixels {
        return Err(format!(
            "pictures are to have from {min_pixels} to {max_pixels} pixels: the least must be above 0 and at \
             most the greatest"
        ));
    }
    let patch = settings.patch_size.unwrap_or(DEFAULT_PATCH);
    let merge = settings.merge_size.unwrap_or(DEFAULT_MERGE);
    if !(1..=256).contains(&patch) || !(1..=16).contains(&merge) {
        return Err(format!(
            "patch_size is {patch} and merge_size {merge}: they must be 1 to 256 and 1 to 16"
        ));
    }
    Ok(Geometry { patch, merge, min_pixels, max_pixels })
}

fn normalisation(settings: &Preprocessor) -> Result<Normalisation, String> {
    let (mean, std) = match settings.do_normalize {
        Some(false) => ([0.0; 3], [1.0; 3]),
        _ => (settings.image_mean.unwrap_or(OPENAI_CLIP_MEAN), settings.image_std.unwrap_or(OPENAI_CLIP_STD)),
    };
    let rescale = match settings.do_rescale {
        Some(false) => 1.0,
        _ => settings.rescale_factor.unwrap_or(1.0 / 255.0),
    };
    let usable = |v: f32| v.is_finite() && v > 0.0;
    if !mean.iter().all(|m| m.is_finite()) || !std.iter().all(|&s| usable(s)) || !usable(rescale) {
        return Err(format!(
            "image_mean {mean:?}, image_std {std:?}, rescale_factor {rescale}: all must be finite, the last two \
             above 0"
        ));
    }
    Ok(Normalisation { mean, std, rescale })
}

/// The vision tower must read the patches that the preprocessor cuts.
fn agree(
    file: &str,
    settings: &Preprocessor,
    geometry: &Geometry,
    vision: &VisionFile,
    default_patch: usize,
) -> Result<(), CheckpointError> {
    let temporal = settings.temporal_patch_size.unwrap_or(DEFAULT_TEMPORAL);
    let pairs = [
        ("patch_size", geometry.patch, "patch_size", vision.patch_size.unwrap_or(default_patch)),
        (
            "merge_size",
            geometry.merge,
            "spatial_merge_size",
            vision.spatial_merge_size.unwrap_or(DEFAULT_MERGE),
        ),
        (
            "temporal_patch_size",
            temporal,
            "temporal_patch_size",
            vision.temporal_patch_size.unwrap_or(DEFAULT_TEMPORAL),
        ),
    ];
    for (ours, value, theirs, expected) in pairs {
        if value != expected {
            return Err(CheckpointError::invalid(
                file,
                format!(
                    "{ours} is {value}, but {MODEL} has vision_config.{theirs} {expected}: they must agree"
                ),
            ));
        }
    }
    Ok(())
}
