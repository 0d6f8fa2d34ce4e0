//! What a reward is: how a score is read from a checkpoint. `reward_config.json` says it, or a profile that ships.

mod answers;
mod pixels;
mod shipped;

use serde::{Deserialize, Serialize};

pub use answers::Answers;
pub use shipped::{names, open, shipped};

use super::checkpoint::{CheckpointError, CheckpointFiles};
use pixels::{check_pixels, pixels};

/// The file of a checkpoint that says how its reward is read.
pub const FILE: &str = "reward_config.json";
/// The most passes, which each cost a reading.
const MOST_PASSES: usize = 16;

/// `reward_config.json` of a checkpoint, or a profile.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct RewardConfig {
    /// The text of the user turn that follows the pictures; `{prompt}` stands where the caller's prompt goes.
    pub instruction: String,
    /// The token whose hidden state is read.
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
    /// A resize before the processor's own, where the reference makes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_resize: Option<FirstResize>,
    /// What is read: the columns of a head, or the probability of answers.
    pub output: Output,
    /// How many pictures the conversation shows before its text: references first, then that which is judged.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub pictures: usize,
    /// The head's key; absent: `rm_head`. For outputs of a head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<String>,
    /// Which of the head's columns are read; absent: the first, or the first two, of a head that has no other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Columns>,
    /// Brings the head's numbers to another scale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub norm: Option<Norm>,
    /// The answers whose probability is read. For `output` `probability`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answers: Option<Answers>,
    /// Whether a probability is given as it is, or as its logit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<Scale>,
    /// What the reference's `generate` divides the logits of the conversation's own tokens by, where they are above 0,
    /// or else multiplies them by; absent: 1, which is nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repetition_penalty: Option<f64>,
    /// How the probabilities of an item's questions become its score; absent: by their mean.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub questions: Option<Average>,
    /// The readings of an item, where it has several; what one does not say is as above.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub passes: Vec<PassConfig>,
    /// How the passes become one score.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fusion: Option<Fusion>,
    /// The checkpoint whose configuration, tokenizer, processor and template stand for what this one lacks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<String>,
    /// Special tokens that are added to the tokenizer where it lacks them, in this order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub added_tokens: Vec<String>,
    /// Where all this is from: the reference's source and commit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// What the checkpoint's makers want its callers to know.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub notice: Option<String>,
}

/// One of several passes, as far as it differs.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct PassConfig {
    /// The name of its component.
    pub name: String,
    /// As of [`RewardConfig`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instruction: Option<String>,
    /// As of [`RewardConfig`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub special_token: Option<String>,
    /// As of [`RewardConfig`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<String>,
    /// As of [`RewardConfig`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub columns: Option<Columns>,
    /// As of [`RewardConfig`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub norm: Option<Norm>,
}

/// A reading, with all that it takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pass<'a> {
    /// As of [`RewardConfig`].
    pub instruction: &'a str,
    /// As of [`RewardConfig`].
    pub special_token: Option<&'a str>,
    /// As of [`RewardConfig`].
    pub head: &'a str,
    /// As of [`RewardConfig`].
    pub columns: Option<Columns>,
    /// As of [`RewardConfig`].
    pub norm: Norm,
}

impl RewardConfig {
    /// Reads a checkpoint's `reward_config.json`, or what stands for it.
    ///
    /// # Errors
    /// It is missing, says what nobody knows, or asks for more than can be meant.
    pub fn load(files: &CheckpointFiles) -> Result<Self, CheckpointError> {
        let Some(config) = files.json::<Self>(FILE)? else { return Err(shipped::missing(files)) };
        config.check().map_err(|reason| CheckpointError::invalid(FILE, reason))?;
        Ok(config)
    }

    /// The plainest: this instruction, read at the last token, positions of the grid.
    pub fn plain(instruction: &str, output: Output) -> Self {
        Self {
            instruction: instruction.to_owned(),
            reward_token: RewardToken::Last,
            special_token: None,
            positions: Positions::Mrope,
            min_pixels: None,
            max_pixels: None,
            first_resize: None,
            output,
            pictures: 1,
            head: None,
            columns: None,
            norm: None,
            answers: None,
            scale: None,
            repetition_penalty: None,
            questions: None,
            passes: Vec::new(),
            fusion: None,
            base: None,
            added_tokens: Vec::new(),
            source: None,
            notice: None,
        }
    }

    /// The readings of an item, in order; at least one.
    pub fn passes(&self) -> Vec<Pass<'_>> {
        let whole = Pass {
            instruction: &self.instruction,
            special_token: self.special_token.as_deref(),
            head: self.head.as_deref().unwrap_or("rm_head"),
            columns: self.columns,
            norm: self.norm.unwrap_or_default(),
        };
        if self.passes.is_empty() {
            return vec![whole];
        }
        let passes = self.passes.iter().map(|pass| Pass {
            instruction: pass.instruction.as_deref().unwrap_or(whole.instruction),
            special_token: pass.special_token.as_deref().or(whole.special_token),
            head: pass.head.as_deref().unwrap_or(whole.head),
            columns: pass.columns.or(whole.columns),
            norm: pass.norm.unwrap_or(whole.norm),
        });
        passes.collect()
    }

    /// The names of a score's components, one for each of several passes.
    pub fn components(&self) -> Vec<String> {
        self.passes.iter().map(|pass| pass.name.clone()).collect()
    }

    /// Whether an item may ask questions of its own: where answers' probability is read once.
    pub fn takes_questions(&self) -> bool {
        self.output == Output::Probability && self.passes.is_empty() && self.scale != Some(Scale::Logit)
    }

    /// Whether the output layer is read.
    pub fn reads_answers(&self) -> bool {
        self.output == Output::Probability
    }

    /// Whether it says what can be meant together.
    ///
    /// # Errors
    /// What does not go together, and what would be right.
    pub fn check(&self) -> Result<(), String> {
        for (key, pixels) in [("min_pixels", self.min_pixels), ("max_pixels", self.max_pixels)] {
            pixels.map_or(Ok(()), |pixels| check_pixels(key, pixels))?;
        }
        if let Some(first) = &self.first_resize {
            let FirstResize { min_pixels: min, max_pixels: max, .. } = *first;
            check_pixels("first_resize.min_pixels", min)?;
            check_pixels("first_resize.max_pixels", max)?;
            if min > max {
                return Err(format!(
                    "first_resize.min_pixels is {min} and max_pixels {max}, must be at least as many"
                ));
            }
            if !(1..=1024).contains(&first.factor) {
                return Err(format!("first_resize.factor is {}, must be 1 to 1024", first.factor));
            }
        }
        let (count, answers) = (self.passes.len(), self.reads_answers());
        if count == 1 || count > MOST_PASSES {
            return Err(format!(
                "there is {count} in passes, must be 2 to {MOST_PASSES}, or none for a single one"
            ));
        }
        for (key, said, wanted) in
            [("answers", self.answers.is_some(), answers), ("fusion", self.fusion.is_some(), count > 0)]
        {
            match (said, wanted) {
                (false, true) => return Err(format!("{key} is missing, which this output needs")),
                (true, false) => {
                    return Err(format!("{key} is said, but there is nothing that it could be of"));
                }
                _ => {}
            }
        }
        let of_answers = [
            ("scale", self.scale.is_some()),
            ("repetition_penalty", self.repetition_penalty.is_some()),
            ("questions", self.questions.is_some()),
        ];
        let of_heads = [
            ("head", self.head.is_some() || self.passes.iter().any(|pass| pass.head.is_some())),
            ("columns", self.columns.is_some() || self.passes.iter().any(|pass| pass.columns.is_some())),
            ("norm", self.norm.is_some() || self.passes.iter().any(|pass| pass.norm.is_some())),
            ("passes", count > 0),
        ];
        let (strange, other) = if answers { (&of_heads[..], "a head") } else { (&of_answers[..], "answers") };
        if let Some((key, _)) = strange.iter().find(|(_, said)| *said) {
            return Err(format!("{key} is said, which is of {other}, and output is {:?}", self.output));
        }
        if self.questions.is_some() && self.scale == Some(Scale::Logit) {
            return Err("questions is said, which averages probabilities, and scale is \"logit\"".into());
        }
        if let Some(penalty) =
            self.repetition_penalty.filter(|penalty| !(penalty.is_finite() && *penalty > 0.0))
        {
            return Err(format!("repetition_penalty is {penalty}, must be a number above 0"));
        }
        for pass in self.passes() {
            pass.check(self.output)?;
        }
        if let Some(answers) = &self.answers {
            answers.check()?;
        }
        let names: std::collections::BTreeSet<_> = self.passes.iter().map(|pass| &pass.name).collect();
        if names.len() < count || names.iter().any(|name| name.is_empty()) {
            return Err("the passes must each have a name of its own".into());
        }
        Ok(())
    }
}

impl Pass<'_> {
    fn check(&self, output: Output) -> Result<(), String> {
        let Norm { mean, std } = self.norm;
        if !(mean.is_finite() && std.is_finite() && std > 0.0) {
            return Err(format!("norm has mean {mean} and std {std}; both must be finite, std above 0"));
        }
        if let Some(Columns { mean, log_sigma }) = self.columns
            && (log_sigma.is_some() != (output == Output::Gaussian) || log_sigma == Some(mean))
        {
            return Err(
                "columns must say mean, and where output is \"gaussian\" log_sigma, another one".into()
            );
        }
        Ok(())
    }
}

fn one() -> usize {
    1
}

fn is_one(pictures: &usize) -> bool {
    *pictures == 1
}

/// The token whose hidden state is read.
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

/// What is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Output {
    /// A head's column 0 is the mean, column 1 the logarithm of the standard deviation.
    Gaussian,
    /// A head's column 0 is the reward.
    Scalar,
    /// The probability of answers, as the output layer (`lm_head`) gives it.
    Probability,
}

/// Columns of a head, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Columns {
    /// The reward's mean.
    pub mean: u32,
    /// The logarithm of its standard deviation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_sigma: Option<u32>,
}

/// `(x − mean) / std` of a head's number.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Norm {
    /// In the head's unit.
    pub mean: f64,
    /// In the head's unit.
    pub std: f64,
}

impl Default for Norm {
    fn default() -> Self {
        Self { mean: 0.0, std: 1.0 }
    }
}

/// How a probability is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Scale {
    /// 0 to 1.
    Probability,
    /// `log(p / (1 − p))`, which does not saturate near 0 and 1.
    Logit,
}

/// How several probabilities become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Average {
    /// The arithmetic mean.
    Mean,
    /// The geometric mean: one that is 0 makes all 0.
    GeometricMean,
}

/// How several passes become one score.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fusion {
    /// The mean of each column, that of log sigma included.
    Mean,
    /// The least of each column, that of log sigma included.
    Min,
    /// The sum of the means; of independent Gaussians that has the root of the sum of their variances.
    Sum,
}

/// A resize before the processor's own: qwen-vl-utils' `fetch_image`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FirstResize {
    /// The sides become multiples of it, in pixels.
    pub factor: u64,
    /// The least number of pixels that a picture is resized to.
    pub min_pixels: u64,
    /// The greatest.
    pub max_pixels: u64,
}
