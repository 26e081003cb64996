use proptest::prelude::*;
use tunnel_protocol::{
    headers::{text_to_value, value_to_text},
    id::RequestId,
    message::Body,
};

use super::*;

const PUBLIC: &str = "https://t.example.com";

/// One exchange with the tunnel `abc` on `t.example.com`.
#[derive(Debug)]
struct Exchange {
    target: &'static str,
    host_header: &'static str,
    prefix: &'static str,
    request: &'static str,
}

const BY_PATH: Exchange = Exchange {
    target: "3000",
    host_header: "rewrite",
    prefix: "/abc",
    request: "GET /start",
};
const BY_SUBDOMAIN: Exchange = Exchange {
    prefix: "",
    ..BY_PATH
};

impl Exchange {
    fn request(&self) -> HttpRequest {
        let (method, uri) = self.request.split_once(' ').expect("method and path");
        let fields = [
            ("host", "t.example.com"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "t.example.com"),
            ("x-forwarded-prefix", self.prefix),
        ];
        HttpRequest {
            request_id: RequestId::generate(),
            method: method.to_owned(),
            uri: uri.to_owned(),
            headers: fields
                .iter()
                .filter(|(_, value)| !value.is_empty())
                .map(|(name, value)| {
                    (
                        HeaderName::from_static(name),
                        HeaderValue::from_static(value),
                    )
                })
                .collect(),
            upgrade: None,
            websocket: None,
            body: Body::default(),
            encoding: None,
            timestamp: 0,
            more: false,
            deadline_ms: 0,
            reply_to: None,
        }
    }

    /// What `map` makes of header fields with the addresses of this exchange.
    fn mapped(
        &self,
        mut fields: HeaderMap,
        map: impl Fn(&Addresses<'_>, &mut HeaderMap),
    ) -> HeaderMap {
        let target = self.target.parse().expect("a target");
        let host_header = self.host_header.parse().expect("a mode");
        let (request, own) = (self.request(), OwnAddress::new(&target, &host_header));
        map(&Addresses::of(&request, &own), &mut fields);
        fields
    }

    /// What a visitor gets for a field of the local service.
    fn returned(&self, status: u16, name: &'static str, value: &str) -> String {
        let value = text_to_value(value).expect("a value");
        let fields = HeaderMap::from_iter([(HeaderName::from_static(name), value)]);
        let status = StatusCode::from_u16(status).expect("a status");
        let fields = self.mapped(fields, |addresses, fields| {
            addresses.to_public(status, fields);
        });
        value_to_text(&fields[name]).into_owned()
    }

    /// What the local service gets for a field of a visitor.
    fn sent(&self, name: &'static str, value: &str) -> String {
        let mut fields = self.request().headers;
        fields.insert(name, text_to_value(value).expect("a value"));
        let fields = self.mapped(fields, |addresses, fields| {
            addresses.to_own(fields);
        });
        value_to_text(&fields[name]).into_owned()
    }

    fn location(&self, value: &str) -> String {
        self.returned(302, "location", value)
    }
}

#[test]
fn addresses_of_the_local_service_become_public() {
    for (address, by_path, by_subdomain) in [
        (
            "/login?next=/x#y",
            "/abc/login?next=/x#y",
            "/login?next=/x#y",
        ),
        ("/", "/abc/", "/"),
        ("/abc/x", "/abc/x", "/abc/x"),
        ("/abcd", "/abc/abcd", "/abcd"),
        (
            "http://127.0.0.1:3000",
            "https://t.example.com/abc/",
            "https://t.example.com/",
        ),
        (
            "http://LocalHost:3000/a#b",
            "https://t.example.com/abc/a#b",
            "https://t.example.com/a#b",
        ),
        (
            "HTTPS://[::1]:3000/a",
            "https://t.example.com/abc/a",
            "https://t.example.com/a",
        ),
        (
            "http://0.0.0.0:3000?q",
            "https://t.example.com/abc/?q",
            "https://t.example.com/?q",
        ),
        (
            "//127.0.0.1:3000/x",
            "//t.example.com/abc/x",
            "//t.example.com/x",
        ),
        ("/\u{fc}", "/abc/\u{fc}", "/\u{fc}"),
    ] {
        assert_eq!(BY_PATH.location(address), by_path, "{address} by path");
        assert_eq!(
            BY_SUBDOMAIN.location(address),
            by_subdomain,
            "{address} by subdomain"
        );
    }
}

#[test]
fn public_addresses_get_the_prefix_that_a_service_cannot_know() {
    for (address, by_path) in [
        ("https://t.example.com/x", "https://t.example.com/abc/x"),
        ("http://T.example.com:80/x", "http://T.example.com:80/abc/x"),
        ("//t.example.com/x", "//t.example.com/abc/x"),
        ("https://t.example.com/abc/x", "https://t.example.com/abc/x"),
    ] {
        assert_eq!(BY_PATH.location(address), by_path, "{address}");
        assert_eq!(BY_SUBDOMAIN.location(address), address);
    }
}

#[test]
fn addresses_of_others_are_never_touched() {
    for address in [
        "next",
        "?page=2",
        "http://127.0.0.1:3001/x",
        "https://example.com/x",
        "//example.com/x",
        "/\\example.com/x",
        "http://user@127.0.0.1:3000/x",
        "http://127.0.0.1:3000@example.com/x",
        "http://127.0.0.1:3000.example.com/x",
        "https://t.example.com:444/x",
        "ftp://127.0.0.1:3000/x",
        "mailto:a@127.0.0.1:3000",
        "",
    ] {
        for exchange in [BY_PATH, BY_SUBDOMAIN] {
            assert_eq!(exchange.location(address), address);
            assert_eq!(exchange.sent("destination", address), address);
        }
    }
}

#[test]
fn the_host_that_was_sent_is_the_local_services_own() {
    let fixed = Exchange {
        host_header: "myapp.test",
        ..BY_PATH
    };
    for address in [
        "http://myapp.test/login",
        "https://MyApp.test./login",
        "http://myapp.test:3000/login",
        "http://localhost:3000/login",
    ] {
        assert_eq!(
            fixed.location(address),
            "https://t.example.com/abc/login",
            "{address}"
        );
    }
    assert_eq!(
        fixed.location("http://myapp.test:8080/"),
        "http://myapp.test:8080/"
    );
    let cookie = "a=1; path=/; domain=myapp.test";
    assert_eq!(fixed.returned(200, "set-cookie", cookie), "a=1; path=/abc");

    let preserved = Exchange {
        host_header: "preserve",
        ..BY_PATH
    };
    assert_eq!(
        preserved.location("http://t.example.com/login"),
        "http://t.example.com/abc/login"
    );
    let remote = Exchange {
        target: "http://app.test:80",
        ..BY_PATH
    };
    assert_eq!(
        remote.location("https://app.test/x"),
        "https://t.example.com/abc/x"
    );
    assert_eq!(remote.location("http://127.0.0.1/x"), "http://127.0.0.1/x");
}

#[test]
fn a_tunnel_named_like_a_path_of_the_service_does_not_loop() {
    let at = |request| Exchange {
        prefix: "/admin",
        request,
        ..BY_PATH
    };
    // The service does not know the prefix: /admin/ is a path of its own.
    assert_eq!(at("GET /").location("/admin/"), "/admin/admin/");
    assert_eq!(at("HEAD /").location("/admin"), "/admin/admin");
    assert_eq!(
        at("GET /x?a=1").location("/admin/x?a=1#top"),
        "/admin/admin/x?a=1#top"
    );
    assert_eq!(
        at("GET /").location("https://t.example.com/admin/"),
        "https://t.example.com/admin/admin/"
    );
    for path in ["/admin/login", "/admin/"] {
        assert_eq!(
            at("GET /admin/users").location(path),
            format!("/admin{path}")
        );
    }
    // It knows the prefix.
    assert_eq!(at("GET /").location("/admin/login"), "/admin/login");
    assert_eq!(at("POST /form").location("/admin/form"), "/admin/form");
    assert_eq!(
        at("GET /").returned(200, "content-location", "/admin/"),
        "/admin/"
    );
    assert_eq!(
        at("GET /").returned(200, "set-cookie", "a=1; Path=/admin"),
        "a=1; Path=/admin"
    );
}

#[test]
fn every_field_with_an_address_is_mapped() {
    for (name, value, mapped) in [
        ("content-location", "/a.json", "/abc/a.json"),
        ("refresh", "5; url=/next", "5; url=/abc/next"),
        (
            "refresh",
            "0;URL='http://localhost:3000/'",
            "0;URL='https://t.example.com/abc/'",
        ),
        ("refresh", "5", "5"),
        (
            "refresh",
            "5; url=https://example.com/",
            "5; url=https://example.com/",
        ),
        (
            "link",
            "</a.css>; rel=preload, <https://example.com/>; title=\"</x>\\\"</y>\", <http://127.0.0.1:3000/?page=2>; rel=next",
            "</abc/a.css>; rel=preload, <https://example.com/>; title=\"</x>\\\"</y>\", <https://t.example.com/abc/?page=2>; rel=next",
        ),
        ("link", "</a", "</a"),
        (
            "access-control-allow-origin",
            "http://127.0.0.1:3000",
            PUBLIC,
        ),
        ("access-control-allow-origin", "*", "*"),
        (
            "access-control-allow-origin",
            "https://example.com",
            "https://example.com",
        ),
        ("x-other", "/a", "/a"),
    ] {
        assert_eq!(
            BY_PATH.returned(200, name, value),
            mapped,
            "{name}: {value}"
        );
    }
}

#[test]
fn cookies_stay_in_the_tunnel_and_are_otherwise_untouched() {
    for (cookie, by_path) in [
        ("a=1; Path=/; HttpOnly", "a=1; Path=/abc; HttpOnly"),
        (
            "a=1;path=/x;Expires=Wed, 21 Oct 2026 07:28:00 GMT",
            "a=1;path=/abc/x;Expires=Wed, 21 Oct 2026 07:28:00 GMT",
        ),
        ("path=/; Secure", "path=/; Secure"),
        ("a=\u{fc}; Path=/", "a=\u{fc}; Path=/abc"),
        ("a=1; Domain=127.0.0.1; Max-Age=1", "a=1; Max-Age=1"),
        ("a=1; Domain=localhost", "a=1"),
        ("a=1; domain=.App.Localhost", "a=1"),
        ("a=1; Domain=127.0.0.1:3000", "a=1"),
        ("a=1; Domain=example.com", "a=1; Domain=example.com"),
        ("a=1; Domain=t.example.com", "a=1; Domain=t.example.com"),
        ("a=\"x; y\"", "a=\"x; y\""),
        ("__Host-a=1; Path=/; Secure", "__Host-a=1; Path=/; Secure"),
        ("__hOST-a=1; Path=/; Secure", "__hOST-a=1; Path=/; Secure"),
        (
            "__Secure-a=1; Path=/; Secure",
            "__Secure-a=1; Path=/abc; Secure",
        ),
    ] {
        assert_eq!(
            BY_PATH.returned(200, "set-cookie", cookie),
            by_path,
            "{cookie}"
        );
    }
    assert_eq!(
        BY_SUBDOMAIN.returned(200, "set-cookie", "a=1; Path=/"),
        "a=1; Path=/"
    );
}

#[test]
fn requests_reach_the_local_service_with_its_own_address() {
    for (name, value, by_path) in [
        ("host", "t.example.com", "127.0.0.1:3000"),
        ("origin", PUBLIC, "http://127.0.0.1:3000"),
        (
            "origin",
            "https://T.EXAMPLE.com:443",
            "http://127.0.0.1:3000",
        ),
        ("origin", "http://t.example.com", "http://t.example.com"),
        ("origin", "https://example.com", "https://example.com"),
        ("origin", "null", "null"),
        (
            "referer",
            "https://t.example.com/abc/x?y",
            "http://127.0.0.1:3000/x?y",
        ),
        (
            "referer",
            "https://t.example.com/other/x",
            "https://t.example.com/other/x",
        ),
        (
            "destination",
            "https://t.example.com/abc/b.bin",
            "http://127.0.0.1:3000/b.bin",
        ),
        ("destination", "/abc/b.bin", "/b.bin"),
        ("destination", "/abc", "/"),
        ("destination", "/b.bin", "/b.bin"),
    ] {
        assert_eq!(BY_PATH.sent(name, value), by_path, "{name}: {value}");
    }
    assert_eq!(
        BY_SUBDOMAIN.sent("destination", "https://t.example.com/b"),
        "http://127.0.0.1:3000/b"
    );
    assert_eq!(BY_SUBDOMAIN.sent("destination", "/b"), "/b");
}

#[test]
fn with_the_visitors_host_only_the_prefix_of_a_destination_is_mapped() {
    let preserved = Exchange {
        host_header: "preserve",
        ..BY_PATH
    };
    for (name, value, mapped) in [
        ("host", "t.example.com", "t.example.com"),
        ("origin", PUBLIC, PUBLIC),
        (
            "referer",
            "https://t.example.com/abc/x",
            "https://t.example.com/abc/x",
        ),
        (
            "destination",
            "https://t.example.com/abc/b",
            "https://t.example.com/b",
        ),
        ("destination", "/abc/b", "/b"),
    ] {
        assert_eq!(preserved.sent(name, value), mapped, "{name}: {value}");
    }
}

#[test]
fn a_mapped_origin_is_not_contradicted_by_the_forwarded_host() {
    let sent = |origin: &'static str| {
        let mut fields = BY_PATH.request().headers;
        fields.insert(header::ORIGIN, HeaderValue::from_static(origin));
        BY_PATH
            .mapped(fields, |addresses, fields| {
                addresses.to_own(fields);
            })
            .contains_key(FORWARDED_HOST)
    };
    assert!(!sent(PUBLIC));
    assert!(sent("https://example.com"));
}

fn exchange() -> impl Strategy<Value = Exchange> {
    let target = prop::sample::select(vec![
        "3000",
        "https://app.test:8443",
        "localhost:80",
        "unix:/x",
    ]);
    let host_header = prop::sample::select(vec!["rewrite", "myapp.test", "myapp.test:81"]);
    let prefix = prop::sample::select(vec!["", "/abc"]);
    (target, host_header, prefix).prop_map(|(target, host_header, prefix)| Exchange {
        target,
        host_header,
        prefix,
        ..BY_PATH
    })
}

proptest! {
    #[test]
    fn there_and_back_is_the_identity(exchange in exchange(), path in "/([a-z%.]{1,9}(/[a-z]{0,3}){0,2})?([?][a-z=/]{0,5})?(#[a-z]{0,3})?") {
        let public = format!("{PUBLIC}{}{path}", exchange.prefix);
        let own = exchange.sent("destination", &public);
        prop_assert_ne!(&own, &public);
        prop_assert_eq!(exchange.location(&own), public.clone());
        prop_assert_eq!(exchange.sent("referer", &public), own.clone());
        let reply = exchange.returned(201, "content-location", &own);
        prop_assert_eq!(exchange.sent("destination", &reply), own);
        prop_assume!(below(&path, exchange.prefix).is_none() || exchange.prefix.is_empty());
        let public = exchange.location(&path);
        prop_assert_eq!(exchange.sent("destination", &public), path);
    }

    #[test]
    fn no_field_value_panics_or_becomes_invalid(value in "[ -~]{0,40}|[<>\"\\\\;,=/:a@\\[\\]\u{fc}]{0,12}") {
        for exchange in [BY_PATH, BY_SUBDOMAIN] {
            for name in ["location", "content-location", "refresh", "link", "set-cookie", "access-control-allow-origin"] {
                exchange.returned(302, name, &value);
            }
            for name in ["origin", "referer", "destination"] {
                exchange.sent(name, &value);
            }
        }
    }
}
