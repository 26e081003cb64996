//! The config files, in TOML. docs/agent.md lists the keys, which are those of the flags.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
    marker::PhantomData,
    ops::Range,
    path::{Path, PathBuf},
    str::FromStr,
};

use clap::{Args, Command};
use etcetera::{BaseStrategy, choose_base_strategy};
use serde::{
    Deserialize, Deserializer,
    de::{Error, IntoDeserializer, Visitor},
};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};
use tunnel_config::{ConfigFileError, FaultAt, Key, Keys, closest, insert};

use crate::settings::{Layer, ProcessLayer, Secret};

/// Where the files of a user are. A user without a home has none.
pub(crate) fn user_directory() -> Option<PathBuf> {
    Some(choose_base_strategy().ok()?.config_dir().join("ttf"))
}

/// The file that is read without being named.
pub(crate) fn default_path() -> Option<PathBuf> {
    Some(user_directory()?.join("config.toml"))
}

/// What stands in one config file, or in several that were put over each other.
#[derive(Clone, Debug, Default)]
pub(crate) struct ConfigFile {
    /// What concerns the process and not one of its tunnels.
    pub process: ProcessLayer,
    /// The top of the file: defaults of all tunnels, and the single tunnel of a file without `[tunnels]`.
    pub top: Layer,
    /// The tables `[services.NAME]`: services that tunnels choose by name.
    pub services: BTreeMap<String, Layer>,
    /// The tables `[tunnels.NAME]`.
    pub tunnels: BTreeMap<String, Layer>,
}

/// Keys whose values may be secrets.
const SECRET_KEYS: [&str; 5] = ["token", "basic_auth", "require_header", "proxy", "header"];
/// Keys of tables with names of the user's own.
const TABLES: [&str; 2] = ["services", "tunnels"];

/// The page that describes the file.
const DOCUMENTATION: &str = "docs/agent.md";

/// The keys that a file may have: those of the process, only at the top, and those of a tunnel.
struct FileKeys {
    process: Keys,
    layer: Keys,
}

impl FileKeys {
    fn known() -> Self {
        Self {
            process: Keys::of(ProcessLayer::augment_args(Command::new("")).get_arguments()),
            layer: Keys::of(Layer::augment_args(Command::new("")).get_arguments()),
        }
    }

    /// Whether the value of a key is none that may be a secret.
    fn shows(&self, name: &str) -> bool {
        self.layer
            .canonical(name)
            .or_else(|| self.process.canonical(name))
            .is_some_and(|key| !SECRET_KEYS.contains(&key))
    }

    /// What to say about a name that is none.
    fn unknown(&self, name: &str, is_top: bool) -> String {
        if !is_top && self.process.canonical(name).is_some() {
            return format!("`{name}` can only be set at the top level of the file");
        }
        if TABLES
            .iter()
            .any(|table| table.strip_suffix('s') == Some(name))
        {
            return format!("tables of {name}s must be named [{name}s.NAME]");
        }
        let mut known: Vec<&str> = self.layer.names().collect();
        if is_top {
            known.extend(self.process.names());
            known.extend(TABLES);
        }
        match closest(name, known.iter().copied()) {
            Some(meant) => format!("unknown key `{name}`; did you mean `{meant}`?"),
            None => format!("unknown key `{name}`; {DOCUMENTATION} lists the keys"),
        }
    }
}

impl ConfigFile {
    /// Reads files and puts each over those before it.
    ///
    /// # Errors
    /// If one cannot be read or has a fault: the text names file, line and key.
    pub(crate) fn read_all(paths: &[PathBuf]) -> Result<Self, ConfigFileError> {
        paths.iter().try_fold(Self::default(), |under, path| {
            Ok(Self::read(path)?.over(under))
        })
    }

    /// Reads one file.
    ///
    /// # Errors
    /// As [`ConfigFile::read_all`].
    pub(crate) fn read(path: &Path) -> Result<Self, ConfigFileError> {
        let keys = FileKeys::known();
        tunnel_config::read(path, DOCUMENTATION, |key| keys.shows(key), Self::parse)
    }

    /// This file, and what it leaves open from `under`.
    fn over(self, under: Self) -> Self {
        let top = self.top.with_credentials_for_endpoint(&under.top);
        Self {
            process: self.process.or(&under.process),
            top,
            services: merge(self.services, under.services),
            tunnels: merge(self.tunnels, under.tunnels),
        }
    }

    /// What tunnels take from the file beside their own tables: the service of this name, if one is named, and the defaults.
    /// `None` if there is no such service.
    pub(crate) fn defaults(&self, service: Option<&str>) -> Option<Layer> {
        let Some(service) = service.or(self.top.service.as_deref()) else {
            return Some(self.top.clone());
        };
        let service = self.services.get(service)?;
        // Another service's token must not go there, and its certificates prove nothing here.
        let top = Layer {
            endpoint: None,
            token: None,
            endpoint_ca: None,
            ..self.top.clone()
        };
        Some(service.or(&top))
    }

    fn parse(text: &str) -> Result<Self, FaultAt> {
        let table = DeTable::parse(text).map_err(|error| FaultAt::syntax(&error))?;
        let span = table.span();
        let keys = FileKeys::known();
        let mut process = DeTable::new();
        let mut top = DeTable::new();
        let mut file = Self::default();
        for (key, value) in table.into_inner() {
            let name = key.get_ref().as_ref();
            match name {
                "tunnels" => file.tunnels = named_layers(&keys, &key, value)?,
                "services" => file.services = named_layers(&keys, &key, value)?,
                _ => match keys.process.canonical(name) {
                    Some(id) => insert(&mut process, id, &key, value)?,
                    None => insert(&mut top, layer_key(&keys, &key, true)?, &key, value)?,
                },
            }
        }
        file.process = read_table(process, span.clone())?;
        file.top = read_table(top, span)?;
        Ok(file)
    }
}

fn merge(
    mut over: BTreeMap<String, Layer>,
    under: BTreeMap<String, Layer>,
) -> BTreeMap<String, Layer> {
    for (name, layer) in under {
        match over.entry(name) {
            Entry::Occupied(mut entry) => {
                let merged = entry.get().with_credentials_for_endpoint(&layer);
                entry.insert(merged);
            }
            Entry::Vacant(entry) => {
                entry.insert(layer);
            }
        }
    }
    over
}

fn layer_key<'k>(keys: &'k FileKeys, key: &Key<'_>, is_top: bool) -> Result<&'k str, FaultAt> {
    let name = key.get_ref();
    keys.layer
        .canonical(name)
        .ok_or_else(|| FaultAt::new(key.span(), keys.unknown(name, is_top)))
}

fn named_layers(
    keys: &FileKeys,
    key: &Key<'_>,
    tables: Spanned<DeValue<'_>>,
) -> Result<BTreeMap<String, Layer>, FaultAt> {
    let kind = key.get_ref();
    let must_be_tables =
        |span| FaultAt::new(span, format!("`{kind}` must be tables [{kind}.NAME]"));
    let span = tables.span();
    let DeValue::Table(tables) = tables.into_inner() else {
        return Err(must_be_tables(span));
    };
    let mut layers = BTreeMap::new();
    for (name, table) in tables {
        let span = table.span();
        let DeValue::Table(table) = table.into_inner() else {
            return Err(must_be_tables(name.span()));
        };
        let mut canonical = DeTable::new();
        for (key, value) in table {
            insert(&mut canonical, layer_key(keys, &key, false)?, &key, value)?;
        }
        layers.insert(name.into_inner().into_owned(), read_table(canonical, span)?);
    }
    Ok(layers)
}

/// Reads values, and names the key of one that cannot be used.
fn read_table<'de, T: Deserialize<'de>>(
    table: DeTable<'de>,
    span: Range<usize>,
) -> Result<T, FaultAt> {
    let places: Vec<(Range<usize>, String)> = table
        .iter()
        .map(|(key, value)| (value.span(), key.get_ref().to_string()))
        .collect();
    let table = Spanned::new(span, DeValue::Table(table));
    T::deserialize(table.into_deserializer()).map_err(|error| {
        let fault = FaultAt::syntax(&error);
        let place = places
            .iter()
            .find(|(span, _)| span.contains(&fault.span.start));
        match place {
            Some((span, key)) => FaultAt::new(span.clone(), format!("`{key}`: {}", fault.message)),
            None => fault,
        }
    })
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

    fn fault(text: &str) -> String {
        let fault = ConfigFile::parse(text).expect_err("a bad file");
        let keys = FileKeys::known();
        fault.in_text(text, |key| keys.shows(key)).to_string()
    }

    #[test]
    fn a_file_is_read() {
        let file = ConfigFile::parse(
            "endpoint = 'wss://x.example.com/dev'\ntoken = 't'\nlog_level = 'info'\nrequest_timeout = '30s'\n\
             [services.work]\nendpoint = 'wss://w.example.com'\n\
             [tunnels.web]\nport = 3000\nsubdomain = 'my-app'\nhost-header = 'preserve'\n\
             target_insecure = true\ncompression = false\n",
        )
        .expect("a good file");
        let web = &file.tunnels["web"];
        assert_eq!(file.process.log_level.as_deref(), Some("info"));
        assert_eq!(
            file.top.request_timeout.map(|time| time.as_secs()),
            Some(30)
        );
        assert_eq!(web.target, Some("3000".parse().expect("a target")));
        assert_eq!(web.tunnel_id, Some("my-app".parse().expect("an id")));
        assert_eq!(web.host_header, Some(HostHeader::Preserve));
        assert_eq!(web.target_insecure, Some(true));
        assert_eq!(web.compression, Some(false));
        assert!(file.services.contains_key("work"));
    }

    /// Files, where their fault is, and what is said about it.
    const FAULTS: &[(&str, &str, &str)] = &[
        (
            "endpoint = 'wss://x'\nendpiont = 1\n",
            "2:1",
            "unknown key `endpiont`; did you mean `endpoint`?",
        ),
        (
            "[tunnels.web]\n  targt = 1\n",
            "2:3",
            "did you mean `target`?",
        ),
        ("zzz = 1\n", "1:1", "docs/agent.md"),
        ("\n\ntunnel_id = 'NO'\n", "3:13", "`tunnel_id`: a tunnel id"),
        (
            "target = 70000\n",
            "1:10",
            "`target`: a target must be a port (3000)",
        ),
        ("target = 70000\n", "1:10", "1 to 65535"),
        ("target = -1\n", "1:10", "a target must be a port (3000)"),
        (
            "target = 3000.5\n",
            "1:10",
            "a target must be a port (3000)",
        ),
        (
            "\ntarget = [3000]\n",
            "2:10",
            "`target`: invalid type: sequence, expected a string in quotes",
        ),
        ("target = true\n", "1:10", "a string in quotes"),
        (
            "request_timeout = 30\n",
            "1:19",
            "`request_timeout`: time unit needed",
        ),
        ("[tunnel.web]\n", "1:2", "[tunnels.NAME]"),
        ("tunnels = 3\n", "1:11", "`tunnels` must be tables"),
        (
            "[tunnels.web]\nlog_level = 'info'\n",
            "2:1",
            "only be set at the top level",
        ),
        ("port = 1\ntarget = 2\n", "", "another name of `target`"),
        (
            "basic_auth = 'alice:swordfish'\n",
            "1:14",
            "`basic_auth`: must be a list",
        ),
        (
            "token = ['swordfish']\n",
            "1:9",
            "`token`: must be a string",
        ),
        ("token = 'swordfish\n", "1:", ""),
        ("tokn = 'swordfish'\n", "1:1", "did you mean `token`?"),
        (
            "basic_auth = [\n'alice:swordfish',\n3]\n",
            "1:14",
            "must be a list",
        ),
        ("basic_auth = [\n'alice:swordfish\n", "2:", ""),
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
        assert_eq!(
            fault("[tunnels.web]\n  targt = 3000\n"),
            "2:3: unknown key `targt`; did you mean `target`?\n  2 |   targt = ...\n    |   ^^^^^"
        );
        assert!(fault("a = 1\nrequest_timeout = 30").contains("a = ..."));
        assert!(
            fault("request_timeout = 30")
                .ends_with("\n  1 | request_timeout = 30\n    |                   ^^")
        );
        assert!(fault("token = 30").contains("| token = ...\n"));
        assert!(!fault("header = ['x', 30]").contains("'x'"));
    }

    #[test]
    fn a_fault_shows_no_token_and_no_password_wherever_they_were_put() {
        const OWN: &str = "ttf_0123456789abcdef0123456789abcdef";
        const JWT: &str = "eyJhbGciOiJIUzI1NiJ9.eyJhIjoxfQ.c2ln";
        for secret in [OWN, JWT] {
            for text in [
                format!("endpoint = '{secret}'\n"),
                format!("endpoint = \"{secret}\" # mine\n"),
                format!("endpoint = 3 # not {secret}\n"),
                format!("target = ['x', '{secret}']\n"),
                format!("target_ca = [\"{secret}\"]\n"),
                format!("max_concurrent = '{secret}'\n"),
                format!("compression = '{secret}'\n"),
                format!("allow = '{secret}'\n"),
                format!("{secret} = 1\n"),
                format!("endpoint = {secret}\n"),
                format!("[tunnels.{secret}\n"),
                format!("[{secret}]\n"),
                format!("endpoint = 'http://{secret}'\n"),
                format!("endpoint = 'http://{secret}/_ws'\n"),
                format!("max_concurrent = 'token:{secret}'\n"),
                format!("[tunnels.{secret}]\n[tunnels.{secret}]\n"),
                format!("[tunnels.a]\n{secret}.x = 1\n"),
                format!("[tunnels.a]\ntunnel_id = 'a.{secret}'\n"),
            ] {
                let said = fault(&text);
                assert!(!said.contains(&secret[4..]), "{text}: {said}");
            }
        }
        for password in [
            "sword",
            "s=word",
            "x,#[sword]",
            "x{(sword)}",
            "x sword",
            "x\\\\sword",
            "x\\\"sword",
            "sword@x",
        ] {
            for text in [
                format!("max_concurrent = \"http://alice:{password}@proxy:3128\"\n"),
                format!("max_concurrent = \"http://alice:{password}@proxy:3128\" # @\n"),
                format!("compression = \"http://{OWN}:{password}@proxy:3128\"\n"),
                format!("compression = \"\"\"\n{password}@proxy\"\"\"\n"),
                format!("\"alice:{password}@proxy\" = 1\n"),
                format!("max_concurrent = 'a:pw@h {password} a:pw@h@{password}'\n"),
            ] {
                let said = fault(&text);
                assert!(!said.contains("word"), "{text}: {said}");
                assert!(!said.contains("alice"), "{text}: {said}");
            }
        }
        assert!(
            fault("max_concurrent = 'a:s=w,ord@h'\n").contains("\"(not shown)\", expected"),
            "what is no secret is still said"
        );
        let said = fault("endpoint = 'wss://alice:swordfish@x'\n");
        assert!(!said.contains("swordfish"), "{said}");
        assert!(said.contains("  1 | endpoint = ..."), "{said}");
    }

    #[test]
    fn a_file_over_another_changes_what_it_sets() {
        let under = ConfigFile::parse(
            "endpoint = 'wss://x.example.com'\ntoken = 't'\ntarget = 1\n[tunnels.web]\ntarget = 2\nallow = ['::1']\n",
        );
        let over = ConfigFile::parse("[tunnels.web]\ntarget = 3\n[tunnels.api]\n");
        let both = over.expect("a file").over(under.expect("a file"));
        assert!(both.top.token.is_some());
        assert_eq!(both.tunnels.len(), 2);
        let web = &both.tunnels["web"];
        assert_eq!(web.target, Some("3".parse().expect("a target")));
        assert!(web.allow.is_some());
    }

    #[test]
    fn a_token_does_not_go_to_another_files_endpoint() {
        let under = || {
            ConfigFile::parse("endpoint = 'wss://x.example.com'\ntoken = 't'\n").expect("a file")
        };
        for (text, has_token) in [
            ("target = 1\n", true),
            ("endpoint = 'wss://x.example.com'\n", true),
            ("endpoint = 'wss://evil.example.com'\n", false),
        ] {
            let over = ConfigFile::parse(text).expect("a file");
            assert_eq!(over.over(under()).top.token.is_some(), has_token, "{text}");
        }
    }

    #[test]
    fn a_named_service_stands_in_for_the_one_at_the_top() {
        let file = ConfigFile::parse(
            "endpoint = 'wss://x.example.com'\ntoken = 't'\ntarget = 7\n[services.open]\nendpoint = 'wss://o.example.com'\n",
        )
        .expect("a file");
        let open = file.defaults(Some("open")).expect("a service");
        assert_eq!(
            open.endpoint.map(|endpoint| endpoint.to_string()),
            Some("wss://o.example.com/".to_owned())
        );
        assert!(open.token.is_none());
        assert!(open.target.is_some());
        assert!(file.defaults(Some("other")).is_none());
        assert!(file.defaults(None).expect("the top").token.is_some());
    }
}
