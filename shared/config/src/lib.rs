//! What the config files of all executables have in common: TOML whose keys are the names of flags, and faults that say where they
//! are.
//!
//! [`read`] reads a file, [`Keys`] knows the keys, and [`FaultAt`] becomes a [`Fault`] that shows its line. What the values mean is
//! up to each executable.

mod fault;
mod keys;
mod secret;
mod suggestion;

use std::path::Path;

pub use fault::{Fault, FaultAt};
pub use keys::{Key, Keys, insert};
pub use secret::{is_like_a_token, may_be_secret};
pub use suggestion::closest;

/// A config file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigFileError {
    /// It cannot be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// It is a config file of another program.
    #[error("{path} is YAML: config files are TOML, see {documentation} for an example")]
    Yaml {
        /// The file.
        path: String,
        /// The page that describes the file.
        documentation: &'static str,
    },
    /// It is not TOML, or has keys or values it may not have.
    #[error("{path}:{fault}")]
    Content {
        /// The file.
        path: String,
        /// What is wrong, and where.
        fault: Fault,
    },
}

/// Reads a file as `parse` understands it. `documentation` is the page that describes it, and `shows` tells whether the value of a
/// key may be shown when its line has a fault.
///
/// # Errors
/// If it cannot be read or has a fault: the text names file, line and key.
pub fn read<T>(
    path: &Path,
    documentation: &'static str,
    shows: impl Fn(&str) -> bool,
    parse: impl FnOnce(&str) -> Result<T, FaultAt>,
) -> Result<T, ConfigFileError> {
    let name = || path.display().to_string();
    let text = std::fs::read_to_string(path).map_err(|source| ConfigFileError::Unreadable {
        path: name(),
        source,
    })?;
    parse(&text).map_err(|fault| match path.extension() {
        Some(extension) if extension == "yml" || extension == "yaml" => ConfigFileError::Yaml {
            path: name(),
            documentation,
        },
        _ => ConfigFileError::Content {
            path: name(),
            fault: fault.in_text(&text, shows),
        },
    })
}
