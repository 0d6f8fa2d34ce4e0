//! What models see of a call's items, in JSON.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Serialize;

use crate::edge::grpc::claim;
use crate::edge::http::response::Refused;
use crate::edge::http::{Call, Edge};
use crate::edge::layers::arrivals::Arrivals;
use crate::edge::layers::byte_budget::Hold;
use crate::error::ScoreError;
use crate::processor::{Item, Rgb, Seen, Span, SpanKind};
use crate::request_context::Claim;

/// Bytes that an answer takes for each byte of a picture in it: as a file, as base64, and as a part of the whole.
const COPIES: usize = 4;

/// What the models see of a call's items.
#[derive(Default)]
pub(super) struct Looks {
    /// Of each item, of each model; nothing where the model cannot read it.
    pub seen: Vec<Option<SeenAnswer>>,
    /// The room of all that in memory.
    pub room: Option<Hold>,
    /// Whose eyes those were.
    pub revisions: Vec<String>,
}

/// What a model sees of an item.
#[derive(Serialize)]
pub(super) struct SeenAnswer {
    tokens: usize,
    visual_tokens: usize,
    pictures: Vec<PictureAnswer>,
    conversations: Vec<Vec<SpanAnswer>>,
}

#[derive(Serialize)]
struct PictureAnswer {
    width: u32,
    height: u32,
    /// A file, in base64.
    png: String,
}

#[derive(Serialize)]
struct SpanAnswer {
    kind: &'static str,
    text: String,
    tokens: usize,
}

impl From<Span> for SpanAnswer {
    fn from(Span { kind, text, tokens }: Span) -> Self {
        let kind = match kind {
            SpanKind::Fixed => "fixed",
            SpanKind::Picture => "picture",
            SpanKind::Prompt => "prompt",
            SpanKind::Read => "read",
        };
        Self { kind, text, tokens }
    }
}

/// Looks at what these models see of these items. Comes before they are scored, while the call's message counts.
pub(super) async fn look(
    edge: &Edge,
    items: Vec<Result<Item, ScoreError>>,
    models: &[String],
    call: &Call,
) -> Result<Looks, Refused> {
    let engine = edge.handlers.engine()?;
    let claim = Claim { priority: call.priority, ..claim(&call.extensions) };
    let (most, count) = (engine.limits().max_items_per_request, items.len());
    if count > most {
        return Err(ScoreError::invalid("items", format!("has {count} items; send 1 to {most}")).into());
    }
    let models = engine.models().ready(models).await?;
    let mut looks = Vec::with_capacity(items.len() * models.len());
    for item in items {
        for model in &models {
            looks.push(match &item {
                // Why it cannot be read is told in place of its score.
                Err(_) => None,
                Ok(item) => unless_of_item(engine.admit_look(model, item.clone(), &claim).await)?,
            });
        }
    }
    let most = engine.limits().max_item_tokens;
    let tokens: usize = looks.iter().flatten().map(|look| look.visual_tokens).sum();
    if tokens > most {
        let reason = format!("the pictures are {tokens} tokens together, of all models; {most} can be shown");
        return Err(ScoreError::invalid("inspect", reason).into());
    }
    let bytes: usize = looks.iter().flatten().map(|look| look.bytes).sum();
    let arrivals: Arrivals = call.extensions.get().cloned().unwrap_or_default();
    let room = arrivals.beside(COPIES * bytes)?;
    let mut seen = Vec::with_capacity(looks.len());
    for look in looks {
        seen.push(match look {
            None => None,
            Some(look) => unless_of_item(engine.look(look, &claim, answer).await)?,
        });
    }
    Ok(Looks { seen, room, revisions: models.iter().map(|model| model.info.revision.clone()).collect() })
}

/// Nothing where the item is at fault; the error where the call is.
fn unless_of_item<T>(result: Result<T, ScoreError>) -> Result<Option<T>, ScoreError> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(ScoreError::Invalid { .. } | ScoreError::Internal(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn answer(seen: Seen) -> Result<SeenAnswer, ScoreError> {
    let Seen { pictures, conversations, tokens, visual_tokens } = seen;
    let picture = |picture: Rgb| {
        let file = picture.png().map_err(|fault| ScoreError::Internal(format!("no PNG: {fault}")))?;
        Ok(PictureAnswer { width: picture.width, height: picture.height, png: STANDARD.encode(file) })
    };
    Ok(SeenAnswer {
        tokens,
        visual_tokens,
        pictures: pictures.into_iter().map(picture).collect::<Result<_, ScoreError>>()?,
        conversations: conversations
            .into_iter()
            .map(|spans| spans.into_iter().map(SpanAnswer::from).collect())
            .collect(),
    })
}

/// A body with its room, until it is written.
pub(super) fn held(body: Vec<u8>, room: Option<Hold>) -> Bytes {
    struct Held {
        body: Vec<u8>,
        _room: Option<Hold>,
    }
    impl AsRef<[u8]> for Held {
        fn as_ref(&self) -> &[u8] {
            &self.body
        }
    }
    Bytes::from_owner(Held { body, _room: room })
}
