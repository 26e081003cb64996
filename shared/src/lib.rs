//! What the agent and the functions agree on: the wire protocol, identifiers, limits, routing and HTTP header rules.
//!
//! Without features this crate knows neither AWS nor an async runtime. The `bodies` feature adds what both ends of a body need:
//! taking it in pieces and packing them. The `cloud` feature
//! adds what the Lambda functions share: settings, the DynamoDB tables, @connections, replies and telemetry. It is the only
//! place in the workspace that names an AWS client.

pub mod access;
pub mod cidr;
#[cfg(feature = "bodies")]
pub mod gathering;
pub mod headers;
pub mod id;
pub mod limits;
#[cfg(feature = "bodies")]
pub mod packing;
pub mod parts;
pub mod protocol;
pub mod routing;

#[cfg(feature = "cloud")]
pub mod cloud;
