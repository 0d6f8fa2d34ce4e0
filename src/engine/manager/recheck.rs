//! Models that serve score the items of their self-test again, on the workers that have them, and what comes of it.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

use metrics::counter;

use super::super::candidate::Reference;
use super::super::models::{Model, State};
use super::{BATCH, LoadError, ModelManager, lock};
use crate::model::Scorer;
use crate::telemetry::SELF_TESTS;

/// The part of the interval for which a test waits until its device has nothing else to do.
const PATIENCE: u32 = 10;

/// What a test found: the model is what it was, or not, or could not be tested.
type Found = Result<Result<(), LoadError>, String>;

impl<S: Scorer + Send + 'static> ModelManager<S> {
    /// Tests every model that serves on each of its devices, and waits for what that shows.
    pub(super) fn check_all(&self) {
        let patience = self.settings.self_test.interval.unwrap_or_default() / PATIENCE;
        let serving = self.models.all().into_iter().filter(|(_, state)| *state == State::Serving);
        let asked: Vec<_> = serving.flat_map(|(model, _)| self.ask(&model, patience)).collect();
        for (model, device, found) in asked {
            // A worker that is lost or lets go of the model tests it when it has it again.
            let Ok(found) = found.recv_timeout(patience + BATCH) else { continue };
            let outcome = match &found {
                Ok(Ok(())) => "passed",
                Ok(Err(_)) => "failed",
                Err(_) => "error",
            };
            let labels = [("device", device.clone()), ("outcome", outcome.to_owned())];
            counter!(SELF_TESTS, model.tag.labels.with(labels)).increment(1);
            match found {
                Ok(Ok(())) => {}
                Ok(Err(changed)) => self.take_out(&model, &changed.to_string()),
                Err(error) => {
                    tracing::error!(
                        model = model.info.name,
                        device,
                        error,
                        "a self-test could not be scored"
                    );
                }
            }
        }
    }

    /// Asks each worker of a model to test it.
    fn ask(&self, model: &Arc<Model>, patience: Duration) -> Vec<(Arc<Model>, String, Receiver<Found>)> {
        let id = model.tag.id;
        let (rosters, due) = (lock(&self.rosters).clone(), Instant::now() + patience);
        let Some(reference) = lock(&self.kept).get(&id).map(|kept| kept.reference.clone()) else {
            return Vec::new();
        };
        let tolerance = self.settings.self_test.tolerance;
        let ask = |device: &String| {
            let roster = rosters.get(device)?;
            let (tell, found) = mpsc::channel();
            let (Reference { test, proofs }, place) = (reference.clone(), device.clone());
            let run = move |scorer: &mut S| {
                let tested = test.score(scorer);
                // Nobody hears it who has stopped waiting.
                let _ = tell.send(match &tested {
                    Ok(tested) => Ok(proofs.hold(&place, tested.scores.clone(), tolerance)),
                    Err(error) => Err(error.to_string()),
                });
                tested.map(drop)
            };
            roster.ask(id, due, Box::new(run));
            Some((Arc::clone(model), device.clone(), found))
        };
        model.info.devices.iter().filter_map(ask).collect()
    }

    /// Takes a model out of service that is not what it was. What waits for it is refused, and what it scored is forgotten:
    /// nobody knows since when it has been wrong.
    pub(super) fn take_out(&self, model: &Arc<Model>, why: &str) {
        let name = &model.info.name;
        if !self.models.fail(model, why) {
            return;
        }
        tracing::error!(model = name, why, "a model is out of service");
        self.queue.retire(model.tag.id);
        self.results.forget();
        // Unless it is woken meanwhile, which proves it.
        let _alone = lock(&self.busy);
        if self
            .models
            .all()
            .iter()
            .any(|(other, state)| Arc::ptr_eq(other, model) && matches!(state, State::Failed(_)))
        {
            self.let_go(model.tag.id);
        }
    }
}
