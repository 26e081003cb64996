//! The whole tunnel in one process: the four functions behind a real HTTP and WebSocket front, with an embedded DynamoDB engine.
//!
//! [`Server`] puts it together as [`Options`] say. `front` has the sockets: visitors' requests and agents' connections. What
//! stands in for AWS is the crate `tunnel-local-aws`. `sam_invoke` is the other side of the sample events, and [`admin`] what an
//! operator does to the tables. The functions are the very ones that run in Lambda; what they ask of DynamoDB they ask with the
//! SDK's client, on loopback.

pub mod admin;
pub mod cli;
mod console;
mod front;
mod functions;
mod options;
mod sam_invoke;
mod server;
mod subsystem;

pub use front::handshake::accept_key;
pub use options::{JwtIssuer, Options, OptionsError, Transport};
pub use server::{Server, ServerError};
