//! Why a command line or a config file cannot be carried out.

use tunnel_config::ConfigFileError;
use tunnel_protocol::id::TunnelId;

use super::log_filter::LOG_TARGETS;
use crate::{background::BackgroundError, settings::LayerError};

/// A command line or file that cannot be carried out; the text says what to do.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UsageError {
    /// The file cannot be used.
    #[error(transparent)]
    File(#[from] ConfigFileError),
    /// Values are missing or cannot be used.
    #[error(transparent)]
    Settings(#[from] LayerError),
    /// Not a level, or a list of levels.
    #[error(
        "log_level: `{0}` is not a level (error, warn, info, debug, trace, off) and not TARGET=LEVEL, such as forwarder=debug; targets are {parts}",
        parts = LOG_TARGETS.join(", ")
    )]
    LogLevel(String),
    /// The directory of the user's files is not known.
    #[error(
        "there is no home directory, so the config file has no default place: pass one with --config"
    )]
    NoHome,
    /// No such service is stored.
    #[error("there is no service {name} in the config files; {known}")]
    UnknownService {
        /// The requested name.
        name: String,
        /// What there is.
        known: String,
    },
    /// `ttf login` without an endpoint.
    #[error("which service? `ttf login ENDPOINT`, such as `ttf login https://tunnel.example.com`")]
    NoLoginEndpoint,
    /// `ttf status` without a tunnel.
    #[error("which tunnel? `ttf status ID`, or its public URL in place of the id")]
    NoTunnel,
    /// The manual cannot be made.
    #[error("cannot write the manual: {0}")]
    Manual(std::io::Error),
    /// The service could not open a tunnel.
    #[error(transparent)]
    Background(BackgroundError),
    /// Not a command of `ttf config`.
    #[error(
        "there is no `ttf config {0}`; there are path, check and edit, and `ttf login ENDPOINT --token TOKEN` stores a token"
    )]
    ConfigCommand(String),
    /// The file is for `ttf start`.
    #[error("the config file has [tunnels]: open them with `ttf start --all` or `ttf start NAME`")]
    StartMissing,
    /// `ttf start` without a file that has tunnels.
    #[error(
        "`ttf start` needs a config file with [tunnels.NAME]: write one (`ttf config edit`), or pass one with --config"
    )]
    NoTunnels,
    /// `ttf start` without names.
    #[error("name the tunnels to start, or pass --all; the config file has: {0}")]
    NoNames(String),
    /// The file has no such tunnel.
    #[error("there is no tunnel {name} in the config file; it has: {known}")]
    UnknownName {
        /// The requested name.
        name: String,
        /// What there is.
        known: String,
    },
    /// One name twice on the command line.
    #[error("the tunnel {0} is named twice: name each once")]
    NamedTwice(String),
    /// A flag that only makes sense for one tunnel.
    #[error(
        "--tunnel-id and --target apply to a single tunnel: set them in the config file instead"
    )]
    ForOneTunnel,
    /// Two tunnels would take each other's place for ever.
    #[error(
        "the tunnels {first} and {second} have the same tunnel_id {tunnel_id}: give each a different one"
    )]
    SameTunnelId {
        /// One tunnel.
        first: String,
        /// The other.
        second: String,
        /// The id that both request.
        tunnel_id: TunnelId,
    },
}
