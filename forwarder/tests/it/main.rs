//! The executable `ttf` between a scripted service and scripted local services.
#![cfg(unix)]

mod executable;
mod harness;
mod uploads;
