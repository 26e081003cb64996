//! The whole tunnel in one process: the four functions behind a real HTTP and WebSocket front, with an embedded DynamoDB engine.
//!
//! [`visitors`] is the HTTP front, [`agents`] the WebSocket API with its quotas, [`connections`] its @connections side,
//! [`dynamodb`] the engine with the tables of template.yaml. [`stack`] puts them together.
//! [`samples`] is the other side of the sample events, and [`admin`] what whoever runs the service does to its tables. The functions
//! are the very ones that run in Lambda; what they ask of DynamoDB they ask with the SDK's client, on loopback.

pub mod access;
pub mod admin;
pub mod agents;
pub mod cli;
pub mod connections;
pub mod dynamodb;
pub mod event;
pub mod proxies;
pub mod quotas;
pub mod samples;
pub mod stack;
pub mod strict;
pub mod visitors;

pub use stack::{Options, Stack};
