//! The executable `ttf`; see [`forwarder::args`].

use std::process::ExitCode;

fn main() -> ExitCode {
    forwarder::args::main()
}
