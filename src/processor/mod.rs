//! A prompt and a picture to what the model reads: the twin of the Hugging Face processor.
//!
//! Two steps, so that work is refused before it is done: [`Processor::admit`] reads headers and tokenises, and
//! says what the item will cost; [`Processor::prepare`] decodes, resizes and cuts. Both are plain functions of
//! the CPU, to be run on a pool.

mod chat_template;
mod config;
mod decode;
mod footprint;
mod image;
mod jinja;
mod prompt;
mod resample;
mod tokenizer;

use std::fmt;

use bytes::Bytes;

pub use self::image::{SizeError, smart_resize};

use self::config::PictureConfig;
use self::decode::{Format, Header};
use self::footprint::footprint;
use self::image::Geometry;
use self::prompt::PromptEncoder;
use self::resample::Rgb;
use crate::config::Limits;
use crate::error::ScoreError;
use crate::model::checkpoint::{CheckpointError, CheckpointFiles, RewardConfig};
use crate::model::{Normalisation, Patches, Sample};

/// The field of an item that holds its prompt.
const PROMPT: &str = "prompt";
/// The field of an item that holds an encoded picture.
const ENCODED: &str = "image.encoded";
/// The field of an item that holds raw pixels.
const RAW: &str = "image.raw";
/// The field of an item that holds the pictures before the one that is judged.
const REFERENCES: &str = "references";

/// What an item may cost. Checked before anything of that size is allocated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessorLimits {
    /// The longest prompt, in bytes of UTF-8.
    pub max_prompt_bytes: usize,
    /// The largest picture as it is sent: width times height, in pixels.
    pub max_image_pixels: u64,
    /// The most tokens of one item, text and visual tokens together.
    pub max_item_tokens: usize,
    /// The most tokens of one item's text, the conversation around the prompt included.
    pub max_prompt_tokens: usize,
    /// The most bytes of an encoded picture.
    pub max_image_bytes: usize,
}

impl ProcessorLimits {
    /// Whatever can be computed.
    pub const NONE: Self = Self {
        max_prompt_bytes: usize::MAX,
        max_image_pixels: u64::MAX,
        max_item_tokens: usize::MAX,
        max_prompt_tokens: usize::MAX,
        max_image_bytes: usize::MAX,
    };
}

impl From<&Limits> for ProcessorLimits {
    fn from(limits: &Limits) -> Self {
        Self {
            max_prompt_bytes: limits.max_prompt_bytes,
            max_image_pixels: limits.max_image_pixels,
            max_item_tokens: limits.max_item_tokens,
            max_prompt_tokens: limits.max_prompt_tokens,
            max_image_bytes: limits.max_image_bytes,
        }
    }
}

/// A picture as a caller sends it.
#[derive(Clone)]
pub enum Picture {
    /// A PNG, JPEG or WebP file, told apart by its first bytes.
    Encoded(Bytes),
    /// Raw pixels.
    Raw {
        /// In pixels.
        width: u32,
        /// In pixels.
        height: u32,
        /// `[height, width, 3]` bytes: red, green, blue.
        rgb8: Bytes,
    },
}

/// An item whose prompt is tokenised and whose pictures are still as they were sent.
pub struct Draft {
    input_ids: Vec<u32>,
    sources: Vec<Source>,
    memory: usize,
}

impl Draft {
    /// How many of the item's tokens have this id.
    pub fn count(&self, id: u32) -> usize {
        self.input_ids.iter().filter(|&&other| other == id).count()
    }

    /// What the item costs: text and visual tokens together, exactly as in the [`Sample`] to come.
    pub fn tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// The most bytes that [`Processor::prepare`] holds at once while it decodes the pictures, by the file's header; 0
    /// for raw pixels, which are there already.
    pub fn decoding_memory(&self) -> u64 {
        self.sources.iter().map(|source| source.memory).sum()
    }

    /// The most bytes that [`Processor::prepare`] holds at once, resizing included, beside the picture as it was sent.
    pub fn memory(&self) -> usize {
        self.memory
    }

    /// Feeds `hasher` all that the item's score depends on, beside the model: the conversation's tokens and the
    /// pictures as they were sent.
    pub fn digest_into(&self, hasher: &mut blake3::Hasher) {
        hasher.update(&(self.input_ids.len() as u64).to_le_bytes());
        for id in &self.input_ids {
            hasher.update(&id.to_le_bytes());
        }
        for Source { width, height, bytes, format, .. } in &self.sources {
            hasher.update(&[u8::from(format.is_some())]).update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(&width.to_le_bytes()).update(&height.to_le_bytes()).update(bytes);
        }
    }
}

/// Without what the caller sent, so that it never reaches a log.
impl fmt::Debug for Draft {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Draft").field("tokens", &self.tokens()).finish_non_exhaustive()
    }
}

/// A picture whose size is known and within the limits.
struct Source {
    width: u32,
    height: u32,
    bytes: Bytes,
    /// `None` for raw pixels.
    format: Option<Format>,
    /// Bytes that decoding holds.
    memory: u64,
    place: Place,
}

/// Which of an item's pictures.
#[derive(Clone, Copy)]
enum Place {
    /// The one that is judged.
    Judged,
    /// The one of this index among those before it.
    Reference(usize),
}

impl Place {
    /// A picture that can never be scored, and why.
    fn refuse(self, encoded: bool, reason: impl fmt::Display) -> ScoreError {
        match self {
            Self::Judged => ScoreError::invalid(if encoded { ENCODED } else { RAW }, reason.to_string()),
            Self::Reference(index) => ScoreError::invalid(REFERENCES, format!("[{index}]: {reason}")),
        }
    }
}

impl Source {
    fn refuse(&self, reason: impl fmt::Display) -> ScoreError {
        self.place.refuse(self.format.is_some(), reason)
    }
}

/// Turns prompts and pictures into samples, as the Hugging Face processor of the same checkpoint does.
pub struct Processor {
    prompts: PromptEncoder,
    geometry: Geometry,
    normalisation: Normalisation,
    limits: ProcessorLimits,
}

impl Processor {
    /// Reads tokenizer, chat template and preprocessor settings.
    ///
    /// # Errors
    ///
    /// A file that is missing or says something that cannot be served, with its name and the reason: see
    /// [`CheckpointError`].
    pub fn load(
        files: &CheckpointFiles,
        reward: &RewardConfig,
        limits: ProcessorLimits,
    ) -> Result<Self, CheckpointError> {
        let pictures = PictureConfig::load(files, reward)?;
        Ok(Self {
            prompts: PromptEncoder::load(files, reward, pictures.image_token_id)?,
            geometry: pictures.geometry,
            normalisation: pictures.normalisation,
            limits,
        })
    }

    /// The same for a model of so many rows of vocabulary, if that is known.
    ///
    /// # Errors
    ///
    /// The conversation or plain text has tokens that the model has no row for. Prompts that bring in other such
    /// tokens are refused when they come.
    pub fn with_vocabulary(mut self, rows: Option<u32>) -> Result<Self, CheckpointError> {
        if let Some(rows) = rows {
            self.prompts.limit_vocabulary(rows)?;
        }
        Ok(self)
    }

    /// How the model is to turn a [`Sample`]'s bytes into numbers.
    pub fn normalisation(&self) -> Normalisation {
        self.normalisation
    }

    /// How many pictures an item has.
    pub fn pictures(&self) -> usize {
        self.prompts.pictures
    }

    /// As [`Processor::admit_all`], for a model that reads one picture.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn admit(&self, prompt: &str, picture: Picture) -> Result<Draft, ScoreError> {
        self.admit_all(prompt, vec![picture])
    }

    /// Checks an item and says what it costs, without decoding its pictures: as many as the model reads, the one that is
    /// judged last.
    ///
    /// # Errors
    ///
    /// [`ScoreError::Invalid`] for a prompt or pictures that can never be scored.
    pub fn admit_all(&self, prompt: &str, pictures: Vec<Picture>) -> Result<Draft, ScoreError> {
        self.check_prompt(prompt)?;
        let (given, wanted) = (pictures.len(), self.pictures());
        if given != wanted {
            return Err(ScoreError::invalid(
                REFERENCES,
                format!("the model reads {wanted} pictures, the judged one among them; the item has {given}"),
            ));
        }
        let place = |index| if index + 1 == given { Place::Judged } else { Place::Reference(index) };
        let sources = pictures.into_iter().enumerate().map(|(n, picture)| self.inspect(picture, place(n)));
        let sources = sources.collect::<Result<Vec<_>, _>>()?;
        let costs = sources.iter().map(|source| self.visual_tokens(source)).collect::<Result<Vec<_>, _>>()?;
        let limit = self.limits.max_item_tokens;
        let visual_tokens = costs.iter().fold(0, |sum: usize, &cost| sum.saturating_add(cost));
        if visual_tokens > limit {
            return Err(ScoreError::invalid(
                REFERENCES,
                format!("the pictures are {visual_tokens} tokens; an item may have {limit}"),
            ));
        }
        let input_ids = self.prompts.encode(prompt, &costs)?;
        let (text_tokens, most_text) = (input_ids.len() - visual_tokens, self.limits.max_prompt_tokens);
        if text_tokens > most_text {
            return Err(ScoreError::invalid(
                PROMPT,
                format!("the item's text has {text_tokens} tokens; it may have {most_text}"),
            ));
        }
        if input_ids.len() > limit {
            return Err(ScoreError::invalid(
                PROMPT,
                format!(
                    "the item has {} tokens, {visual_tokens} of them the picture's; it may have {limit}",
                    input_ids.len()
                ),
            ));
        }
        let memory = sources.iter().map(|source| self.memory(source)).sum::<Result<usize, _>>()?;
        Ok(Draft { input_ids, sources, memory })
    }

    /// What a picture is resized to. One that EXIF turns on its side costs the same: the two sides only change places.
    fn resized(&self, source: &Source) -> Result<(u64, u64), ScoreError> {
        self.geometry.resized((source.width, source.height)).map_err(|e| source.refuse(e))
    }

    /// The bytes that preparing a picture takes.
    fn memory(&self, source: &Source) -> Result<usize, ScoreError> {
        let (width, height) = self.resized(source)?;
        Ok(footprint(source.memory, u64::from(source.width) * u64::from(source.height), width * height))
    }

    /// The visual tokens of a picture.
    fn visual_tokens(&self, source: &Source) -> Result<usize, ScoreError> {
        let size = self.resized(source)?;
        let limit = self.limits.max_item_tokens;
        let tokens =
            usize::try_from(self.geometry.visual_tokens(size)).ok().filter(|&tokens| tokens <= limit);
        tokens.ok_or_else(|| {
            source.refuse(format!("the picture alone is more than the {limit} tokens that an item may have"))
        })
    }

    /// Decodes, turns, resizes and cuts the pictures.
    ///
    /// # Errors
    ///
    /// [`ScoreError::Invalid`] for a picture that is truncated or corrupt.
    pub fn prepare(&self, draft: Draft) -> Result<Sample, ScoreError> {
        let Draft { input_ids, sources, .. } = draft;
        let pictures = sources.into_iter().map(|source| self.patches(source)).collect::<Result<_, _>>()?;
        Ok(Sample { input_ids, pictures })
    }

    fn patches(&self, source: Source) -> Result<Patches, ScoreError> {
        let Source { width, height, bytes, format, place, .. } = source;
        let encoded = format.is_some();
        let refuse = |reason: String| place.refuse(encoded, reason);
        let picture = match format {
            Some(format) => format.decode(&bytes, (width, height)).map_err(refuse)?,
            None => Rgb { width, height, pixels: bytes },
        };
        self.geometry.patches(&picture).map_err(refuse)
    }

    fn check_prompt(&self, prompt: &str) -> Result<(), ScoreError> {
        let limit = self.limits.max_prompt_bytes;
        match prompt.len() {
            0 => Err(ScoreError::invalid(PROMPT, "it is empty; say what the picture should show")),
            length if length > limit => Err(ScoreError::invalid(
                PROMPT,
                format!("it has {length} bytes of UTF-8; it may have {limit}"),
            )),
            _ => Ok(()),
        }
    }

    /// Finds the picture's size and holds it against the limit.
    fn inspect(&self, picture: Picture, place: Place) -> Result<Source, ScoreError> {
        let source = match picture {
            Picture::Encoded(bytes) => {
                let refuse = |reason| place.refuse(true, reason);
                let (held, limit) = (bytes.len(), self.limits.max_image_bytes);
                if held > limit {
                    return Err(refuse(format!("the file has {held} bytes; it may have {limit}")));
                }
                let format = Format::detect(&bytes).map_err(refuse)?;
                let Header { width, height, memory } = format.header(&bytes).map_err(refuse)?;
                Source { width, height, bytes, format: Some(format), memory, place }
            }
            Picture::Raw { width, height, rgb8 } => {
                Source { width, height, bytes: rgb8, format: None, memory: 0, place }
            }
        };
        let (width, height) = (source.width, source.height);
        let (pixels, limit) = (u64::from(width) * u64::from(height), self.limits.max_image_pixels);
        if pixels > limit {
            return Err(source
                .refuse(format!("the picture is {width} x {height}, {pixels} pixels; it may have {limit}")));
        }
        let (held, expected) = (source.bytes.len() as u64, u128::from(pixels) * 3);
        if source.format.is_none() && u128::from(held) != expected {
            return Err(source
                .refuse(format!("{width} x {height} pixels of RGB are {expected} bytes; there are {held}")));
        }
        Ok(source)
    }
}
