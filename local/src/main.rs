//! The executable `tunnel-local`; see [`local::cli`].

use std::process::ExitCode;

fn main() -> ExitCode {
    local::cli::main()
}
