//! What each package may depend on. Features and habit change what is compiled; this is the wall.

#![allow(clippy::panic, reason = "a story that goes wrong ends here")]
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "so does this")]

use std::{collections::BTreeSet, process::Command};

/// All packages that `package` is built from, on this platform, except itself.
fn dependencies(package: &str) -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--locked", "--package", package])
        .args(["--edges", "no-dev", "--prefix", "none", "--format", "{p}"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo tree: {stderr}");
    let lines = String::from_utf8(output.stdout).expect("text");
    lines
        .lines()
        .filter_map(|line| line.split(' ').next())
        .filter(|name| !name.is_empty() && *name != package)
        .map(str::to_owned)
        .collect()
}

const WORKSPACE: [&str; 9] = [
    "tunnel-config",
    "tunnel-protocol",
    "tunnel-service",
    "tunnel-connect",
    "tunnel-default",
    "tunnel-disconnect",
    "tunnel-forward",
    "forwarder",
    "local",
];

#[test]
fn packages_depend_only_downwards_and_no_function_on_another() {
    let function: &[&str] = &["tunnel-protocol", "tunnel-service"];
    for (package, allowed) in [
        ("tunnel-config", &[][..]),
        ("tunnel-protocol", &[]),
        ("tunnel-service", &["tunnel-protocol"]),
        ("tunnel-connect", function),
        ("tunnel-default", function),
        ("tunnel-disconnect", function),
        ("tunnel-forward", function),
        ("forwarder", &["tunnel-config", "tunnel-protocol"]),
    ] {
        let reached = dependencies(package);
        let reached: Vec<_> = WORKSPACE
            .iter()
            .filter(|name| reached.contains(**name))
            .collect();
        let allowed: Vec<_> = allowed.iter().collect();
        assert_eq!(reached, allowed, "{package}");
    }
}

#[test]
fn the_agent_and_the_protocol_know_nothing_of_aws() {
    let is_of_aws = |name: &String| name.starts_with("aws") || name.starts_with("lambda");
    for package in ["tunnel-protocol", "forwarder"] {
        let reached = dependencies(package);
        assert!(reached.len() > 20, "{package}: {reached:?}");
        let of_aws: Vec<_> = reached.iter().filter(|name| is_of_aws(name)).collect();
        assert!(of_aws.is_empty(), "{package} reaches {of_aws:?}");
    }
    // The names are those that AWS's crates have.
    assert!(dependencies("tunnel-service").iter().any(is_of_aws));
}
