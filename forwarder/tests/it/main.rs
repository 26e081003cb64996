//! The executable `ttf` between a scripted service and scripted local services.
#![cfg(unix)]
#![allow(clippy::panic, reason = "a test that goes wrong ends here")]

mod connection;
mod executable;
mod harness;
mod uploads;
