//! Looking at what a model sees of an item. It is prepared as for a score, and no device is asked.

use std::sync::Arc;

use super::cpu_pool::Cost;
use super::{Engine, Model};
use crate::error::ScoreError;
use crate::processor::{Draft, Item, Rgb, Seen};
use crate::request_context::Claim;

/// Bytes of a pixel.
const RGB: usize = 3;

/// An item that a model can read.
pub struct Look {
    model: Arc<Model>,
    item: Item,
    draft: Draft,
    /// The bytes of its pictures as the model sees them.
    pub bytes: usize,
    /// Their tokens.
    pub visual_tokens: usize,
}

impl Look {
    /// The bytes that its pictures take once they are decoded.
    pub fn decoded_bytes(&self) -> usize {
        self.draft.decoded_memory()
    }
}

impl Engine {
    /// Checks an item for a look at what a model sees of it.
    ///
    /// # Errors
    /// The model can never read it, or its caller left.
    pub async fn admit_look(
        &self,
        model: &Arc<Model>,
        item: Item,
        claim: &Claim,
    ) -> Result<Look, ScoreError> {
        let cost = Cost { time: item.questions.len().max(1), memory: 0 };
        let model = Arc::clone(model);
        let work = move || {
            let processor = &model.processor;
            let draft = processor.admit_item(item.clone())?;
            let visual_tokens = processor.visual_tokens_of(&draft)?.iter().sum();
            let bytes = RGB * processor.pixels_of(visual_tokens);
            Ok(Look { model, item, draft, bytes, visual_tokens })
        };
        self.admission.run(claim, cost, work).await
    }

    /// What the model sees of it, and what `then` makes of that on the same thread.
    ///
    /// # Errors
    /// Its pictures cannot be read, `then` fails, or its caller left.
    pub async fn look<T: Send + 'static>(
        &self,
        look: Look,
        claim: &Claim,
        then: impl FnOnce(Seen) -> Result<T, ScoreError> + Send + 'static,
    ) -> Result<T, ScoreError> {
        let Look { model, item, draft, bytes, .. } = look;
        let memory = draft.memory();
        // Beside what is prepared: its pixels once more.
        let cost = Cost { time: memory >> 10, memory: memory + bytes };
        self.preparation.run(claim, cost, move || then(model.processor.see(&item, draft)?)).await
    }

    /// The picture that is judged, as it was sent: turned, and without transparency.
    ///
    /// # Errors
    /// It cannot be read, or its caller left.
    pub async fn decode(&self, look: Look, claim: &Claim) -> Result<Rgb, ScoreError> {
        let Look { model, draft, .. } = look;
        let memory = draft.memory();
        let cost = Cost { time: memory >> 10, memory };
        self.preparation.run(claim, cost, move || model.processor.judged(draft)).await
    }
}
