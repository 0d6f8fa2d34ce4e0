//! What a model sees of an item, for whoever looks at it.

use super::decode::{Format, Header};
use super::{Draft, Item, Processor, Question, Rgb, Span};
use crate::error::ScoreError;

/// An item as a model reads it.
#[derive(Debug)]
pub struct Seen {
    /// Its pictures, turned, resized and without transparency; that which is judged is the last.
    pub pictures: Vec<Rgb>,
    /// Its conversation in each reading, up to where the reward is read: one, or one for each pass or question.
    pub conversations: Vec<Vec<Span>>,
    /// Its tokens, as they count for the limits: what several readings begin with counts once.
    pub tokens: usize,
    /// Those of them that are its pictures'.
    pub visual_tokens: usize,
}

impl Processor {
    /// The pixels of so many visual tokens.
    pub fn pixels_of(&self, visual_tokens: usize) -> usize {
        let side = self.geometry.patch * self.geometry.merge;
        visual_tokens * side * side
    }

    /// How many visual tokens each of an admitted item's pictures is.
    ///
    /// # Errors
    ///
    /// None, of an item that was admitted.
    pub fn visual_tokens_of(&self, draft: &Draft) -> Result<Vec<usize>, ScoreError> {
        draft.sources.iter().map(|source| self.visual_tokens(source)).collect()
    }

    /// What the model sees of an item, of which [`Processor::admit_item`] has made `draft`.
    ///
    /// # Errors
    ///
    /// As [`Processor::prepare`].
    pub fn see(&self, item: &Item, draft: Draft) -> Result<Seen, ScoreError> {
        let costs = self.visual_tokens_of(&draft)?;
        let conversations = if item.questions.is_empty() {
            self.prompts.iter().map(|pass| pass.spans(&item.prompt, &costs)).collect::<Result<_, _>>()?
        } else {
            let spans = |question: &Question| self.prompts[0].spans(&question.text, &costs);
            item.questions.iter().map(spans).collect::<Result<_, _>>()?
        };
        let tokens = draft.tokens();
        let pictures = self.prepare(draft)?.pictures;
        let pictures = pictures.iter().map(|patches| self.geometry.joined(patches)).collect();
        Ok(Seen { pictures, conversations, tokens, visual_tokens: costs.iter().sum() })
    }

    /// The picture that is judged, as it was sent: turned, and without transparency.
    ///
    /// # Errors
    ///
    /// As [`Processor::prepare`].
    pub fn judged(&self, mut draft: Draft) -> Result<Rgb, ScoreError> {
        let none = || ScoreError::Internal("an item has no picture".into());
        let source = draft.sources.pop().ok_or_else(none)?;
        let (place, encoded) = (source.place, source.format.is_some());
        source.decode().map_err(|reason| place.refuse(encoded, reason))
    }
}

/// The picture of a file: turned, and without transparency.
///
/// # Errors
///
/// It is none.
pub fn decoded(file: &[u8]) -> Result<Rgb, String> {
    let format = Format::detect(file)?;
    let Header { width, height, .. } = format.header(file)?;
    format.decode(file, (width, height))
}
