//! The config file, in TOML. docs/agent.md lists the keys.

use std::{collections::BTreeMap, fmt, marker::PhantomData, path::Path, str::FromStr};

use serde::{
    Deserialize, Deserializer,
    de::{Error, IntoDeserializer, Visitor},
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use crate::settings::{Layer, Secret};

/// A config file.
#[derive(Clone, Debug, Default)]
pub(crate) struct ConfigFile {
    /// What is logged on stderr.
    pub log_level: Option<String>,
    /// Whether a terminal shows the console.
    pub console: Option<bool>,
    /// The top of the file: defaults of all tunnels, and the single tunnel of a file without `[tunnels]`.
    pub top: Layer,
    /// The tables `[tunnels.NAME]`.
    pub tunnels: BTreeMap<String, Layer>,
}

/// A config file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigFileError {
    /// It cannot be read.
    #[error("cannot read {path}: {source}")]
    Unreadable {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// It is not TOML, or has keys or values it may not have.
    #[error("{path}, line {line}: {message}")]
    Content {
        /// The file.
        path: String,
        /// Where.
        line: usize,
        /// Why, without what stands there: it may be a secret.
        message: String,
    },
}

/// A fault in a file's text.
#[derive(Debug)]
struct Fault {
    line: usize,
    message: String,
}

impl ConfigFile {
    /// Reads a file.
    ///
    /// # Errors
    /// If it cannot be read or has a fault: the text names line and key.
    pub(crate) fn read(path: &Path) -> Result<Self, ConfigFileError> {
        let name = || path.display().to_string();
        let text = std::fs::read_to_string(path).map_err(|source| ConfigFileError::Unreadable {
            path: name(),
            source,
        })?;
        Self::parse(&text).map_err(|Fault { line, message }| ConfigFileError::Content {
            path: name(),
            line,
            message,
        })
    }

    fn parse(text: &str) -> Result<Self, Fault> {
        let fault = |error: toml::de::Error| Fault {
            line: error.span().map_or(1, |span| line(text, span.start)),
            message: error.message().to_owned(),
        };
        let table = DeTable::parse(text).map_err(fault)?;
        let span = table.span();
        let mut top = table.into_inner();
        if let Some((key, _)) = top.get_key_value("tunnel") {
            return Err(Fault {
                line: line(text, key.span().start),
                message: "tables of tunnels must be named [tunnels.NAME]".to_owned(),
            });
        }
        let log_level = top.remove("log_level");
        let console = top.remove("console");
        let tunnels = top.remove("tunnels");
        Ok(Self {
            log_level: log_level.map(value).transpose().map_err(fault)?,
            console: console.map(value).transpose().map_err(fault)?,
            tunnels: tunnels
                .map(value)
                .transpose()
                .map_err(fault)?
                .unwrap_or_default(),
            top: value(Spanned::new(span, DeValue::Table(top))).map_err(fault)?,
        })
    }
}

fn value<'de, T: Deserialize<'de>>(value: Spanned<DeValue<'de>>) -> Result<T, toml::de::Error> {
    T::deserialize(value.into_deserializer())
}

/// The number of the line that has this byte.
fn line(text: &str, at: usize) -> usize {
    let before = text.get(..at).unwrap_or_default();
    before.matches('\n').count() + 1
}

/// A secret, whose faults do not show it.
pub(crate) fn secret<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Secret>, D::Error> {
    String::deserialize(deserializer)
        .map(|text| Some(text.into()))
        .map_err(|_| D::Error::custom("must be a string in quotes"))
}

/// A list of secrets, whose faults do not show them.
pub(crate) fn secrets<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<Secret>>, D::Error> {
    Vec::<String>::deserialize(deserializer)
        .map(|texts| Some(texts.into_iter().map(Secret::from).collect()))
        .map_err(|_| D::Error::custom("must be a list of strings in quotes"))
}

/// A value with a textual form, written as that text or, as in `target = 3000`, as a number.
pub(crate) fn parsed<'de, D: Deserializer<'de>, T: FromStr<Err: fmt::Display>>(
    deserializer: D,
) -> Result<Option<T>, D::Error> {
    struct Text<T>(PhantomData<T>);

    impl<T: FromStr<Err: fmt::Display>> Visitor<'_> for Text<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a string in quotes")
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
            text.parse().map_err(E::custom)
        }

        fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_f64<E: Error>(self, number: f64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }
    }

    deserializer.deserialize_any(Text(PhantomData)).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::settings::HostHeader;

    #[test]
    fn a_file_is_read() {
        let file = ConfigFile::parse(
            "endpoint = 'wss://x.example.com/dev'\ntoken = 't'\nlog_level = 'info'\nrequest_timeout = '30s'\n\
             [tunnels.web]\nport = 3000\nsubdomain = 'my-app'\nhost_header = 'preserve'\n\
             target_insecure = true\ncompression = false\n",
        )
        .expect("a good file");
        let web = &file.tunnels["web"];
        assert_eq!(file.log_level.as_deref(), Some("info"));
        assert_eq!(
            file.top.request_timeout.map(|time| time.as_secs()),
            Some(30)
        );
        assert_eq!(web.target, Some("3000".parse().expect("a target")));
        assert_eq!(web.host_header, Some(HostHeader::Preserve));
        assert_eq!(web.target_insecure, Some(true));
        assert_eq!(web.compression, Some(false));
    }

    #[test]
    fn errors_in_the_file_give_the_line_and_what_would_be_right() {
        for (text, line, words) in [
            ("endpoint = 'wss://x'\nendpiont = 1\n", 2, "endpiont"),
            ("[tunnels.web]\nprot = 1\n", 2, "prot"),
            ("\n\ntunnel_id = 'NO'\n", 3, "tunnel id"),
            ("target = 70000\n", 1, "1 to 65535"),
            ("target = -1\n", 1, "a target must be a port (3000)"),
            ("target = 3000.5\n", 1, "a target must be a port (3000)"),
            ("\ntarget = [3000]\n", 2, "a string in quotes"),
            ("target = true\n", 1, "a string in quotes"),
            ("request_timeout = 30\n", 1, "time unit needed"),
            ("[tunnel.web]\n", 1, "[tunnels.NAME]"),
            ("basic_auth = 'alice:swordfish'\n", 1, "a list"),
            ("token = ['swordfish']\n", 1, "a string"),
            ("token = 'swordfish\n", 1, ""),
        ] {
            let fault = ConfigFile::parse(text).expect_err("a bad file");
            assert!(
                fault.line == line
                    && fault.message.contains(words)
                    && !fault.message.contains("sword"),
                "{text}: {fault:?}"
            );
        }
    }
}
