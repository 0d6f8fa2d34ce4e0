//! `reward_config.json`: what a checkpoint says of its reward, beyond what `config.json` can say.

use serde::{Deserialize, Serialize};

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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_pixels: Option<u64>,
    /// The greatest number of pixels that a picture is resized to. Absent: `preprocessor_config.json` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
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
