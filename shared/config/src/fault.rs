//! Where a file's fault is, and what may be shown of its line.

use std::{borrow::Cow, cmp::Reverse, fmt, ops::Range};

use crate::secret::{may_be_secret, quoted_secrets, secrets};

/// What stands in a message in place of a secret.
const NOT_SHOWN: &str = "(not shown)";

/// A fault in a file's text: `LINE:COLUMN: MESSAGE`, and the line itself where it cannot hold a secret.
#[derive(Debug)]
pub struct Fault {
    line: usize,
    column: usize,
    message: String,
    excerpt: Option<String>,
    width: usize,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, column, .. } = self;
        write!(f, "{line}:{column}: {}", self.message)?;
        if let Some(excerpt) = &self.excerpt {
            let gutter = " ".repeat(line.to_string().len());
            let indent = " ".repeat(column - 1);
            let marks = "^".repeat(self.width);
            write!(f, "\n  {line} | {excerpt}\n  {gutter} | {indent}{marks}")?;
        }
        Ok(())
    }
}

/// A fault whose place is still a range of bytes.
#[derive(Debug)]
pub struct FaultAt {
    /// The bytes.
    pub span: Range<usize>,
    /// What is wrong with them.
    pub message: String,
}

impl FaultAt {
    /// A fault at this place.
    pub fn new(span: Range<usize>, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { span, message }
    }

    /// What the TOML library has found.
    pub fn syntax(error: &toml::de::Error) -> Self {
        Self::new(error.span().unwrap_or_default(), error.message())
    }

    /// The same with its line, of which `shows` allows the values of some keys to be shown. What may be a secret in the wrong place
    /// is shown neither there nor in the message.
    pub fn in_text(self, text: &str, shows: impl Fn(&str) -> bool) -> Fault {
        let start = text.floor_char_boundary(self.span.start);
        let before = &text[..start];
        let line_start = before.rfind('\n').map_or(0, |at| at + 1);
        let line = text[line_start..].lines().next().unwrap_or_default();
        let excerpt = public_part(line, shows);
        let marked = text.get(self.span.clone()).unwrap_or_default();
        let message = public_message(&self.message, [line, marked]);
        Fault {
            line: before.matches('\n').count() + 1,
            column: text[line_start..start].chars().count() + 1,
            message,
            width: marked
                .lines()
                .next()
                .map_or(1, |marked| marked.chars().count().max(1)),
            // What lies behind the part that is shown cannot be pointed at.
            excerpt: excerpt
                .filter(|shown| line_start + shown.len() >= self.span.start)
                .map(Cow::into_owned),
        }
    }
}

/// A message without what may be a secret in it, or in the parts of the file that it is about.
fn public_message(message: &str, parts: [&str; 2]) -> String {
    // A message may write a value in a way of its own, with escapes.
    let values = ['"', '`'].into_iter().filter_map(|quote| {
        let (_, behind) = message.split_once(quote)?;
        let (value, _) = behind.rsplit_once(quote)?;
        may_be_secret(value).then_some(value)
    });
    let of_parts = parts
        .into_iter()
        .flat_map(|part| secrets(part).chain(quoted_secrets(part)));
    let mut hidden: Vec<_> = secrets(message).chain(values).chain(of_parts).collect();
    // What is part of another secret would otherwise leave the rest of that one.
    hidden.sort_by_key(|secret| Reverse(secret.len()));
    hidden
        .into_iter()
        .fold(message.to_owned(), |message, secret| {
            message.replace(secret, NOT_SHOWN)
        })
}

/// The part of a line that holds no secret: all of it, the key alone, or nothing.
fn public_part(line: &str, shows: impl Fn(&str) -> bool) -> Option<Cow<'_, str>> {
    let trimmed = line.trim();
    if !may_be_secret(line)
        && trimmed.starts_with('[')
        && trimmed.ends_with(']')
        && !trimmed.contains(['"', '\''])
    {
        return Some(line.into());
    }
    let (key, value) = line.split_once('=')?;
    let is_key = key
        .trim()
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if shows(key.trim()) && !may_be_secret(value) {
        Some(line.into())
    } else {
        (is_key && !may_be_secret(key)).then(|| format!("{key}= ...").into())
    }
}
