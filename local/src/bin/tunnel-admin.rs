//! The executable `tunnel-admin`; see [`local::admin`].

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    local::admin::main().await
}
