//! What `config.json`, `preprocessor_config.json` and `reward_config.json` say of pictures.

use std::fmt;

use serde_json::{Map, Value};

use super::image::Geometry;
use crate::model::Normalisation;
use crate::model::backbone::Config;
use crate::model::checkpoint::python_json::{is_falsy, number, one_of, quote, whole};
use crate::model::checkpoint::{CheckpointError, CheckpointFiles};
use crate::model::profile::RewardConfig;

const MODEL: &str = "config.json";
const PREPROCESSOR: &str = "preprocessor_config.json";
/// Holds the preprocessor's settings under `image_processor` since transformers 5.
const PROCESSOR: &str = "processor_config.json";
const REWARD: &str = "reward_config.json";

/// The reference's image processor, by all its names.
const CLASSES: [&str; 3] = ["Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil"];

/// The bicubic filter's number in PIL, and so in `preprocessor_config.json`.
const BICUBIC: u64 = 3;

// What the reference takes where a key is absent: `Qwen2VLImageProcessor`.
const DEFAULT_PATCH: u64 = 14;
const DEFAULT_MERGE: u64 = 2;
const DEFAULT_TEMPORAL: u64 = 2;
const DEFAULT_MIN_PIXELS: u64 = 56 * 56;
const DEFAULT_MAX_PIXELS: u64 = 28 * 28 * 1280;
const OPENAI_CLIP_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
const OPENAI_CLIP_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// The most visual tokens that the least number of pixels may make of every picture: eight times what the published
/// models were made for.
const MOST_VISUAL_TOKENS: u64 = 1 << 20;

/// What a checkpoint says of pictures.
pub(super) struct PictureConfig {
    pub geometry: Geometry,
    pub normalisation: Normalisation,
    pub image_token_id: u32,
}

/// The settings of the image processor. As in the reference, a key that is absent means the class's default, and null is
/// a value like another.
struct Settings {
    /// The file they stand in.
    file: &'static str,
    keys: Map<String, Value>,
}

impl PictureConfig {
    /// Reads what the checkpoint says of pictures and refuses what this processor does not do.
    pub fn load(files: &CheckpointFiles, reward: &RewardConfig) -> Result<Self, CheckpointError> {
        let model = Config::from_json(&files.require_json::<Value>(MODEL)?)
            .map_err(|reason| CheckpointError::invalid(MODEL, reason))?;
        let settings = Settings::read(files)?;
        let refuse = |reason: String| CheckpointError::invalid(settings.file, reason);
        settings.check_steps().map_err(refuse)?;
        let [patch, merge] = settings.patches(&model).map_err(refuse)?;
        let (least, most) = settings.limits(reward)?;
        if least.pixels > most.pixels {
            return Err(CheckpointError::invalid(
                least.file,
                format!("{least} is more than {most}: the least must be at most the greatest"),
            ));
        }
        if least.pixels / (patch * merge).pow(2) as u64 > MOST_VISUAL_TOKENS {
            return Err(CheckpointError::invalid(
                least.file,
                format!("{least} are more than {MOST_VISUAL_TOKENS} visual tokens for every picture"),
            ));
        }
        Ok(Self {
            geometry: Geometry {
                patch,
                merge,
                min_pixels: least.pixels,
                max_pixels: most.pixels,
                first: reward.first_resize,
            },
            normalisation: settings.normalisation().map_err(refuse)?,
            image_token_id: model.image_token_id,
        })
    }
}

/// How many pixels a picture has at least, or at most, and where that is said.
struct Limit {
    pixels: u64,
    key: &'static str,
    file: &'static str,
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} of {}", self.key, self.pixels, self.file)
    }
}

impl Limit {
    fn read(value: &Value, key: &'static str, file: &'static str) -> Result<Self, CheckpointError> {
        match whole(value) {
            Some(pixels) if pixels > 0 => Ok(Self { pixels, key, file }),
            _ => {
                let reason = format!("{key} is {}, must be a whole number of pixels above 0", quote(value));
                Err(CheckpointError::invalid(file, reason))
            }
        }
    }
}

impl Settings {
    /// The nested form wins, as in the reference's `ImageProcessingMixin.get_image_processor_dict`.
    fn read(files: &CheckpointFiles) -> Result<Self, CheckpointError> {
        let nested = files
            .json::<Value>(PROCESSOR)?
            .and_then(|mut file| file.get_mut("image_processor").map(Value::take));
        let (file, settings) = match nested {
            Some(nested) if !nested.is_null() => (PROCESSOR, nested),
            _ => (PREPROCESSOR, files.require_json(PREPROCESSOR)?),
        };
        match settings {
            Value::Object(keys) => Ok(Self { file, keys }),
            other => Err(CheckpointError::invalid(
                file,
                format!("the image processor's settings are {}, must be an object", quote(&other)),
            )),
        }
    }

    /// Whether a step is done.
    fn does(&self, key: &str) -> bool {
        self.keys.get(key).is_none_or(|value| !is_falsy(value))
    }

    fn check_steps(&self) -> Result<(), String> {
        if let Some(class) = self.keys.get("image_processor_type").filter(|value| !value.is_null())
            && class.as_str().is_none_or(|class| !CLASSES.contains(&class))
        {
            let supported = one_of(&CLASSES);
            return Err(format!(
                "image_processor_type is {}, must be {supported}: others are not supported",
                quote(class)
            ));
        }
        if !self.does("do_resize") {
            return Err("do_resize is false: pictures are always resized to whole patches".into());
        }
        let is_set = |key| self.keys.get(key).is_some_and(|value| !is_falsy(value));
        if is_set("do_center_crop") && !is_set("crop_size") {
            return Err(
                "do_center_crop without crop_size, which the reference refuses though it crops nothing"
                    .into(),
            );
        }
        match self.keys.get("resample") {
            Some(other) if other.as_u64() != Some(BICUBIC) => {
                Err(format!("resample is {}: only {BICUBIC} (bicubic) is supported", quote(other)))
            }
            _ => Ok(()),
        }
    }

    /// The sides of a patch in pixels and of a visual token in patches, which the vision tower must read as they are cut.
    fn patches(&self, model: &Config) -> Result<[usize; 2], String> {
        let vision = &model.vision;
        let sides = [
            ("patch_size", DEFAULT_PATCH, "patch_size", vision.patch_size),
            ("merge_size", DEFAULT_MERGE, "spatial_merge_size", vision.spatial_merge_size),
            ("temporal_patch_size", DEFAULT_TEMPORAL, "temporal_patch_size", vision.temporal_patch_size),
        ];
        for (key, default, theirs, expected) in sides {
            let ours = self.keys.get(key).cloned().unwrap_or_else(|| default.into());
            if ours.as_i64() != Some(expected) {
                return Err(format!(
                    "{key} is {}, but {MODEL} has vision_config.{theirs} {expected}: they must agree",
                    quote(&ours)
                ));
            }
        }
        Ok([vision.patch_size as usize, vision.spatial_merge_size as usize])
    }

    /// `min_pixels` and `max_pixels` win over `size`, as in the reference, and `reward_config.json` over both.
    fn limits(&self, reward: &RewardConfig) -> Result<(Limit, Limit), CheckpointError> {
        let said = |key| self.keys.get(key).filter(|value| !value.is_null());
        let mut size = match said("size") {
            None => Map::from_iter([
                ("shortest_edge".to_owned(), DEFAULT_MIN_PIXELS.into()),
                ("longest_edge".to_owned(), DEFAULT_MAX_PIXELS.into()),
            ]),
            Some(Value::Object(size)) => size.clone(),
            Some(other) => return Err(self.wrong_size(other)),
        };
        let mut limit = |key: &'static str, edge: &'static str, ours: Option<u64>| {
            let theirs = size.remove(edge);
            // The older names within `size` give way to the same names beside it, and are no others' there.
            let theirs = match said(key) {
                Some(value) => {
                    size.remove(key);
                    Some(Limit::read(value, key, self.file))
                }
                None => theirs.map(|value| Limit::read(&value, edge, self.file)),
            };
            match ours {
                Some(pixels) => Some(Limit::read(&pixels.into(), key, REWARD)),
                None => theirs,
            }
            .transpose()
        };
        let least = limit("min_pixels", "shortest_edge", reward.min_pixels)?;
        let most = limit("max_pixels", "longest_edge", reward.max_pixels)?;
        match (least, most) {
            (Some(least), Some(most)) if size.is_empty() => Ok((least, most)),
            _ => Err(self.wrong_size(said("size").unwrap_or(&Value::Null))),
        }
    }

    fn wrong_size(&self, said: &Value) -> CheckpointError {
        let reason = format!(
            "size is {}, must have shortest_edge and longest_edge alone, in pixels of the whole picture",
            quote(said)
        );
        CheckpointError::invalid(self.file, reason)
    }

    fn normalisation(&self) -> Result<Normalisation, String> {
        let (mean, std) = match self.does("do_normalize") {
            false => ([0.0; 3], [1.0; 3]),
            true => {
                (self.channels("image_mean", OPENAI_CLIP_MEAN)?, self.channels("image_std", OPENAI_CLIP_STD)?)
            }
        };
        let rescale = match self.keys.get("rescale_factor") {
            _ if !self.does("do_rescale") => 1.0,
            None => 1.0 / 255.0,
            Some(said) => number(said)
                .ok_or_else(|| format!("rescale_factor is {}, must be a number", quote(said)))?
                as f32,
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

    /// A number for each of red, green and blue, or one for all.
    fn channels(&self, key: &str, default: [f32; 3]) -> Result<[f32; 3], String> {
        let Some(said) = self.keys.get(key) else { return Ok(default) };
        let wrong = || format!("{key} is {}, must be a number or three", quote(said));
        if let Some(all) = number(said) {
            return Ok([all as f32; 3]);
        }
        let list = said.as_array().ok_or_else(wrong)?;
        let numbers: Option<Vec<f32>> = list.iter().map(|v| Some(number(v)? as f32)).collect();
        numbers.and_then(|numbers| numbers.try_into().ok()).ok_or_else(wrong)
    }
}
