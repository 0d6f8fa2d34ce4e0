//! The conversation as a model reads it, in words: for whoever looks at it.

use tokenizers::Encoding;

use super::{Piece, PromptEncoder};
use crate::error::ScoreError;

/// A stretch of a conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// What it is.
    pub kind: SpanKind,
    /// Its text; of a picture the placeholder, which stands once for each token.
    pub text: String,
    /// How many tokens it is.
    pub tokens: usize,
}

/// What a stretch of a conversation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpanKind {
    /// The same for every caller.
    Fixed,
    /// A picture.
    Picture,
    /// Plain text with the caller's prompt in it.
    Prompt,
    /// The token at which the reward is read: the last there is.
    Read,
}

impl PromptEncoder {
    /// What [`PromptEncoder::encode`] gives the ids of.
    pub fn spans(&self, prompt: &str, visual_tokens: &[usize]) -> Result<Vec<Span>, ScoreError> {
        let mut visual_tokens = visual_tokens.iter();
        let mut spans = Vec::with_capacity(self.plan.len() + 1);
        for piece in &self.plan {
            let (kind, text, tokens) = match piece {
                Piece::Fixed { ids, text } => (SpanKind::Fixed, text.clone(), ids.len()),
                Piece::Picture(id) => {
                    let text = self.tokenizer.id_to_token(*id).unwrap_or_default();
                    (SpanKind::Picture, text, visual_tokens.next().copied().unwrap_or_default())
                }
                Piece::Caller { parts, trim } => {
                    let text = trim.apply(&parts.join(prompt)).to_owned();
                    let tokens = self.encoding(&text)?.get_ids().len();
                    (SpanKind::Prompt, text, tokens)
                }
            };
            if tokens > 0 {
                spans.push(Span { kind, text, tokens });
            }
        }
        // The last token stands for itself.
        if let Some(Span { kind, text, tokens }) = spans.pop() {
            let at = if tokens > 1 { self.last_token(&text)? } else { 0 };
            let (before, last) = text.split_at_checked(at).unwrap_or((&text, ""));
            if tokens > 1 {
                spans.push(Span { kind, text: before.to_owned(), tokens: tokens - 1 });
            }
            spans.push(Span { kind: SpanKind::Read, text: last.to_owned(), tokens: 1 });
        }
        Ok(spans)
    }

    /// Where a text's last token begins.
    fn last_token(&self, text: &str) -> Result<usize, ScoreError> {
        Ok(self.encoding(text)?.get_offsets().last().map_or(0, |&(start, _)| start))
    }

    fn encoding(&self, text: &str) -> Result<Encoding, ScoreError> {
        let fault = |e| ScoreError::invalid("prompt", format!("it cannot be tokenised: {e}"));
        self.tokenizer.encode(text, false).map_err(fault)
    }
}
