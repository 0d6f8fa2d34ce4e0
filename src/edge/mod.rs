//! The edge: everything between a caller and the [`Engine`](crate::engine::Engine).
//!
//! A call comes over [`transport`] (connections, TLS), passes the [`layers`] that every call passes (deadline, count, log, who
//! calls, how much at once), and ends in a handler of [`grpc`], the contract in [`proto`], or of [`http`], which puts the
//! JSON of trainers' own reward clients before it. [`auth`] says who may call.

pub mod auth;
pub mod grpc;
pub mod http;
pub mod layers;
pub mod proto;
pub mod transport;
