//! Models that a worker could not make anew, while it could others.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::super::models::{Model, State};
use super::{LoadError, ModelControl, ModelControlError, ModelManager, lock};
use crate::model::Scorer;

impl<S: Scorer + Send + 'static> ModelManager<S> {
    /// Takes what is missing on a device out of service, and wakes what can be woken. Whether something is left to be tried
    /// again: what is not what it was is not.
    pub(super) fn restore_missing(&self) -> bool {
        for (model, device) in self.find_missing() {
            self.take_out(&model, &format!("it could not be made anew on {device}"));
            lock(&self.missing).insert(model.tag.id);
        }
        let missing = lock(&self.missing).clone();
        // Others were unloaded or woken by somebody else.
        let failed =
            self.models.all().into_iter().filter(|(model, state)| {
                missing.contains(&model.tag.id) && matches!(state, State::Failed(_))
            });
        let again: BTreeSet<u64> = failed
            .filter(|(model, _)| !self.is_settled(&model.info.name))
            .map(|(model, _)| model.tag.id)
            .collect();
        let left = !again.is_empty();
        *lock(&self.missing) = again;
        left
    }

    /// The models that serve, and a worker that is up has not.
    fn find_missing(&self) -> Vec<(Arc<Model>, String)> {
        let _alone = lock(&self.busy);
        let rosters = lock(&self.rosters).clone();
        let serving = self.models.all().into_iter().filter(|(_, state)| *state == State::Serving);
        serving
            .filter_map(|(model, _)| {
                let lacks =
                    |device: &&String| rosters.get(*device).is_some_and(|roster| roster.lacks(model.tag.id));
                let device = model.info.devices.iter().find(lacks)?.clone();
                Some((model, device))
            })
            .collect()
    }

    /// Tries to wake a model. Whether another try would be of no use.
    fn is_settled(&self, name: &str) -> bool {
        use ModelControlError::{Changed, Load, NoSuch};
        matches!(self.wake(name), Ok(()) | Err(Changed(_) | NoSuch(_) | Load(LoadError::Changed(_))))
    }
}
