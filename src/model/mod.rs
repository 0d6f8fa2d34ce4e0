//! The reward model on libtorch.
//!
//! [`checkpoint`] finds and checks a checkpoint's files, [`qwen2_5_vl`] is the backbone, `reward_head` turns its
//! hidden state into a [`Score`], and [`RewardModel`] is the whole. Plain tensor code: operations of libtorch that
//! fail panic, and whoever calls a [`Scorer`] catches that.

pub mod checkpoint;
mod lanes;
mod layers;
pub mod qwen2_5_vl;
mod reward_head;
mod reward_model;
mod sample;
mod scorer;

pub use reward_model::{Blueprint, RewardModel};
pub use sample::{Normalisation, Patches, Sample, Score};
pub use scorer::{ModelError, Scorer};
