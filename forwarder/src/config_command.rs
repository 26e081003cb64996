//! `ttf config`: the config file found, checked and edited.

use std::{
    fmt::Write,
    io,
    path::{Path, PathBuf},
    process::Command,
};

use tunnel_config::ConfigFileError;

use crate::{config_file::ConfigFile, login, settings::Settings};

/// What a new config file has.
const NEW_FILE: &str = "\
# The agent's config file. Every flag of `ttf --help` is a key here, with _ in place of -.
# endpoint = \"https://tunnel.example.com\"
# token = \"ttf_...\"

# [tunnels.web]
# target = 3000
# tunnel_id = \"my-app\"
";
/// The editor if the environment names none.
const DEFAULT_EDITOR: &str = if cfg!(windows) { "notepad" } else { "vi" };

/// `ttf config edit`.
#[derive(Debug)]
pub(crate) struct Edit {
    /// The editor with its arguments, if one is chosen.
    pub editor: Option<String>,
    /// The file.
    pub file: PathBuf,
}

/// Why a file could not be edited.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EditError {
    /// The file cannot be made.
    #[error("cannot write {path}: {source}")]
    Unwritable {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The editor does not start, or fails.
    #[error(
        "the editor {editor} failed ({reason}): choose another with the environment variable EDITOR"
    )]
    Editor {
        /// The editor.
        editor: String,
        /// Why.
        reason: String,
    },
    /// What was written cannot be used.
    #[error(transparent)]
    File(#[from] ConfigFileError),
}

/// Says what the config files have, after these tunnels in them were checked.
pub(crate) fn check(files: &[PathBuf], file: &ConfigFile, tunnels: &[Settings]) -> String {
    let mut text = String::new();
    for path in files {
        let _ = writeln!(text, "{}: good", path.display());
    }
    if files.is_empty() {
        text.push_str("there is no config file; `ttf login ENDPOINT` makes one\n");
    }
    for (name, endpoint) in file
        .services
        .iter()
        .map(|(name, layer)| (name, &layer.endpoint))
    {
        let endpoint = endpoint.as_ref().map(ToString::to_string);
        let _ = writeln!(
            text,
            "service {name}: {}",
            endpoint.as_deref().unwrap_or("no endpoint")
        );
    }
    for tunnel in tunnels {
        let id = tunnel
            .tunnel_id
            .as_ref()
            .map_or("a random tunnel id", |id| id.as_str());
        let _ = writeln!(
            text,
            "tunnel {}: {} at {} as {id}",
            tunnel.name, tunnel.target, tunnel.endpoint
        );
    }
    text.truncate(text.trim_end().len());
    text
}

/// Opens the file in the editor, and checks what was written. Returns what to tell the user.
///
/// # Errors
/// If that is impossible, or what was written cannot be used.
pub(crate) fn edit(edit: &Edit) -> Result<String, EditError> {
    let path = edit.file.as_path();
    if !path.exists() {
        login::write(path, NEW_FILE).map_err(|source| EditError::Unwritable {
            path: path.display().to_string(),
            source,
        })?;
    }
    let editor = edit.editor.as_deref().unwrap_or(DEFAULT_EDITOR);
    run(editor, path).map_err(|reason| EditError::Editor {
        editor: editor.to_owned(),
        reason,
    })?;
    ConfigFile::read(path)?;
    Ok(format!("{}: good", path.display()))
}

fn run(editor: &str, path: &Path) -> Result<(), String> {
    let mut words = editor.split_whitespace();
    let program = words.next().unwrap_or(DEFAULT_EDITOR);
    let status = Command::new(program)
        .args(words)
        .arg(path)
        .status()
        .map_err(|error| error.to_string())?;
    if status.success() {
        Ok(())
    } else {
        Err(status.to_string())
    }
}
