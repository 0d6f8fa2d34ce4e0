//! The models that are there, by name, and where each is in its life.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use metrics::gauge;
use tokio::sync::watch;

use super::{LoadError, ModelInfo, Terms};
use crate::error::{ScoreError, quoted};
use crate::processor::Processor;
use crate::scheduler::Tag;
use crate::telemetry::MODEL_INFO;

/// A model: what a call holds of it for as long as it lasts.
pub struct Model {
    /// What is served.
    pub info: ModelInfo,
    /// What else is known of it.
    pub terms: Terms,
    /// How the queue and the workers know it.
    pub tag: Arc<Tag>,
    /// The names of a score's components, where the item asks no questions.
    pub(super) components: Arc<[String]>,
    pub(super) processor: Arc<Processor>,
    /// The cost of its cheapest item.
    pub(super) least_cost: usize,
    /// What a token costs, in those of the first model.
    pub(super) weight: f64,
    /// What a digest begins with: it stands for the model.
    pub(super) seed: blake3::Hasher,
}

impl Model {
    /// What so many of its tokens cost.
    pub(super) fn cost(&self, tokens: usize) -> usize {
        (tokens as f64 * self.weight).ceil() as usize
    }

    /// Shows it among the metrics, or no longer.
    fn publish(&self, there: bool) {
        let info = &self.info;
        gauge!(
            MODEL_INFO,
            "name" => info.name.clone(),
            "revision" => info.revision.clone(),
            "dtype" => info.dtype.clone(),
            "devices" => info.devices.join(","),
        )
        .set(if there { 1.0 } else { 0.0 });
    }
}

/// Where a model is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// It takes calls.
    Serving,
    /// It has given its memory back.
    Asleep,
    /// It is being woken.
    Waking,
    /// It is not what it was, for this reason, and takes no calls.
    Failed(Arc<str>),
}

impl State {
    /// Why a model in this state takes no calls.
    fn refusal(&self) -> Option<Arc<str>> {
        match self {
            Self::Serving => None,
            Self::Asleep => Some("is asleep".into()),
            Self::Waking => Some("is being woken".into()),
            Self::Failed(why) => Some(format!("is out of service: {why}").into()),
        }
    }
}

struct Slot {
    model: Arc<Model>,
    state: State,
}

impl Slot {
    /// The model, where it takes calls.
    fn serving(&self) -> Result<Arc<Model>, ScoreError> {
        match self.state.refusal() {
            None => Ok(Arc::clone(&self.model)),
            Some(why) => Err(ScoreError::NotServing { model: self.model.info.name.clone(), why }),
        }
    }
}

/// What has a model woken by its name; nobody waits for it here.
type Wake = Box<dyn Fn(&str) + Send + Sync>;

/// The models, the default one first.
pub struct Models {
    slots: RwLock<Vec<Slot>>,
    /// Counts what changes.
    changes: watch::Sender<u64>,
    /// Where calls wake models.
    wake: Mutex<Option<Wake>>,
}

impl Models {
    /// Of these, which all serve.
    pub(super) fn new(models: Vec<Arc<Model>>) -> Self {
        models.iter().for_each(|model| model.publish(true));
        let slots = models.into_iter().map(|model| Slot { model, state: State::Serving }).collect();
        Self { slots: RwLock::new(slots), changes: watch::Sender::new(0), wake: Mutex::default() }
    }

    /// Has calls for a sleeping model wake it, and wait.
    pub fn wake_by_calls(&self, wake: Wake) {
        *self.wake.lock().unwrap_or_else(PoisonError::into_inner) = Some(wake);
    }

    /// All of them.
    pub fn all(&self) -> Vec<(Arc<Model>, State)> {
        self.read(|slots| slots.iter().map(|slot| (Arc::clone(&slot.model), slot.state.clone())).collect())
    }

    /// Tells of changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// What calls are told of the first that is out of service; nothing where none is.
    pub fn fault(&self) -> Option<ScoreError> {
        self.read(|slots| {
            let failed = slots.iter().find(|slot| matches!(slot.state, State::Failed(_)));
            failed.and_then(|slot| slot.serving().err())
        })
    }

    /// The models that a call names, in its order; the default one where it names none. All of them serve.
    ///
    /// # Errors
    /// There is no such model, it is named twice, or it does not serve.
    pub fn named(&self, names: &[String]) -> Result<Vec<Arc<Model>>, ScoreError> {
        self.read(|slots| {
            let mut found: Vec<&Slot> = Vec::new();
            if names.is_empty() {
                found.push(slots.first().ok_or(NO_MODEL)?);
            }
            // A list that is longer than all there are has one twice, or one that is not there.
            for name in names {
                let slot = slots.iter().find(|slot| slot.model.info.name == *name);
                let slot = slot.ok_or_else(|| unknown(name, slots))?;
                if found.iter().any(|other| Arc::ptr_eq(&other.model, &slot.model)) {
                    return Err(ScoreError::invalid("models", format!("{} is named twice", quoted(name))));
                }
                found.push(slot);
            }
            found.into_iter().map(Slot::serving).collect()
        })
    }

    /// As [`Models::named`]; wakes those that sleep, where calls may, and waits until they are awake.
    ///
    /// # Errors
    /// As [`Models::named`].
    pub async fn ready(&self, names: &[String]) -> Result<Vec<Arc<Model>>, ScoreError> {
        let mut changes = self.changes();
        let mut woken: Vec<String> = Vec::new();
        loop {
            changes.mark_unchanged();
            let found = self.named(names);
            let Err(ScoreError::NotServing { model, .. }) = &found else { return found };
            {
                let wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(wake) = &*wake else { return found };
                match self.one(model)?.1 {
                    // Once: where it could not be woken, its caller is told.
                    State::Asleep if woken.contains(model) => return found,
                    State::Asleep => wake(model),
                    State::Waking => {}
                    State::Serving => continue,
                    State::Failed(_) => return found,
                }
            }
            woken.push(model.clone());
            let _ = changes.changed().await;
        }
    }

    /// The model of a name, or the default one where it is empty, and its state.
    ///
    /// # Errors
    /// There is no such model.
    pub fn one(&self, name: &str) -> Result<(Arc<Model>, State), ScoreError> {
        self.read(|slots| {
            let slot = if name.is_empty() {
                slots.first().ok_or(NO_MODEL)?
            } else {
                let slot = slots.iter().find(|slot| slot.model.info.name == name);
                slot.ok_or_else(|| unknown(name, slots))?
            };
            Ok((Arc::clone(&slot.model), slot.state.clone()))
        })
    }

    /// Puts a model in the place of that of its name, or behind all others.
    pub(super) fn put(&self, model: Arc<Model>) {
        model.publish(true);
        self.change(|slots| {
            let slot = Slot { model, state: State::Serving };
            match slots.iter_mut().find(|other| other.model.info.name == slot.model.info.name) {
                Some(place) => {
                    if place.model.info.revision != slot.model.info.revision {
                        place.model.publish(false);
                    }
                    *place = slot;
                }
                None => slots.push(slot),
            }
        });
    }

    /// Takes a model out.
    pub(super) fn remove(&self, name: &str) {
        self.change(|slots| {
            slots
                .extract_if(.., |slot| slot.model.info.name == name)
                .for_each(|slot| slot.model.publish(false));
        });
    }

    /// Says where a model is in its life.
    pub(super) fn set(&self, name: &str, state: State) {
        self.change(|slots| {
            slots
                .iter_mut()
                .filter(|slot| slot.model.info.name == name)
                .for_each(|slot| slot.state = state.clone());
        });
    }

    /// Takes a model out of service; whether it was this one that served under its name.
    pub(super) fn fail(&self, model: &Arc<Model>, why: &str) -> bool {
        let mut served = false;
        self.change(|slots| {
            let slot = slots.iter_mut().find(|slot| Arc::ptr_eq(&slot.model, model));
            if let Some(slot) = slot.filter(|slot| slot.state == State::Serving) {
                (slot.state, served) = (State::Failed(why.into()), true);
            }
        });
        served
    }

    fn read<T>(&self, look: impl FnOnce(&[Slot]) -> T) -> T {
        look(&self.slots.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Slot>)) {
        change(&mut self.slots.write().unwrap_or_else(PoisonError::into_inner));
        self.changes.send_modify(|count| *count += 1);
    }
}

/// There is nothing to ask.
const NO_MODEL: ScoreError = ScoreError::Unavailable("no model is loaded");

fn unknown(name: &str, slots: &[Slot]) -> ScoreError {
    let there: Vec<&str> = slots.iter().map(|slot| slot.model.info.name.as_str()).collect();
    ScoreError::invalid(
        "models",
        format!("there is no model {}; there are {}", quoted(name), there.join(", ")),
    )
}

/// Two models of one name cannot be told apart.
pub(super) fn distinct<'a>(names: impl Iterator<Item = &'a str>) -> Result<(), LoadError> {
    let mut seen = Vec::new();
    for name in names {
        if seen.contains(&name) {
            return Err(LoadError::Twice(name.to_owned()));
        }
        seen.push(name);
    }
    Ok(())
}
