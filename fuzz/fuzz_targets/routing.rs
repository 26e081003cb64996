//! Four lines: a routing mode, a public address, a host and a path. Proves that routing a visitor's
//! address neither loses nor adds anything, that the address of each tunnel leads to it, and that encoded
//! paths are valid, keep their meaning, and are not encoded twice.
#![no_main]

use http::uri::{PathAndQuery, Uri};
use libfuzzer_sys::fuzz_target;
use percent_encoding::percent_decode_str;
use tunnel_protocol::{id::TunnelId, url::is_loopback};
use tunnel_service::routing::{PublicUrl, Route, Routing, encode_decoded_path, encode_path};

/// What RFC 3986, 3.3 allows in a path in addition to letters and digits.
const IN_PATH: &[u8] = b"/:@-._~!$&'()*+,;=%";

fuzz_target!(|text: &str| {
    let mut lines = text.splitn(4, '\n');
    let mut line = || lines.next().unwrap_or_default();
    let (routing, base, host, path) = (
        line().parse().unwrap_or(Routing::Subdomain),
        line(),
        line(),
        line(),
    );
    let rooted = if path.starts_with('/') {
        path.to_owned()
    } else {
        format!("/{path}")
    };
    check_encoding(&rooted, |path| encode_path(path).into_owned());
    check_encoding(&rooted, encode_decoded_path);
    assert!(
        encode_decoded_path(path)
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || IN_PATH.contains(&byte)),
        "{path}"
    );
    is_loopback(host);

    let Ok(base) = base.parse::<PublicUrl>() else {
        return;
    };
    check_addresses(&base);
    match Route::of(routing, &base, host, path) {
        Route::Tunnel { id, prefix, path } => {
            assert!(path.starts_with('/'), "{path}");
            assert!(
                prefix.is_empty() && base.own_origin(&id, routing).is_some()
                    || prefix.ends_with(&format!("/{id}")),
                "{prefix} of {id}"
            );
            let whole = format!("{prefix}{path}");
            assert!(
                whole == rooted || path == "/" && prefix == rooted,
                "{whole} of {rooted}"
            );
        }
        Route::OwnOrigin { id, path } => {
            assert_eq!(routing, Routing::Subdomain);
            assert!(path.starts_with('/'), "{path}");
            let named = format!("/{id}");
            assert!(rooted.contains(&named), "{id} of {rooted}");
        }
        Route::Own(page) => assert!(
            page.starts_with("/_") && rooted.ends_with(&page),
            "{page} of {rooted}"
        ),
        Route::None => {}
    }
});

fn check_encoding(path: &str, encode: fn(&str) -> String) {
    let encoded = encode(path);
    assert_eq!(encode(&encoded), encoded, "twice");
    assert_eq!(
        encoded
            .parse::<PathAndQuery>()
            .map(|valid| valid.as_str() == encoded)
            .ok(),
        Some(true),
        "{encoded}"
    );
    assert!(
        percent_decode_str(&encoded).eq(percent_decode_str(path)),
        "{encoded} means something else than {path}"
    );
}

fn check_addresses(base: &PublicUrl) {
    assert_eq!(base.to_string().parse().as_ref(), Ok(base));
    let id: TunnelId = "my-app".parse().expect("an id");
    let (by_path, by_subdomain) = (base.by_path(&id), base.by_subdomain(&id));
    for (routing, address) in [
        (Routing::Path, &by_path),
        (Routing::Subdomain, &by_path),
        (Routing::Subdomain, &by_subdomain),
    ] {
        let uri: Uri = format!("{address}/x").parse().expect("an address");
        let host = uri.authority().expect("it has a host").as_str();
        let prefix = uri
            .path()
            .strip_suffix("/x")
            .expect("it was added")
            .to_owned();
        let (id, path) = (id.clone(), "/x".to_owned());
        let redirects = routing == Routing::Subdomain && *address == by_path && !base.is_loopback();
        let expected = if redirects {
            Route::OwnOrigin { id, path }
        } else {
            Route::Tunnel { id, prefix, path }
        };
        assert_eq!(
            Route::of(routing, base, host, uri.path()),
            expected,
            "{address}"
        );
    }
}
