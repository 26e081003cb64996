//! The functions' settings: environment variables, read once at start, with every fault reported and not just the first.

use std::{cell::RefCell, fmt, str::FromStr};

type Read<'a> = dyn Fn(&str) -> Option<String> + 'a;

/// Reads variables and remembers what was wrong with them.
///
/// ```
/// # use tunnel_service::settings::Variables;
/// let variables = Variables::new(|name| (name == "PORT").then(|| "x".to_owned()));
/// let port: Option<u16> = variables.required("PORT");
/// let name: Option<String> = variables.required("NAME");
/// let faults = variables.finish(|| Some((port?, name?))).expect_err("neither is right");
/// assert_eq!(faults.to_string(), "PORT: invalid digit found in string; NAME: is not set");
/// ```
pub struct Variables<'a> {
    read: Box<Read<'a>>,
    faults: RefCell<Vec<String>>,
}

/// Everything that is wrong with the settings.
#[derive(Debug, thiserror::Error)]
pub struct SettingsError(pub(super) Vec<String>);

impl fmt::Display for SettingsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("; "))
    }
}

impl<'a> Variables<'a> {
    /// Reads variables with `read`.
    pub fn new(read: impl Fn(&str) -> Option<String> + 'a) -> Self {
        Self {
            read: Box::new(read),
            faults: RefCell::default(),
        }
    }

    /// Reads the process's environment.
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place that reads the environment of a function"
    )]
    pub fn of_process() -> Self {
        Self::new(|name| std::env::var(name).ok())
    }

    /// A variable that must be set. `None` means that a fault was noted.
    pub fn required<T: FromStr<Err: fmt::Display>>(&self, name: &str) -> Option<T> {
        match (self.read)(name).filter(|text| !text.is_empty()) {
            Some(text) => self.parse(name, &text),
            None => {
                self.faults.borrow_mut().push(format!("{name}: is not set"));
                None
            }
        }
    }

    /// A variable that is `default` when it is not set. `None` means that a fault was noted.
    pub fn or<T: FromStr<Err: fmt::Display>>(&self, name: &str, default: T) -> Option<T> {
        match (self.read)(name).filter(|text| !text.is_empty()) {
            Some(text) => self.parse(name, &text),
            None => Some(default),
        }
    }

    /// A variable that need not be set. `None` means that a fault was noted.
    pub fn optional<T: FromStr<Err: fmt::Display>>(&self, name: &str) -> Option<Option<T>> {
        match (self.read)(name).filter(|text| !text.is_empty()) {
            Some(text) => self.parse(name, &text).map(Some),
            None => Some(None),
        }
    }

    /// Notes all that is wrong with settings of several variables. It is `None`, as what a faulty variable is read as.
    pub(super) fn noted<T>(&self, settings: Result<T, SettingsError>) -> Option<T> {
        settings
            .map_err(|SettingsError(faults)| self.faults.borrow_mut().extend(faults))
            .ok()
    }

    /// An unparsed variable, for settings that are not ours.
    pub fn raw(&self, name: &str) -> Option<String> {
        (self.read)(name)
    }

    /// Builds the settings from what was read.
    ///
    /// # Errors
    /// If any variable was faulty: all faults.
    pub fn finish<T>(self, build: impl FnOnce() -> Option<T>) -> Result<T, SettingsError> {
        build().ok_or_else(|| SettingsError(self.faults.into_inner()))
    }

    fn parse<T: FromStr<Err: fmt::Display>>(&self, name: &str, text: &str) -> Option<T> {
        text.parse()
            .map_err(|fault| self.faults.borrow_mut().push(format!("{name}: {fault}")))
            .ok()
    }
}
