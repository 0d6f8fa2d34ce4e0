//! `reward_config.json`: what a checkpoint says of its reward, beyond what `config.json` can say.

use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::Value;

use super::python_json::{quote, whole};
use super::{CheckpointError, CheckpointFiles};

const FILE: &str = "reward_config.json";
/// The most pixels of a picture that may be asked for.
const MAX_PIXELS: u64 = 1 << 32;

/// `reward_config.json` of a checkpoint.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RewardConfig {
    /// The text of the user turn that follows the picture; `{prompt}` stands where the caller's prompt goes.
    pub instruction: String,
    /// The token whose hidden state the head reads.
    pub reward_token: RewardToken,
    /// The text of that token, where `reward_token` is `special`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub special_token: Option<String>,
    /// How the decoder numbers the tokens.
    pub positions: Positions,
    /// The least number of pixels that a picture is resized to. Absent: `preprocessor_config.json` says.
    #[serde(default, deserialize_with = "pixels", skip_serializing_if = "Option::is_none")]
    pub min_pixels: Option<u64>,
    /// The greatest number of pixels that a picture is resized to. Absent: `preprocessor_config.json` says.
    #[serde(default, deserialize_with = "pixels", skip_serializing_if = "Option::is_none")]
    pub max_pixels: Option<u64>,
    /// What the head's columns mean.
    pub output: Output,
    /// How many pictures the conversation shows before its text: references first, then that which is judged.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub pictures: usize,
    /// What the checkpoint's makers want its callers to know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice: Option<String>,
}

impl RewardConfig {
    /// Reads a checkpoint's `reward_config.json`.
    ///
    /// # Errors
    /// It is missing, says what nobody knows, or asks for more than can be meant.
    pub fn load(files: &CheckpointFiles) -> Result<Self, CheckpointError> {
        let config: Self = files.require_json(FILE)?;
        config.check().map_err(|reason| CheckpointError::invalid(FILE, reason))?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        for (key, pixels) in [("min_pixels", self.min_pixels), ("max_pixels", self.max_pixels)] {
            if let Some(pixels) = pixels.filter(|pixels| !(1..=MAX_PIXELS).contains(pixels)) {
                return Err(format!("{key} is {pixels}, must be 1 to {MAX_PIXELS}"));
            }
        }
        Ok(())
    }
}

/// A number of pixels, which Python's programs may write as a float.
fn pixels<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    let wrong = |value: &Value| {
        de::Error::custom(format!("a number of pixels is {}, must be whole and at least 0", quote(value)))
    };
    match Value::deserialize(deserializer)? {
        Value::Null => Ok(None),
        value => whole(&value).map(Some).ok_or_else(|| wrong(&value)),
    }
}

fn one() -> usize {
    1
}

fn is_one(pictures: &usize) -> bool {
    *pictures == 1
}

/// The token whose hidden state the head reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardToken {
    /// `special_token`, which stands once in the instruction.
    Special,
    /// The last token of the rendered conversation, the generation prompt included.
    Last,
}

/// How the decoder numbers the tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Positions {
    /// The multimodal grid: the reference's `get_rope_index`.
    Mrope,
    /// 0, 1, 2, … on all three axes, as trainers do that pass `inputs_embeds` alone.
    Flat,
}

/// What the head's columns mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Output {
    /// Column 0 is the mean, column 1 the logarithm of the standard deviation.
    Gaussian,
    /// Column 0 is the reward.
    Scalar,
}
