//! What the model reads and what it gives.

use std::fmt;

/// A picture cut into the patches that the vision tower reads.
#[derive(Debug, Clone, PartialEq)]
pub struct Patches {
    /// Patches from top to bottom; a multiple of the merge size.
    pub rows: usize,
    /// Patches from left to right; a multiple of the merge size.
    pub columns: usize,
    /// `[rows × columns, 3 × patch_size × patch_size]` bytes of RGB, not yet rescaled or normalised.
    ///
    /// Patches stand in the order of the reference's `Qwen2VLImageProcessor`: by merge block (2×2) first, blocks
    /// row by row, and within a patch channel, row, column. The reference repeats each frame along a temporal
    /// axis of two; here it stands once.
    pub pixels: Vec<u8>,
}

/// One prompt with its pictures, ready for the model.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sample {
    /// Token ids, each picture's placeholder expanded to one for each visual token, up to and including the
    /// token at which the reward is read: under causal attention nothing behind it matters. Where there are branches,
    /// what all of them begin with, all pictures among it.
    pub input_ids: Vec<u32>,
    /// The readings of one sample that differ in their ends, such as several questions about a picture; each is read at
    /// its last token. Without any, the sample is read once, at the last of `input_ids`.
    pub branches: Vec<Branch>,
    /// The pictures in the order of their placeholders; that which is judged is the last.
    pub pictures: Vec<Patches>,
}

impl Sample {
    /// What the sample costs: text and visual tokens together.
    pub fn tokens(&self) -> usize {
        self.input_ids.len() + self.branches.iter().map(|branch| branch.input_ids.len()).sum::<usize>()
    }

    /// The patches of all pictures together.
    pub fn patches(&self) -> usize {
        self.pictures.iter().map(|picture| picture.rows * picture.columns).sum()
    }
}

/// What follows a sample's common beginning in one of its readings.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Branch {
    /// Token ids, at least one.
    pub input_ids: Vec<u32>,
    /// The first tokens of the answers whose probability is read, where they are this branch's own.
    pub answers: Vec<u32>,
}

/// What the tokenizer makes of a profile's answers: the first token of each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AnswerIds {
    /// Read among the whole vocabulary.
    Any(Vec<u32>),
    /// Read against each other.
    Pair {
        /// Those whose probability is the reward.
        positive: Vec<u32>,
        /// The others.
        negative: Vec<u32>,
    },
}

/// What a model must know of the processor that makes its samples.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// How bytes become numbers.
    pub normalisation: Normalisation,
    /// The answers whose probability is read.
    pub answers: Option<AnswerIds>,
}

impl From<Normalisation> for Reading {
    fn from(normalisation: Normalisation) -> Self {
        Self { normalisation, answers: None }
    }
}

/// A reward: the Gaussian of the paper, or a scalar where the checkpoint has only that.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Score {
    /// The SpatialScore. Unbounded; no scale is canonical.
    pub mean: f32,
    /// The standard deviation, where the checkpoint gives one.
    pub stddev: Option<f32>,
    /// What the score is made of, where the sample is read several times: one for each reading, in order.
    pub components: Vec<Component>,
}

/// A part of a score.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Component {
    /// As of [`Score`].
    pub mean: f32,
    /// As of [`Score`].
    pub stddev: Option<f32>,
}

impl Score {
    /// Whether it is a reward at all: a NaN or an infinity is none.
    pub fn is_finite(&self) -> bool {
        let finite = |mean: f32, stddev: Option<f32>| mean.is_finite() && stddev.is_none_or(f32::is_finite);
        finite(self.mean, self.stddev) && self.components.iter().all(|part| finite(part.mean, part.stddev))
    }
}

impl fmt::Display for Score {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.stddev {
            Some(stddev) => write!(f, "mean {}, standard deviation {stddev}", self.mean),
            None => write!(f, "{}", self.mean),
        }
    }
}

/// How the model turns a byte of a picture into what the vision tower reads, channel by channel:
/// `(byte × rescale − mean) / std`.
///
/// The reference's `Qwen2VLImageProcessor.rescale_and_normalize`, as `preprocessor_config.json` sets it. The
/// processor leaves the bytes as they are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Normalisation {
    /// Of red, green and blue, after rescaling.
    pub mean: [f32; 3],
    /// Of red, green and blue, after rescaling.
    pub std: [f32; 3],
    /// What a byte is multiplied by: 1/255, or 1 where the checkpoint does not rescale.
    pub rescale: f32,
}
