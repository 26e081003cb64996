//! The executable `ttf`; see [`forwarder::exit`].

use std::process::ExitCode;

/// It takes a sixth less processor time for a request than glibc's at 256 connections: docs/performance.md. Elsewhere it is not
/// measured, and on ARM it would have to know the size of memory pages when it is built.
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    forwarder::exit::main()
}
