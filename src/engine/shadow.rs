//! A second model that scores a part of what a first one has scored, and what the two have in common. No caller waits for it,
//! has a place less for it, or hears of it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::StreamExt;
use metrics::{counter, gauge};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::{Engine, Model};
use crate::byte_room::{ByteRoom, Held};
use crate::config::ShadowSettings;
use crate::error::ScoreError;
use crate::processor::Item;
use crate::request_context::{Caller, Claim, Priority};
use crate::scheduler::Tag;
use crate::statistics::rank_correlation;
use crate::telemetry::{SHADOW_ITEMS, SHADOW_RANK_CORRELATION, SHADOW_SHIFT};

/// The most bytes of pictures that are kept for the second model.
const MOST_PICTURES: usize = 64 << 20;
/// How long an item is worth scoring.
const PATIENCE: Duration = Duration::from_secs(60);
/// How many of the newest pairs are compared.
const WINDOW: usize = 1024;
/// How often they are. To sort them for each one more would cost a busy server's threads.
const COMPARED_EVERY: Duration = Duration::from_secs(1);

/// Where items are handed to the second model.
pub struct Tap {
    model: String,
    /// The first model; the default one where this is empty.
    of: String,
    /// Whose digest begins with less than this is taken.
    below: u64,
    /// Where there is no bound.
    all: bool,
    room: Arc<ByteRoom>,
    items: mpsc::Sender<Sighting>,
}

/// The second model's side.
pub struct Shadow {
    model: String,
    most: usize,
    items: mpsc::Receiver<Sighting>,
}

/// An item that the first model has scored.
struct Sighting {
    item: Item,
    of: Arc<Model>,
    mean: f32,
    _held: Held,
}

/// An item that is kept until the first model has scored it.
pub(super) struct Kept {
    item: Item,
    held: Held,
}

impl Tap {
    /// Both ends.
    pub fn new(settings: &ShadowSettings) -> (Self, Shadow) {
        let ShadowSettings { model, of, share, max_items } = settings.clone();
        let (items, arrive) = mpsc::channel(max_items);
        let tap = Self {
            model: model.clone(),
            of,
            // Of two to the power of 64.
            below: (share * u64::MAX as f64) as u64,
            all: share >= 1.0,
            room: ByteRoom::new(MOST_PICTURES),
            items,
        };
        (tap, Shadow { model, most: max_items, items: arrive })
    }

    /// The name of the first model; of the default one an empty one.
    pub(super) fn of(&self) -> &str {
        &self.of
    }

    /// Keeps an item of this digest, if it is one to be taken and there is room for it: the same ones each time.
    pub(super) fn keep(&self, digest: blake3::Hash, item: &Item) -> Option<Kept> {
        let [first, ..] = digest.as_bytes().as_chunks::<8>().0 else { return None };
        if !self.all && u64::from_be_bytes(*first) >= self.below {
            return None;
        }
        let bytes = item.pictures.iter().map(|picture| picture.bytes().len()).sum();
        let held = self.room.hold(bytes).or_else(|| {
            self.count("dropped");
            None
        })?;
        let pictures = item.pictures.iter().map(crate::processor::Picture::copied).collect();
        Some(Kept { item: Item { pictures, ..item.clone() }, held })
    }

    /// Hands over an item that the first model has scored.
    pub(super) fn tell(&self, Kept { item, held }: Kept, of: &Arc<Model>, mean: f32) {
        if self.items.try_send(Sighting { item, of: Arc::clone(of), mean, _held: held }).is_err() {
            self.count("dropped");
        }
    }

    fn count(&self, outcome: &'static str) {
        count(&self.model, outcome);
    }
}

fn count(model: &str, outcome: &'static str) {
    counter!(SHADOW_ITEMS, "model" => model.to_owned(), "outcome" => outcome).increment(1);
}

impl Shadow {
    /// Scores what is handed over, until nothing more can be.
    pub async fn run(self, engine: Arc<Engine>) {
        let Self { model, most, items } = self;
        let window = Mutex::new(Window::default());
        let score = async |Sighting { item, of, mean, _held }| {
            let claim = Claim {
                caller: Caller("the shadow".into()),
                priority: Priority::Evaluation,
                deadline: Some(Instant::now() + PATIENCE),
                made_up: false,
            };
            let outcome = match engine.score_aside(&model, item, &claim).await {
                Ok((by, score)) => {
                    let mut window = window.lock().unwrap_or_else(PoisonError::into_inner);
                    window.add([&of, &by], (mean, score.mean));
                    "scored"
                }
                Err(ScoreError::QueueFull { .. } | ScoreError::DeadlineExceeded) => "dropped",
                Err(error) => {
                    tracing::debug!(model, %error, "the shadow has no score");
                    "failed"
                }
            };
            count(&model, outcome);
        };
        let compare = async {
            loop {
                tokio::time::sleep(COMPARED_EVERY).await;
                window.lock().unwrap_or_else(PoisonError::into_inner).compare();
            }
        };
        tokio::select! {
            () = ReceiverStream::new(items).for_each_concurrent(most, score) => {}
            () = compare => {}
        }
    }
}

/// The newest pairs of scores of two models.
#[derive(Default)]
struct Window {
    /// Which two.
    models: Option<[Arc<Tag>; 2]>,
    pairs: VecDeque<(f32, f32)>,
    /// Whether it was compared as it is.
    is_compared: bool,
}

impl Window {
    /// One more pair. Others' pairs are forgotten: another model under a name is another model.
    fn add(&mut self, models: [&Model; 2], pair: (f32, f32)) {
        let tags = models.map(|model| &model.tag);
        if self
            .models
            .as_ref()
            .is_none_or(|known| known.each_ref().map(|tag| tag.id) != tags.map(|tag| tag.id))
        {
            self.pairs.clear();
            self.models = Some(tags.map(Arc::clone));
        }
        if self.pairs.len() == WINDOW {
            self.pairs.pop_front();
        }
        self.pairs.push_back(pair);
        self.is_compared = false;
    }

    /// Tells the metrics what the two have in common.
    fn compare(&mut self) {
        let Some(models) = self.models.as_ref().filter(|_| !self.is_compared) else { return };
        self.is_compared = true;
        let pairs = &*self.pairs.make_contiguous();
        let shift = pairs.iter().map(|&(of, by)| f64::from(by) - f64::from(of)).sum::<f64>();
        let [of, by] = models.each_ref().map(|tag| tag.name.to_string());
        let set = |name: &'static str, value: f64| {
            gauge!(name, "model" => by.clone(), "of" => of.clone()).set(value);
        };
        set(SHADOW_SHIFT, shift / pairs.len() as f64);
        set(SHADOW_RANK_CORRELATION, rank_correlation(pairs).unwrap_or(f64::NAN));
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::processor::Picture;

    fn tap(share: f64) -> Tap {
        let of = String::new();
        Tap::new(&ShadowSettings { model: "unit".into(), of, share, max_items: 1 }).0
    }

    #[test]
    fn the_same_share_of_the_items_is_taken_each_time() {
        let item = Item::new("a", Picture::Encoded(Bytes::from_static(b"x")));
        for (share, least, most) in [(0.25, 200, 300), (1.0, 1000, 1000), (0.001, 0, 10)] {
            let tap = tap(share);
            let taken = || -> Vec<u32> {
                let keeps = |n: &u32| tap.keep(blake3::hash(&n.to_le_bytes()), &item).is_some();
                (0..1000).filter(keeps).collect()
            };
            assert_eq!(taken(), taken());
            assert!((least..=most).contains(&taken().len()), "{share}: {}", taken().len());
        }
    }

    #[test]
    fn what_is_kept_is_bounded_and_its_own() {
        let tap = tap(1.0);
        let sent = Bytes::from(vec![0; MOST_PICTURES / 2]);
        let item = Item::new("a", Picture::Encoded(sent.clone()));
        let digest = blake3::hash(b"");
        let first = tap.keep(digest, &item).unwrap();
        assert_ne!(first.item.pictures[0].bytes().as_ptr(), sent.as_ptr());
        let second = tap.keep(digest, &item).unwrap();
        assert!(tap.keep(digest, &item).is_none());
        drop((first, second));
        assert!(tap.keep(digest, &item).is_some());
    }
}
