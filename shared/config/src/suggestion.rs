//! Which of the known words a mistyped one may have been.

/// How alike two words must be, from 0 to 1, for one to be suggested in place of the other; the same as clap's.
const MIN_SIMILARITY: f64 = 0.7;

/// The known word that is most like `word`, if one is like it.
pub fn closest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    known
        .into_iter()
        .map(|known| (strsim::jaro(word, known), known))
        .filter(|(similarity, _)| *similarity > MIN_SIMILARITY)
        .max_by(|(one, _), (other, _)| one.total_cmp(other))
        .map(|(_, known)| known)
}
