//! From hidden states to a score.

pub mod regression;
