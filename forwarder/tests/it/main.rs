//! The executable `ttf` between a scripted service and scripted local services.
#![cfg(unix)]
#![allow(clippy::panic, reason = "a test that goes wrong ends here")]

mod commands;
mod connection;
mod console;
mod executable;
mod first_connection;
mod harness;
mod inspector;
mod served;
mod uploads;
