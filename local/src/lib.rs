//! The whole tunnel in one process: the four functions behind a real HTTP and WebSocket front, with an embedded DynamoDB engine.
//!
//! [`Server`] assembles it according to [`Options`]. `front` has the sockets: visitors' requests and agents' connections; `tls` their
//! certificates. The crate `tunnel-local-aws` stands in for AWS. `operator` is what an operator sees while it runs, `supervision` what a
//! service manager is told. `sam_invoke` serves the sample events, and [`admin`] is what an operator does to the tables. The functions
//! are the ones that run in Lambda; they call DynamoDB with the SDK's client, on loopback.

pub mod admin;
pub mod cli;
mod config_file;
mod console;
mod document;
mod front;
mod functions;
mod health;
mod operator;
mod options;
mod sam_invoke;
mod server;
mod subsystem;
mod supervision;
mod tls;

pub use front::handshake::accept_key;
pub use operator::{AccessLogFormat, AccessLogFormatError, AccessLogOptions, AccessLogTarget};
pub use options::{Options, OptionsError, Transport};
pub use server::{Server, ServerError};
pub use tls::{AcmeOptions, TlsError, TlsOptions};
