//! The page: files that are part of the executable.

use bytes::Bytes;
use http::{HeaderValue, header};

use super::reply::{self, Reply};

macro_rules! asset {
    ($path:literal, $file:literal, $content_type:literal) => {
        (
            $path,
            $content_type,
            include_bytes!(concat!("assets/", $file)),
        )
    };
}

/// Path, content type and bytes of each file.
const ASSETS: [(&str, &str, &[u8]); 12] = [
    asset!("/", "index.html", "text/html; charset=utf-8"),
    asset!("/style.css", "style.css", "text/css; charset=utf-8"),
    asset!("/icon.svg", "icon.svg", "image/svg+xml"),
    asset!("/app.js", "app.js", "text/javascript; charset=utf-8"),
    asset!("/list.js", "list.js", "text/javascript; charset=utf-8"),
    asset!(
        "/details.js",
        "details.js",
        "text/javascript; charset=utf-8"
    ),
    asset!("/bodies.js", "bodies.js", "text/javascript; charset=utf-8"),
    asset!("/editor.js", "editor.js", "text/javascript; charset=utf-8"),
    asset!(
        "/compare.js",
        "compare.js",
        "text/javascript; charset=utf-8"
    ),
    asset!(
        "/snippets.js",
        "snippets.js",
        "text/javascript; charset=utf-8"
    ),
    asset!(
        "/signatures.js",
        "signatures.js",
        "text/javascript; charset=utf-8"
    ),
    asset!("/dom.js", "dom.js", "text/javascript; charset=utf-8"),
];

/// Scripts and styles are the page's own files and nothing else. Images are bodies of exchanges, which scripts hand over as `blob:`; in
/// an image nothing runs. Frames are previews, which have a policy of their own.
const PAGE_POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; \
     frame-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The file at a path.
pub(crate) fn asset(path: &str) -> Option<Reply> {
    let (_, content_type, content) = ASSETS.iter().find(|(at, ..)| *at == path)?;
    let mut reply = reply::bytes(content_type, Bytes::from_static(content));
    reply.headers_mut().insert(
        header::CONTENT_SECURITY_POLICY,
        HeaderValue::from_static(PAGE_POLICY),
    );
    Some(reply)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The whole page, so that the executable stays small.
    const MAX_PAGE_BYTES: usize = 150 * 1024;

    #[test]
    fn the_page_is_small_and_has_no_script_or_style_of_its_own() {
        let bytes: usize = ASSETS.iter().map(|(.., content)| content.len()).sum();
        assert!(bytes <= MAX_PAGE_BYTES, "{bytes}");
        let (.., page) = ASSETS[0];
        let page = std::str::from_utf8(page).expect("text");
        assert!(!page.contains("<style") && !page.contains(" style="));
        for script in page.split("<script").skip(1) {
            assert!(script.contains("src="), "{script}");
        }
    }
}
