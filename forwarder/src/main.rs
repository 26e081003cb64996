//! The executable `ttf`; see [`forwarder::exit`].

use std::process::ExitCode;

fn main() -> ExitCode {
    forwarder::exit::main()
}
