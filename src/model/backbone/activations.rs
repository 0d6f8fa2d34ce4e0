//! A look at the tensors between the stages, for holding them against the reference.

use tch::Tensor;

/// Keeps the tensor of every stage, or nothing.
#[derive(Debug, Default)]
pub struct Activations {
    stages: Option<Vec<(String, Tensor)>>,
}

impl Activations {
    /// Keeps every stage.
    pub fn keep() -> Self {
        Self { stages: Some(Vec::new()) }
    }

    /// Hands a stage over. `tensor` is made only if it is kept.
    pub fn see(&mut self, stage: &str, tensor: impl FnOnce() -> Tensor) {
        if let Some(stages) = &mut self.stages {
            stages.push((stage.to_owned(), tensor()));
        }
    }

    /// The stages in the order of the computation.
    pub fn into_stages(self) -> Vec<(String, Tensor)> {
        self.stages.unwrap_or_default()
    }
}
