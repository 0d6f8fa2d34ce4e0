//! The messages of `proto/spatialscore/v1/spatialscore.proto`, its client and its server.

#![allow(missing_docs, clippy::doc_markdown)]

tonic::include_proto!("spatialscore.v1");

/// The descriptors of the contract, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
