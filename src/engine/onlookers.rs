//! Who looks on while callers' items are scored, and never stands in their way: the audit log, a second model, and what is
//! kept of the last minutes.

use std::fmt;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::models::{Model, Models};
use super::shadow::{Kept, Tap};
use super::{Answer, Answers};
use crate::audit::{Audit, Entry, Image, Part, Question};
use crate::byte_room::Held;
use crate::error::ScoreError;
use crate::processor::{Item, Picture, Rgb};
use crate::recent::{self, Recent, Sketch, SketchCell};
use crate::request_context::Claim;

/// All of them.
#[derive(Default)]
pub struct Onlookers {
    /// The log of what judged which item.
    pub audit: Option<Audit>,
    /// Where a second model has items from.
    pub shadow: Option<Tap>,
    /// What is kept of the last minutes.
    pub recent: Option<Arc<Recent>>,
}

/// What is noted of an item when it is admitted, for when it is answered.
pub(super) struct Note {
    models: Vec<Arc<Model>>,
    claim: Claim,
    /// For the audit log.
    line: Option<Result<Line, NoRoom>>,
    /// For the second model, and which of the models is the first.
    kept: Option<(Kept, usize)>,
    /// For what is kept of the last minutes.
    entry: Option<Recalled>,
}

/// What is kept of an item itself.
struct Recalled {
    texts: blake3::Hash,
    picture: blake3::Hash,
    prompt: Option<Arc<str>>,
    sketch: SketchCell,
}

impl Note {
    /// Where the sketch of the item's picture goes, if it is wanted.
    pub(super) fn sketch(&self) -> Option<SketchCell> {
        Some(Arc::clone(&self.entry.as_ref()?.sketch))
    }
}

/// Without what the caller sent, so that it never reaches a log.
impl fmt::Debug for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Note")
    }
}

/// There was no room for its pictures.
struct NoRoom;

/// What a line of the audit log says of an item itself.
#[derive(Default)]
struct Line {
    entry: Entry,
    held: Option<Arc<Held>>,
}

impl Onlookers {
    /// Notes what must be known of an item later; nothing where nobody looks on. An item that cannot be read is none.
    /// `first` is the model of those that a second one is held against.
    pub(super) fn look(
        &self,
        models: &[Arc<Model>],
        first: Option<usize>,
        item: Option<&Item>,
        claim: &Claim,
    ) -> Option<Box<Note>> {
        let shadow = self.shadow.as_ref().zip(first).zip(item);
        // What the server makes up itself tells nothing of what is scored.
        let recent = self.recent.as_ref().filter(|_| !claim.made_up).zip(item);
        if self.audit.is_none() && shadow.is_none() && recent.is_none() {
            return None;
        }
        let hashes = item.map(Hashes::of);
        let line = self.audit.as_ref().map(|audit| match item.zip(hashes.as_ref()) {
            Some((item, hashes)) => Line::of(item, hashes, audit),
            None => Ok(Line::default()),
        });
        let entry = recent.zip(hashes.as_ref()).and_then(|((recent, item), hashes)| {
            let picture = *hashes.pictures.last()?;
            let (texts, sketch) = (hashes.texts, recent.sketch(picture));
            Some(Recalled { texts, picture, prompt: recent.prompt(words(item)), sketch })
        });
        let kept = shadow
            .zip(hashes)
            .and_then(|(((tap, first), item), hashes)| Some((tap.keep(hashes.together(), item)?, first)));
        Some(Box::new(Note { models: models.to_vec(), claim: claim.clone(), line, kept, entry }))
    }

    /// Which of these models a second one is held against.
    pub(super) fn first_of(&self, models: &[Arc<Model>], all: &Models) -> Option<usize> {
        let (first, _) = all.one(self.shadow.as_ref()?.of()).ok()?;
        models.iter().position(|model| Arc::ptr_eq(model, &first))
    }

    /// Makes the sketch of a picture, unless there is one.
    pub(super) fn sketch(&self, sketch: &SketchCell, picture: &Rgb) {
        if let Some(recent) = &self.recent {
            sketch.get_or_init(|| Sketch::of(picture, recent.settings.thumbnails));
        }
    }

    /// Tells what became of an item.
    pub(super) fn tell(&self, note: Note, answers: &Answers) {
        let Note { models, claim, line, kept, entry } = note;
        if let (Some(tap), Some((kept, first))) = (&self.shadow, kept)
            && let (Some(model), Some(Ok(answer))) = (models.get(first), answers.get(first))
        {
            tap.tell(kept, model, answer.scored.score.mean);
        }
        if let (Some(recent), Some(entry)) = (&self.recent, entry) {
            for (model, answer) in models.iter().zip(answers) {
                if let Ok(answer) = answer {
                    recent.record(entry.scored(model, answer, &claim), &model.tag.labels);
                }
            }
        }
        let (Some(audit), Some(line)) = (&self.audit, line) else { return };
        let Ok(line) = line else { return audit.lose(models.len() as u64) };
        let (time, caller) = (Entry::time(SystemTime::now()), claim.caller.0.to_string());
        for (model, answer) in models.iter().zip(answers) {
            let mut entry = Entry {
                time: time.clone(),
                caller: caller.clone(),
                priority: claim.priority.name().to_owned(),
                model: model.info.name.clone(),
                revision: model.info.revision.clone(),
                profile_digest: model.terms.profile_digest.clone(),
                dtype: model.info.dtype.clone(),
                server_version: env!("CARGO_PKG_VERSION").to_owned(),
                ..line.entry.clone()
            };
            judge(&mut entry, answer, audit);
            audit.record(entry, line.held.clone());
        }
    }
}

impl Recalled {
    /// With what a model made of it, now.
    fn scored(&self, model: &Model, answer: &Answer, claim: &Claim) -> recent::Entry {
        let score = &answer.scored.score;
        recent::Entry {
            at: Instant::now(),
            caller: claim.caller.clone(),
            priority: claim.priority,
            model: Arc::clone(&model.tag.name),
            revision: model.info.revision.as_str().into(),
            texts: self.texts,
            prompt: self.prompt.clone(),
            picture: self.picture,
            sketch: Arc::clone(&self.sketch),
            mean: score.mean,
            stddev: score.stddev,
        }
    }
}

/// What an item is recognised by: its prompt, or else its first question.
fn words(item: &Item) -> &str {
    match item.questions.first() {
        Some(question) if item.prompt.is_empty() => &question.text,
        _ => &item.prompt,
    }
}

/// Writes into an entry what a model made of its item.
fn judge(entry: &mut Entry, answer: &Result<Answer, ScoreError>, audit: &Audit) {
    match answer {
        Ok(Answer { scored, components, .. }) => {
            let score = &scored.score;
            let parts = components.iter().zip(&score.components);
            let part =
                parts.map(|(name, part)| Part { name: name.clone(), mean: part.mean, stddev: part.stddev });
            (entry.mean, entry.stddev) = (Some(score.mean), score.stddev);
            entry.components = part.collect();
        }
        Err(error) => entry.error = Some((audit.code)(error).to_owned()),
    }
}

impl Line {
    fn of(item: &Item, hashes: &Hashes, audit: &Audit) -> Result<Self, NoRoom> {
        let text = |hash: &blake3::Hash| hash.to_hex().to_string();
        let mut entry = Entry { prompt_hash: Some(text(&hashes.texts)), ..Entry::default() };
        let mut pictures: Vec<_> = hashes.pictures.iter().map(text).collect();
        entry.image_hash = pictures.pop();
        entry.reference_hashes = pictures;
        if audit.prompts {
            entry.prompt = Some(item.prompt.to_string());
            let question = |asked: &crate::processor::Question| Question {
                text: asked.text.clone(),
                answers: asked.answers.clone(),
            };
            entry.questions = item.questions.iter().map(question).collect();
        }
        let mut held = None;
        if audit.pictures {
            let bytes = item.pictures.iter().map(|picture| picture.bytes().len()).sum();
            held = Some(Arc::new(audit.room.hold(bytes).ok_or(NoRoom)?));
            let mut images: Vec<_> = item.pictures.iter().map(copy_of).collect();
            entry.image = images.pop();
            entry.references = images;
        }
        Ok(Self { entry, held })
    }
}

/// The digests of what an item is.
struct Hashes {
    texts: blake3::Hash,
    pictures: Vec<blake3::Hash>,
}

impl Hashes {
    fn of(item: &Item) -> Self {
        Self { texts: hash_of_texts(item), pictures: item.pictures.iter().map(hash_of).collect() }
    }

    /// One digest of all.
    fn together(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.texts.as_bytes());
        for picture in &self.pictures {
            hasher.update(picture.as_bytes());
        }
        hasher.finalize()
    }
}

/// The digest of a prompt; where there are questions, of it and of all that they say, each with its length before it.
fn hash_of_texts(item: &Item) -> blake3::Hash {
    if item.questions.is_empty() {
        return blake3::hash(item.prompt.as_bytes());
    }
    let mut hasher = blake3::Hasher::new();
    let mut update = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    };
    update(&item.prompt);
    for question in &item.questions {
        update(&question.text);
        question.answers.iter().for_each(|answer| update(answer));
    }
    hasher.finalize()
}

/// The digest of a picture's file; of raw pixels, of their sides and of them.
fn hash_of(picture: &Picture) -> blake3::Hash {
    match picture {
        Picture::Encoded(bytes) => blake3::hash(bytes),
        Picture::Raw { width, height, rgb8 } => {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&width.to_le_bytes()).update(&height.to_le_bytes()).update(rgb8);
            hasher.finalize()
        }
    }
}

/// A copy, so that the room of the message goes back to who sends the next.
fn copy_of(picture: &Picture) -> Image {
    match picture.copied() {
        Picture::Encoded(bytes) => Image { bytes, width: None, height: None },
        Picture::Raw { width, height, rgb8 } => {
            Image { bytes: rgb8, width: Some(width), height: Some(height) }
        }
    }
}
