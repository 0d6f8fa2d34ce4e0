//! The messages of `proto/`, their clients and servers.

#![allow(missing_docs, clippy::doc_markdown)]

tonic::include_proto!("spatialscore.v1");

/// gRPC's own health protocol.
pub mod health {
    tonic::include_proto!("grpc.health.v1");
}

/// The descriptors of the contract, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// The same, and the operator's own contract.
#[cfg(test)]
pub const ALL_DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/all_descriptors.bin"));
