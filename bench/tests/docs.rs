//! The documentation does not point at things that are gone: its links lead somewhere, and the files, tests, constants and
//! settings that it names exist.

#![allow(clippy::expect_used, reason = "a test ends where it fails")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

/// Directories without sources of this repository.
const SKIPPED: [&str; 5] = ["target", ".git", ".tools", ".aws-sam", "node_modules"];
/// Paths that the documentation names and that are not in this repository.
const ELSEWHERE: [&str; 6] = [
    "deployment.toml",
    "ttf/config.toml",
    "ttf/tunnels.toml",
    "tunnel-local/config.toml",
    "/etc/ttf/config.toml",
    "/etc/tunnel-local/config.toml",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("a workspace")
}

fn files_under(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("a directory") {
        let entry = entry.expect("an entry");
        let name = entry.file_name();
        if SKIPPED.iter().any(|skipped| name == *skipped) {
            continue;
        }
        if entry.file_type().expect("a type").is_dir() {
            files_under(&entry.path(), files);
        } else {
            files.push(entry.path());
        }
    }
}

fn files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    files_under(root(), &mut files);
    files
}

fn has_extension(file: &Path, extensions: &[&str]) -> bool {
    file.extension()
        .is_some_and(|extension| extensions.iter().any(|known| extension == *known))
}

/// Each page by its path, without fenced examples.
fn pages() -> BTreeMap<PathBuf, String> {
    let pages: BTreeMap<PathBuf, String> = files()
        .into_iter()
        .filter(|file| has_extension(file, &["md"]))
        .map(|file| {
            let text = fs::read_to_string(&file).expect("a page");
            (file, text.split("```").step_by(2).collect())
        })
        .collect();
    assert!(pages.len() > 10, "only {} pages were found", pages.len());
    pages
}

/// The anchor of a heading, as repository hosts make it.
fn anchor(heading: &str) -> String {
    heading
        .trim()
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

fn anchors(text: &str) -> BTreeSet<String> {
    text.lines()
        .filter(|line| line.starts_with('#'))
        .map(|line| anchor(line.trim_start_matches('#')))
        .collect()
}

fn is_external(link: &str) -> bool {
    link.starts_with("https://") || link.starts_with("http://")
}

#[test]
fn every_link_leads_to_a_page_and_a_heading() {
    let pages = pages();
    let mut checked = 0;
    let mut broken = Vec::new();
    for (page, text) in &pages {
        let links = text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split_once(')'));
        for (link, _) in links.filter(|(link, _)| !is_external(link)) {
            checked += 1;
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() {
                page.clone()
            } else {
                page.with_file_name(path).canonicalize().unwrap_or_default()
            };
            let leads_there = match pages.get(&target) {
                Some(text) => heading.is_empty() || anchors(text).contains(heading),
                None => target.exists() && heading.is_empty(),
            };
            if !leads_there {
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(checked > 50, "only {checked} links were found");
    assert!(broken.is_empty(), "{broken:#?}");
}

/// Whether a text is a file of the sources: a path, or a name alone.
fn is_source_file(code: &str) -> bool {
    let is_path = code
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '/' | '.' | '_' | '-'));
    is_path && has_extension(Path::new(code), &["rs", "toml", "yaml", "json"])
}

/// Whether a text is the name of a test, a constant, a setting or a field: two underscores or more tell it from a word.
fn is_name(code: &str) -> bool {
    let is_of = |is_letter: fn(&char) -> bool| {
        code.chars()
            .all(|c| is_letter(&c) || c.is_ascii_digit() || c == '_')
    };
    code.matches('_').count() >= 2
        && (is_of(char::is_ascii_lowercase) || is_of(char::is_ascii_uppercase))
}

/// `response_too_large` is `ResponseTooLarge` where serde makes the one from the other.
fn variant(name: &str) -> String {
    name.split('_')
        .filter_map(|word| {
            let (first, rest) = word.split_at_checked(1)?;
            Some(first.to_uppercase() + rest)
        })
        .collect()
}

#[test]
fn every_file_and_name_in_the_documentation_exists() {
    let files = files();
    let sources: String = files
        .iter()
        .filter(|file| has_extension(file, &["rs", "yaml", "toml"]) || file.ends_with("Makefile"))
        .map(|file| fs::read_to_string(file).expect("a source"))
        .collect();
    let mut checked = 0;
    let mut missing = Vec::new();
    for (page, text) in pages() {
        for code in text.split('`').skip(1).step_by(2) {
            let exists = if is_source_file(code) {
                ELSEWHERE.contains(&code) || files.iter().any(|file| file.ends_with(code))
            } else if is_name(code) {
                sources.contains(code) || sources.contains(&variant(code))
            } else {
                continue;
            };
            checked += 1;
            if !exists {
                missing.push(format!("{}: {code}", page.display()));
            }
        }
    }
    assert!(checked > 200, "only {checked} names were found");
    assert!(missing.is_empty(), "{missing:#?}");
}
