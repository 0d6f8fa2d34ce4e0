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
mod item;
mod jinja;
mod prompt;
mod readings;
mod resample;
mod seen;
mod tokenizer;

use std::fmt;

use bytes::Bytes;

pub use self::image::{SizeError, smart_resize};
pub use self::item::{Item, Picture, Question};
pub use self::prompt::{Span, SpanKind};
pub use self::resample::Rgb;
pub use self::seen::{Seen, decoded};

use self::config::PictureConfig;
use self::decode::{Format, Header};
use self::footprint::footprint;
use self::image::Geometry;
use self::prompt::PromptEncoder;
use self::readings::answer_ids;
use crate::config::Limits;
use crate::error::ScoreError;
use crate::model::checkpoint::{CheckpointError, CheckpointFiles};
use crate::model::profile::{Pass, RewardConfig};
use crate::model::{AnswerIds, Branch, Normalisation, Reading, Sample};

/// The field of an item that holds its prompt.
const PROMPT: &str = "prompt";
/// The field of an item that holds an encoded picture.
const ENCODED: &str = "image.encoded";
/// The field of an item that holds raw pixels.
const RAW: &str = "image.raw";
/// The field of an item that holds the pictures before the one that is judged.
const REFERENCES: &str = "references";
/// The field of an item that holds its questions.
const QUESTIONS: &str = "questions";

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
    /// The most questions of one item.
    pub max_questions: usize,
}

impl ProcessorLimits {
    /// Whatever can be computed.
    pub const NONE: Self = Self {
        max_prompt_bytes: usize::MAX,
        max_image_pixels: u64::MAX,
        max_item_tokens: usize::MAX,
        max_prompt_tokens: usize::MAX,
        max_image_bytes: usize::MAX,
        max_questions: usize::MAX,
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
            max_questions: limits.max_questions_per_item,
        }
    }
}

/// An item whose prompt is tokenised and whose pictures are still as they were sent.
pub struct Draft {
    input_ids: Vec<u32>,
    branches: Vec<Branch>,
    sources: Vec<Source>,
    memory: usize,
}

impl Draft {
    /// How many of the item's tokens have this id.
    pub fn count(&self, id: u32) -> usize {
        let branches = self.branches.iter().flat_map(|branch| &branch.input_ids);
        self.input_ids.iter().chain(branches).filter(|&&other| other == id).count()
    }

    /// What the item costs: text and visual tokens together, exactly as in the [`Sample`] to come.
    pub fn tokens(&self) -> usize {
        self.input_ids.len() + self.branches.iter().map(|branch| branch.input_ids.len()).sum::<usize>()
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

    /// The bytes that the pictures take once they are decoded, beyond those that came as pixels.
    pub fn decoded_memory(&self) -> usize {
        let pixels = |source: &Source| 3 * u64::from(source.width) * u64::from(source.height);
        let bytes: u64 = self.sources.iter().filter(|source| source.format.is_some()).map(pixels).sum();
        usize::try_from(bytes).unwrap_or(usize::MAX)
    }

    /// Feeds `hasher` all that the item's score depends on, beside the model: the conversation's tokens and the
    /// pictures as they were sent.
    pub fn digest_into(&self, hasher: &mut blake3::Hasher) {
        let mut update = |ids: &[u32]| {
            hasher.update(&(ids.len() as u64).to_le_bytes());
            for id in ids {
                hasher.update(&id.to_le_bytes());
            }
        };
        update(&self.input_ids);
        for Branch { input_ids, answers } in &self.branches {
            update(input_ids);
            update(answers);
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

/// The pictures of one item that somebody else reads too, or why one is none: each is decoded once.
#[derive(Default)]
pub struct Decoded(Vec<Result<Rgb, String>>);

impl Decoded {
    /// The one that is judged, once it is decoded.
    pub fn judged(&self) -> Option<&Rgb> {
        self.0.last()?.as_ref().ok()
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
    /// The picture, or why it is none.
    fn decode(self) -> Result<Rgb, String> {
        let Self { width, height, bytes, format, .. } = self;
        match format {
            Some(format) => format.decode(&bytes, (width, height)),
            None => Ok(Rgb { width, height, pixels: bytes }),
        }
    }

    fn refuse(&self, reason: impl fmt::Display) -> ScoreError {
        self.place.refuse(self.format.is_some(), reason)
    }
}

/// Turns prompts and pictures into samples, as the Hugging Face processor of the same checkpoint does.
pub struct Processor {
    /// One for each pass.
    prompts: Vec<PromptEncoder>,
    answers: Option<AnswerIds>,
    takes_questions: bool,
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
        let encoder = |pass: &Pass| PromptEncoder::load(files, reward, pass, pictures.image_token_id);
        let prompts = reward.passes().iter().map(encoder).collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            answers: reward.answers.as_ref().map(|answers| answer_ids(answers, &prompts[0])).transpose()?,
            takes_questions: reward.takes_questions(),
            prompts,
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
            self.prompts.iter_mut().try_for_each(|prompts| prompts.limit_vocabulary(rows))?;
        }
        Ok(self)
    }

    /// How the model is to turn a [`Sample`]'s bytes into numbers.
    pub fn normalisation(&self) -> Normalisation {
        self.normalisation
    }

    /// What a model must know of the samples.
    pub fn reading(&self) -> Reading {
        Reading { normalisation: self.normalisation, answers: self.answers.clone() }
    }

    /// How many pictures an item has.
    pub fn pictures(&self) -> usize {
        self.prompts[0].pictures
    }

    /// As [`Processor::admit_all`], for a model that reads one picture.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn admit(&self, prompt: &str, picture: Picture) -> Result<Draft, ScoreError> {
        self.admit_all(prompt, vec![picture])
    }

    /// As [`Processor::admit_item`], without questions.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn admit_all(&self, prompt: &str, pictures: Vec<Picture>) -> Result<Draft, ScoreError> {
        self.admit_item(Item { prompt: prompt.into(), pictures, questions: Vec::new() })
    }

    /// Checks an item and says what it costs, without decoding its pictures.
    ///
    /// # Errors
    ///
    /// [`ScoreError::Invalid`] for what can never be scored.
    pub fn admit_item(&self, item: Item) -> Result<Draft, ScoreError> {
        let Item { prompt, pictures, questions } = item;
        if questions.is_empty() {
            self.check_prompt(&prompt)?;
        } else {
            self.check_questions(&questions)?;
        }
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
        let field = if questions.is_empty() { PROMPT } else { QUESTIONS };
        let (input_ids, branches) = self.texts(&prompt, &questions, &costs)?;
        let memory = sources.iter().map(|source| self.memory(source)).sum::<Result<usize, _>>()?;
        let draft = Draft { input_ids, branches, sources, memory };
        let tokens = draft.tokens();
        let (text_tokens, most_text) = (tokens - visual_tokens, self.limits.max_prompt_tokens);
        if text_tokens > most_text {
            return Err(ScoreError::invalid(
                field,
                format!("the item's text has {text_tokens} tokens; it may have {most_text}"),
            ));
        }
        if tokens > limit {
            return Err(ScoreError::invalid(
                field,
                format!(
                    "the item has {tokens} tokens, {visual_tokens} of them the picture's; it may have {limit}"
                ),
            ));
        }
        Ok(draft)
    }

    /// What a picture is resized to. One that EXIF turns on its side costs the same: the two sides only change places.
    fn resized(&self, source: &Source) -> Result<(u64, u64), ScoreError> {
        self.geometry.resized((source.width, source.height)).map_err(|e| source.refuse(e))
    }

    /// The bytes that preparing a picture takes.
    fn memory(&self, source: &Source) -> Result<usize, ScoreError> {
        let (width, height) = self.resized(source)?;
        let first = self.geometry.first_resized((source.width, source.height)).unwrap_or_default();
        let pixels = u64::from(source.width) * u64::from(source.height) + first.0 * first.1;
        Ok(footprint(source.memory, pixels, width * height))
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
        self.prepare_with(draft, None)
    }

    /// The same, of an item that somebody else reads too: what is in `decoded` is not decoded again, and what is not is added.
    ///
    /// # Errors
    ///
    /// As [`Processor::prepare`].
    pub fn prepare_with(
        &self,
        draft: Draft,
        mut decoded: Option<&mut Decoded>,
    ) -> Result<Sample, ScoreError> {
        let Draft { input_ids, branches, sources, .. } = draft;
        let mut pictures = Vec::with_capacity(sources.len());
        for (index, source) in sources.into_iter().enumerate() {
            let (place, encoded) = (source.place, source.format.is_some());
            let refuse = |reason: String| place.refuse(encoded, reason);
            let patches = |picture: &Rgb| self.geometry.patches(picture).map_err(refuse);
            pictures.push(match decoded.as_deref_mut() {
                None => patches(&source.decode().map_err(refuse)?)?,
                Some(Decoded(shared)) => {
                    if shared.len() == index {
                        shared.push(source.decode());
                    }
                    let picture = shared.get(index).ok_or_else(|| refuse("it was not decoded".into()))?;
                    patches(picture.as_ref().map_err(|reason| refuse(reason.clone()))?)?
                }
            });
        }
        Ok(Sample { input_ids, branches, pictures })
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
