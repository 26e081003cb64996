//! What the tunnel costs: time, on this machine and in AWS, and money.
//!
//! [`cloud`] runs the functions' executables as Lambda does, in a stand-in for the rest of AWS that takes as long as AWS and counts
//! what AWS bills: [`lambda`] is the runtime API, [`visitors`] the HTTP API and the function URL, [`websocket`] the WebSocket API
//! and @connections, [`tables`] DynamoDB, [`latency`] how long each takes, [`meter`] what is counted. [`cost`] computes the cost of
//! that, and has the formula of docs/cost.md. [`origin`] and [`load`] are the two ends of a measurement, [`processes`] starts
//! executables, and [`one_machine`] compares `tunnel-local` with similar programs, also under load that is not at its limit, and
//! measures what agents cost that do nothing.
//!
//! `cargo bench -p tunnel-bench` measures and writes docs/performance.md. Nothing here is shipped.

pub mod cloud;
pub mod cost;
mod idle_agents;
pub mod lambda;
pub mod latency;
pub mod load;
pub mod meter;
pub mod one_machine;
pub mod origin;
pub mod processes;
pub mod tables;
mod under_load;
pub mod visitors;
pub mod websocket;
