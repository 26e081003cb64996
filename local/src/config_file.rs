//! The config file: TOML whose keys are the flags of the command line. docs/local.md describes it.
//!
//! Its values stand in for the defaults of the flags, so that flags and the environment are over it, and whatever checks a flag
//! checks the file.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use clap::{
    Arg, ArgAction, Command,
    error::{ContextKind, ContextValue, ErrorKind},
};
use etcetera::{BaseStrategy, choose_base_strategy};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};
use tunnel_config::{ConfigFileError, FaultAt, Keys, closest, insert};

/// The page that describes the file.
const DOCUMENTATION: &str = "docs/local.md";
/// Flags that say what the process is to do, and not how.
const NO_KEYS: [&str; 2] = ["config", "samples"];

/// The values of a file.
#[derive(Debug)]
pub(crate) struct ConfigFile {
    values: Vec<(String, Vec<String>)>,
}

/// The file that is read without being named, if there is one: that of the user, or that of the machine.
pub(crate) fn default_path() -> Option<PathBuf> {
    let of_user = choose_base_strategy()
        .ok()
        .map(|strategy| strategy.config_dir().join("tunnel-local/config.toml"));
    let of_machine = cfg!(unix).then(|| PathBuf::from("/etc/tunnel-local/config.toml"));
    of_user
        .into_iter()
        .chain(of_machine)
        .find(|path| path.is_file())
}

impl ConfigFile {
    /// Reads a file with values for the flags of `command`.
    ///
    /// # Errors
    /// If it cannot be read or has a fault: the text names file, line and key.
    pub(crate) fn read(path: &Path, command: &Command) -> Result<Self, ConfigFileError> {
        let keys = keys(command);
        let shows = |name: &str| {
            keys.canonical(name)
                .and_then(|id| flag(command, id))
                .is_some_and(|flag| !flag.is_hide_env_values_set())
        };
        tunnel_config::read(path, DOCUMENTATION, shows, |text| {
            parse(text, command, &keys)
        })
    }

    /// The command with the file's values in place of its defaults.
    pub(crate) fn under(&self, command: Command) -> Command {
        self.values.iter().fold(command, |command, (id, values)| {
            command.mut_arg(id, |flag| flag.default_values(values.clone()))
        })
    }

    /// Whether the file has a value for a flag.
    pub(crate) fn sets(&self, id: &str) -> bool {
        self.values.iter().any(|(set, _)| set == id)
    }
}

fn keys(command: &Command) -> Keys {
    Keys::of(
        command
            .get_arguments()
            .filter(|flag| !NO_KEYS.contains(&flag.get_id().as_str())),
    )
}

fn flag<'c>(command: &'c Command, id: &str) -> Option<&'c Arg> {
    command
        .get_arguments()
        .find(|flag| flag.get_id().as_str() == id)
}

fn parse(text: &str, command: &Command, keys: &Keys) -> Result<ConfigFile, FaultAt> {
    let table = DeTable::parse(text).map_err(|error| FaultAt::syntax(&error))?;
    let mut canonical = DeTable::new();
    for (key, value) in table.into_inner() {
        let name = key.get_ref();
        let id = keys
            .canonical(name)
            .ok_or_else(|| FaultAt::new(key.span(), unknown(keys, name)))?;
        insert(&mut canonical, id, &key, value)?;
    }
    let mut values = Vec::new();
    for (key, value) in canonical {
        let id = key.into_inner().into_owned();
        let fault = |(span, message): (_, String)| FaultAt::new(span, format!("`{id}`: {message}"));
        let flag = flag(command, &id).expect("keys are ids of flags");
        let texts = texts(flag, value).map_err(fault)?;
        for text in texts.iter().filter(|_| flag.get_action().takes_values()) {
            check(command, flag, text.get_ref())
                .map_err(|message| fault((text.span(), message)))?;
        }
        let texts = texts.into_iter().map(Spanned::into_inner).collect();
        values.push((id, texts));
    }
    Ok(ConfigFile { values })
}

fn unknown(keys: &Keys, name: &str) -> String {
    match closest(name, keys.names()) {
        Some(meant) => format!("unknown key `{name}`; did you mean `{meant}`?"),
        None => format!("unknown key `{name}`; {DOCUMENTATION} lists the keys"),
    }
}

type Place = std::ops::Range<usize>;

/// What a value would be on the command line.
fn texts(flag: &Arg, value: Spanned<DeValue<'_>>) -> Result<Vec<Spanned<String>>, (Place, String)> {
    let span = value.span();
    let is_list = matches!(flag.get_action(), ArgAction::Append);
    match value.into_inner() {
        DeValue::Array(members) if is_list => {
            let members = members.into_iter().map(|member| {
                let span = member.span();
                text(flag, member.into_inner())
                    .map(|text| Spanned::new(span.clone(), text))
                    .ok_or((span, "must be a list of strings in quotes".to_owned()))
            });
            members.collect()
        }
        value => match text(flag, value) {
            Some(text) => Ok(vec![Spanned::new(span, text)]),
            None => Err((span, expected(flag, is_list).to_owned())),
        },
    }
}

fn expected(flag: &Arg, is_list: bool) -> &'static str {
    if !flag.get_action().takes_values() {
        "must be true or false"
    } else if is_list {
        "must be a string in quotes, or a list of them"
    } else {
        "must be a string in quotes or a number"
    }
}

/// A single value as text: true and false for flags that take no value, strings and numbers for the others.
fn text(flag: &Arg, value: DeValue<'_>) -> Option<String> {
    match (value, flag.get_action().takes_values()) {
        (DeValue::String(text), true) => Some(text.into_owned()),
        (DeValue::Integer(number), true) => Some(number.to_string()),
        (DeValue::Float(number), true) => Some(number.to_string()),
        (DeValue::Boolean(is_on), false) => Some(is_on.to_string()),
        _ => None,
    }
}

/// Checks a value as the command line would.
fn check(command: &Command, flag: &Arg, text: &str) -> Result<(), String> {
    let Some(long) = flag.get_long() else {
        return Ok(());
    };
    let arguments = [OsString::new(), format!("--{long}={text}").into()];
    // What is wrong with other flags or with the environment is not the file's fault.
    let Err(error) = command.clone().try_get_matches_from(arguments) else {
        return Ok(());
    };
    match error.kind() {
        ErrorKind::ValueValidation if names(&error, long) => {
            let source = std::error::Error::source(&error);
            Err(source.map_or_else(|| "is not valid".to_owned(), ToString::to_string))
        }
        ErrorKind::InvalidValue if names(&error, long) => {
            let Some(ContextValue::Strings(known)) = error.get(ContextKind::ValidValue) else {
                return Err("is not valid".to_owned());
            };
            if known.is_empty() {
                return Err("must not be empty".to_owned());
            }
            let meant = closest(text, known.iter().map(String::as_str))
                .map(|meant| format!("; did you mean `{meant}`?"))
                .unwrap_or_default();
            Err(format!("must be one of {}{meant}", known.join(", ")))
        }
        _ => Ok(()),
    }
}

/// Whether an error is about the flag with this name.
fn names(error: &clap::Error, long: &str) -> bool {
    let Some(ContextValue::String(flag)) = error.get(ContextKind::InvalidArg) else {
        return false;
    };
    let name = flag.strip_prefix("--").unwrap_or(flag);
    name.split(|c: char| c.is_whitespace() || c == '=').next() == Some(long)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::command;

    fn fault(text: &str) -> String {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("config.toml");
        std::fs::write(&path, text).expect("written");
        let said = ConfigFile::read(&path, &command()).expect_err("a bad file");
        let said = said.to_string();
        let place = said.strip_prefix(&format!("{}:", path.display()));
        place.expect("the file's name").to_owned()
    }

    /// Files, where their fault is, and what is said about it.
    const FAULTS: &[(&str, &str, &str)] = &[
        (
            "listen = '127.0.0.1:1'\nlistn = 1\n",
            "2:1",
            "did you mean `listen`?",
        ),
        ("zzz = 1\n", "1:1", "docs/local.md"),
        ("samples = true\n", "1:1", "unknown key `samples`"),
        ("[tunnels.web]\n", "1:2", "unknown key `tunnels`"),
        (
            "auth = 'tokn'\n",
            "1:8",
            "`auth`: must be one of open, token, jwt; did you mean `token`?",
        ),
        (
            "listen = 'here'\n",
            "1:10",
            "`listen`: must be an IP address and a port",
        ),
        ("data = ''\n", "1:8", "`data`: must not be empty"),
        ("max_connection_age = 30\n", "1:22", "time unit needed"),
        (
            "max_concurrent_requests = -1\n",
            "1:27",
            "`max_concurrent_requests`: ",
        ),
        (
            "any_host = 'yes'\n",
            "1:12",
            "`any_host`: must be true or false",
        ),
        (
            "listen = true\n",
            "1:10",
            "must be a string in quotes or a number",
        ),
        (
            "listen = ['127.0.0.1:1']\n",
            "1:10",
            "must be a string in quotes or a number",
        ),
        (
            "trust_proxy = ['10.0.0.0/8', 'x']\n",
            "1:30",
            "`trust_proxy`: ",
        ),
        (
            "trust_proxy = ['10.0.0.0/8', true]\n",
            "1:30",
            "must be a list of strings",
        ),
        (
            "jwt_secret = ['swordfish']\n",
            "1:14",
            "`jwt_secret`: must be a string",
        ),
        ("jwt_secret = 'swordfish\n", "1:", ""),
        (
            "listen = '[::1]:1'\nlisten = '[::1]:2'\n",
            "2:1",
            "duplicate key",
        ),
    ];

    #[test]
    fn a_fault_has_its_line_column_key_and_what_would_be_right() {
        for (text, place, words) in FAULTS {
            let said = fault(text);
            assert!(
                said.starts_with(place) && said.contains(words) && !said.contains("sword"),
                "{text}: {said}"
            );
        }
    }

    #[test]
    fn a_fault_shows_its_line_unless_that_may_be_a_secret() {
        assert!(fault("auth = 'x'").ends_with("\n  1 | auth = 'x'\n    |        ^^^"));
        assert!(fault("jwt_secret = true").contains("| jwt_secret = ...\n"));
    }
}
