//! The reward model on libtorch.
//!
//! [`checkpoint`] finds and checks a checkpoint's files, [`backbone`] is the backbone, [`readout`] turns its
//! hidden state into a [`Score`], and [`RewardModel`] is the whole. Plain tensor code: operations of libtorch that
//! fail panic, and whoever calls a [`Scorer`] catches that.

pub mod backbone;
pub mod checkpoint;
mod cpu_parallel;
mod layers;
mod libtorch_shim;
pub mod profile;
pub mod readout;
mod reward_model;
mod sample;
mod scorer;

pub use reward_model::{Blueprint, RewardModel};
pub use sample::{AnswerIds, Branch, Component, Normalisation, Patches, Reading, Sample, Score};
pub use scorer::{ModelError, Scorer, SelfTested};
