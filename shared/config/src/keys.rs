//! The keys of a file: flags of a command line, under each of their names.

use std::borrow::Cow;

use clap::Arg;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use crate::fault::FaultAt;

/// A key where it stands in a file.
pub type Key<'a> = Spanned<Cow<'a, str>>;

/// The keys that a table may have. They are flags of the command line, under each of their names, with `_` in place of `-`.
#[derive(Clone, Debug, Default)]
pub struct Keys(Vec<(String, String)>);

impl Keys {
    /// Those of these flags.
    pub fn of<'f>(flags: impl IntoIterator<Item = &'f Arg>) -> Self {
        let names = flags.into_iter().flat_map(|flag| {
            let id = flag.get_id().as_str();
            let aliases = flag.get_all_aliases().unwrap_or_default();
            [id].into_iter()
                .chain(aliases)
                .map(|name| (name.replace('-', "_"), id.to_owned()))
                .collect::<Vec<_>>()
        });
        Self(names.collect())
    }

    /// The id of the flag that a name stands for.
    pub fn canonical(&self, name: &str) -> Option<&str> {
        let name = name.replace('-', "_");
        self.0
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, id)| id.as_str())
    }

    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }
}

/// Puts a value under the id that its key stands for.
///
/// # Errors
/// If the id has a value already, under another of its names.
pub fn insert<'a>(
    table: &mut DeTable<'a>,
    id: &str,
    key: &Key<'a>,
    value: Spanned<DeValue<'a>>,
) -> Result<(), FaultAt> {
    let canonical = Spanned::new(key.span(), Cow::Owned(id.to_owned()));
    match table.insert(canonical, value) {
        None => Ok(()),
        Some(_) => {
            let message = format!(
                "`{}` is set already: it is another name of `{id}`",
                key.get_ref()
            );
            Err(FaultAt::new(key.span(), message))
        }
    }
}
