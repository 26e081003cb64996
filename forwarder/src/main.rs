//! The executable `ttf`; see [`forwarder::cli`].

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    forwarder::cli::main().await
}
