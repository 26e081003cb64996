//! The executable `tunnel-admin`; see [`local::admin`].

use std::process::ExitCode;

fn main() -> ExitCode {
    local::admin::main()
}
