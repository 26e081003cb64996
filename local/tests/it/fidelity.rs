//! Every byte arrives as sent.

use http::{Method, Request, StatusCode};
use local::Options;
use tunnel_protocol::limits::MAX_PART_BYTES;

use crate::harness::{
    Agent, Origin, agent, get, post, raw, reply, reply_with, settings, stack, stack_with, visit,
};

#[tokio::test]
async fn every_method_arrives_and_is_answered() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let agent = agent(&stack, &origin).await;

    for method in [
        "GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "BREW",
    ] {
        let got = visit(
            Request::builder()
                .method(method)
                .uri(format!("{}/m", agent.url))
                .body(method.into())
                .expect("a request"),
        )
        .await;
        assert_eq!(
            (got.status, got.body),
            (StatusCode::OK, method.into()),
            "{method}"
        );
        assert_eq!(origin.last().method.as_str(), method);
    }
}

#[tokio::test]
async fn paths_and_queries_arrive_as_sent() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let agent = agent(&stack, &origin).await;

    for path in [
        "/",
        "/a%2Fb%3Fc%23d%25e%20f",
        "//double//slashes/",
        "/caf%C3%A9;v=1,2@:!$&'()*+=~",
        "/x?a=1&a=2&b&c=&=d&a=%26%3D+%2B",
        "/x?",
        "/x??a=/?b",
        "/{x}|?q=[1]|{2}",
    ] {
        let got = get(&format!("{}{path}", agent.url)).await;
        assert_eq!(got.status, StatusCode::OK, "{path}");
        assert_eq!(origin.last().uri.to_string(), path);
    }
}

#[tokio::test]
async fn repeated_and_binary_request_fields_arrive_as_sent() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let agent = agent(&stack, &origin).await;

    let mut request = Request::get(format!("{}/", agent.url))
        .header("x-two", "1")
        .header("x-two", "2, 3")
        .header("x-empty", "");
    request = request.header(
        "x-latin-1",
        http::HeaderValue::from_bytes(b"caf\xe9").expect("a value"),
    );
    request = request
        .header("cookie", "a=1; b=2")
        .header("authorization", "Basic eDp5");
    visit(request.body("".into()).expect("a request")).await;

    let seen = origin.last();
    assert_eq!(
        seen.headers.get_all("x-two").iter().collect::<Vec<_>>(),
        ["1", "2, 3"]
    );
    assert_eq!(seen.header("x-empty"), Some(""));
    assert_eq!(seen.headers["x-latin-1"].as_bytes(), b"caf\xe9");
    assert_eq!(
        (seen.header("cookie"), seen.header("authorization")),
        (Some("a=1; b=2"), Some("Basic eDp5"))
    );
}

#[tokio::test]
async fn repeated_and_binary_response_fields_arrive_as_sent() {
    let stack = stack().await;
    let fields: &[(&str, &[u8])] = &[
        ("set-cookie", b"a=1; Expires=Wed, 21 Oct 2026 07:28:00 GMT"),
        ("set-cookie", b"b=2; HttpOnly"),
        ("x-two", b"1"),
        ("x-two", b"2"),
        ("x-latin-1", b"caf\xe9"),
    ];
    let origin =
        Origin::answering(move |_| Some(reply_with(StatusCode::IM_A_TEAPOT, fields, "short")))
            .await;
    let agent = agent(&stack, &origin).await;

    let got = get(&agent.url).await;

    assert_eq!(got.status, StatusCode::IM_A_TEAPOT);
    assert_eq!(
        got.all("set-cookie"),
        [
            &b"a=1; Expires=Wed, 21 Oct 2026 07:28:00 GMT"[..],
            b"b=2; HttpOnly"
        ]
    );
    assert_eq!(got.all("x-two"), [&b"1"[..], b"2"]);
    assert_eq!(got.all("x-latin-1"), [&b"caf\xe9"[..]]);
}

#[tokio::test]
async fn bodies_of_every_size_arrive_both_ways() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let agent = agent(&stack, &origin).await;

    for size in [
        0,
        1,
        1024,
        33 * 1024,
        MAX_PART_BYTES - 1,
        MAX_PART_BYTES,
        MAX_PART_BYTES + 1,
        100 * 1024,
        2 * MAX_PART_BYTES,
        1024 * 1024,
        4 * 1024 * 1024,
    ] {
        let body: Vec<u8> = (0..size)
            .map(|at| u8::try_from((at * 31 + at / 251) % 256).expect("a byte"))
            .collect();
        let got = post(&format!("{}/echo", agent.url), body.clone()).await;
        assert_eq!(got.status, StatusCode::OK, "{size}");
        assert!(
            origin.last().body == body,
            "a request of {size} bytes was changed"
        );
        assert!(got.body == body, "a response of {size} bytes was changed");
    }
}

#[tokio::test]
async fn encoded_bodies_are_not_decoded() {
    let stack = stack().await;
    let gzip: &[u8] =
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff\xcb\x48\x04\x00\xac\x2a\x93\xd8\x02\x00\x00\x00";
    let origin = Origin::answering(move |_| {
        Some(reply_with(
            StatusCode::OK,
            &[("content-encoding", b"gzip")],
            gzip,
        ))
    })
    .await;
    let agent = agent(&stack, &origin).await;

    let got = get(&agent.url).await;

    assert_eq!(
        (got.header("content-encoding"), &got.body[..]),
        (Some("gzip"), gzip)
    );
}

#[tokio::test]
async fn redirects_are_passed_on_and_point_where_the_visitor_can_go() {
    let stack = stack().await;
    let origin = Origin::answering(|seen| {
        let location = seen.uri.query().expect("a location").as_bytes();
        Some(reply_with(
            StatusCode::FOUND,
            &[("location", location), ("set-cookie", b"s=1; Path=/")],
            "",
        ))
    })
    .await;
    let agent = agent(&stack, &origin).await;

    let local = format!("http://{}/x?y", origin.address);
    for (location, expected) in [
        ("/login", "/my-app/login".to_owned()),
        (local.as_str(), format!("{}/x?y", agent.url)),
        ("https://example.com/a", "https://example.com/a".to_owned()),
        ("relative", "relative".to_owned()),
    ] {
        let got = get(&format!("{}/?{location}", agent.url)).await;
        assert_eq!(
            (got.status, got.header("location")),
            (StatusCode::FOUND, Some(expected.as_str()))
        );
        assert_eq!(got.header("set-cookie"), Some("s=1; Path=/my-app"));
    }
    assert_eq!(origin.count(), 4, "the agent followed a redirect");
}

#[tokio::test]
async fn a_service_that_knows_only_its_own_address_or_only_the_public_host_works_by_path() {
    let stack = stack().await;
    // As frameworks do: forms are only taken from the service's own origin, and redirects go to the host that it believes in.
    let origin = Origin::answering(|seen| {
        let own = format!("http://{}", seen.header("host")?);
        if seen.method == Method::POST && seen.header("origin") != Some(&own) {
            return Some(reply(StatusCode::FORBIDDEN, ""));
        }
        let host = seen.header("x-forwarded-host").or(seen.header("host"))?;
        let location = format!("http://{host}/login");
        let fields = [
            ("location", location.as_bytes()),
            ("access-control-allow-origin", own.as_bytes()),
            ("refresh", b"1; url=/login"),
        ];
        Some(reply_with(StatusCode::SEE_OTHER, &fields, ""))
    })
    .await;
    let agent = agent(&stack, &origin).await;
    let public = agent.url.strip_suffix("/my-app").expect("a tunnel by path");

    for method in [Method::GET, Method::POST] {
        let request = Request::builder()
            .method(method.clone())
            .uri(format!("{}/form", agent.url))
            .header("origin", public)
            .body("".into())
            .expect("a request");
        let got = visit(request).await;
        let login = format!("{}/login", agent.url);
        assert_eq!(got.status, StatusCode::SEE_OTHER, "{method}");
        assert_eq!(got.header("location"), Some(login.as_str()), "{method}");
        assert_eq!(got.header("access-control-allow-origin"), Some(public));
        assert_eq!(got.header("refresh"), Some("1; url=/my-app/login"));
    }
}

#[tokio::test]
async fn a_tunnel_named_like_a_path_of_its_service_is_not_redirected_in_a_circle() {
    let stack = stack().await;
    let origin = Origin::answering(|seen| {
        Some(match seen.uri.path() {
            "/my-app/" => reply(StatusCode::OK, "arrived"),
            _ => reply_with(StatusCode::FOUND, &[("location", b"/my-app/")], ""),
        })
    })
    .await;
    let agent = agent(&stack, &origin).await;

    let got = get(&format!("{}/", agent.url)).await;
    let location = got.header("location").expect("a redirect");
    assert_eq!(location, "/my-app/my-app/");
    let root = agent.url.strip_suffix("/my-app").expect("a tunnel by path");
    let got = get(&format!("{root}{location}")).await;
    assert_eq!(
        (got.status, &got.body[..]),
        (StatusCode::OK, &b"arrived"[..])
    );
}

#[tokio::test]
async fn the_local_service_sees_the_real_origin_of_a_request_and_no_invented_one() {
    let any_host = Options {
        any_host: true,
        ..Options::default()
    };
    let (stack, origin) = (stack_with(any_host).await, Origin::echo().await);
    let agent = agent(&stack, &origin).await;

    let request = Request::get(format!("{}/", agent.url))
        .header("host", "public.example.com")
        .header("x-forwarded-for", "6.6.6.6")
        .header("x-forwarded-user", "root")
        .header("forwarded", "for=6.6.6.6")
        .header("x-real-ip", "6.6.6.6")
        .header("connection", "x-hop")
        .header("x-hop", "1");
    visit(request.body("".into()).expect("a request")).await;

    let seen = origin.last();
    assert_eq!(
        seen.header("host"),
        Some(origin.address.to_string().as_str())
    );
    assert_eq!(seen.header("x-forwarded-for"), Some("127.0.0.1"));
    assert_eq!(seen.header("x-forwarded-host"), Some("public.example.com"));
    assert_eq!(seen.header("x-forwarded-proto"), Some("http"));
    assert_eq!(seen.header("x-forwarded-prefix"), Some("/my-app"));
    for name in ["x-forwarded-user", "forwarded", "x-real-ip", "x-hop"] {
        assert_eq!(seen.header(name), None, "{name}");
    }
}

#[tokio::test]
async fn the_visitors_host_is_preserved_if_configured() {
    let any_host = Options {
        any_host: true,
        ..Options::default()
    };
    let (stack, origin) = (stack_with(any_host).await, Origin::echo().await);
    let mut settings = settings(&stack, origin.address);
    settings.host_header = forwarder::settings::HostHeader::Preserve;
    let agent = Agent::online(settings).await;

    visit(
        Request::get(&agent.url)
            .header("host", "public.example.com")
            .body("".into())
            .expect("a request"),
    )
    .await;

    assert_eq!(origin.last().header("host"), Some("public.example.com"));
}

#[tokio::test]
async fn head_responses_have_a_length_but_no_body_and_204_has_neither() {
    let stack = stack().await;
    let origin = Origin::answering(|seen| {
        Some(match (&seen.method, seen.uri.path()) {
            (&Method::HEAD, _) => reply_with(StatusCode::OK, &[("content-length", b"12345")], ""),
            (_, "/304") => reply_with(StatusCode::NOT_MODIFIED, &[("etag", b"\"x\"")], ""),
            _ => reply(StatusCode::NO_CONTENT, ""),
        })
    })
    .await;
    let agent = agent(&stack, &origin).await;

    let head = visit(
        Request::head(&agent.url)
            .body("".into())
            .expect("a request"),
    )
    .await;
    assert_eq!(
        (head.header("content-length"), head.body.len()),
        (Some("12345"), 0)
    );
    assert_eq!(
        get(&format!("{}/204", agent.url)).await.status,
        StatusCode::NO_CONTENT
    );
    let not_modified = get(&format!("{}/304", agent.url)).await;
    assert_eq!(
        (not_modified.status, not_modified.header("etag")),
        (StatusCode::NOT_MODIFIED, Some("\"x\""))
    );
}

#[tokio::test]
async fn the_local_service_cannot_impersonate_the_tunnel() {
    let stack = stack().await;
    let origin = Origin::answering(|_| {
        Some(reply_with(
            StatusCode::OK,
            &[
                ("x-tunnel-error", b"tunnel_offline"),
                ("keep-alive", b"timeout=1"),
            ],
            "",
        ))
    })
    .await;
    let agent = agent(&stack, &origin).await;

    let got = get(&agent.url).await;

    assert_eq!((got.error(), got.header("keep-alive")), (None, None));
}

#[tokio::test]
async fn request_targets_meant_for_proxies_are_refused() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let agent = agent(&stack, &origin).await;

    let absolute = raw(
        &stack,
        format!(
            "GET {}/x HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
            agent.url
        )
        .as_bytes(),
    )
    .await;
    assert!(absolute.starts_with("HTTP/1.1 400"), "{absolute}");
    let nonsense = raw(&stack, b"GET /my-app/ NOTHTTP/1.1\r\n\r\n").await;
    assert!(nonsense.starts_with("HTTP/1.1 400"), "{nonsense}");
    assert_eq!(origin.count(), 0);
}

#[tokio::test]
async fn a_request_with_conflicting_lengths_is_refused() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let agent = agent(&stack, &origin).await;
    let chunked = "transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    let ask = async |fields: &str| {
        raw(
            &stack,
            format!("POST /my-app/ HTTP/1.1\r\nhost: x\r\n{fields}").as_bytes(),
        )
        .await
    };

    for fields in [
        format!("content-length: 6\r\n{chunked}"),
        format!("Content-Length: 5\r\nconnection: close\r\n{chunked}"),
        "content-length: 5\r\ncontent-length: 5\r\n\r\nhello".to_owned(),
        "content-length: 5\r\ncontent-length: 6\r\n\r\nhello".to_owned(),
        // The second comes before the answer to the first, so nobody can see what it was made of.
        format!(
            "content-length: 0\r\n\r\nPOST /my-app/ HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n{chunked}"
        ),
    ] {
        let answer = ask(&fields).await;
        let last = answer.rfind("HTTP/1.1 ").expect("an answer");
        assert!(
            answer[last..].starts_with("HTTP/1.1 400"),
            "{fields}: {answer}"
        );
    }

    // On one connection after the other, each is served.
    let plain = ask(&format!("connection: close\r\n{chunked}")).await;
    assert!(
        plain.starts_with("HTTP/1.1 200") && plain.contains("hello"),
        "{plain}"
    );
    assert_eq!(agent.url, format!("{}/my-app", stack.public_url));
    assert_eq!(origin.last().body, "hello");
}

#[tokio::test]
async fn bodies_compressed_in_transit_arrive_unchanged() {
    let text = "<p>a page that is much like all other pages</p>\n".repeat(20_000);
    let sent = text.clone();
    let origin = Origin::answering(move |seen| {
        assert_eq!(seen.body.len(), 500_000);
        Some(reply_with(
            StatusCode::OK,
            &[("content-type", b"text/html"), ("etag", b"\"1\"")],
            sent.clone(),
        ))
    })
    .await;
    let stack = stack().await;
    for compression in [true, false] {
        // A tunnel of its own for each: for a moment the service remembers what the agent before could do.
        let tunnel_id = Some(format!("packs-{compression}").parse().expect("an id"));
        let agent = Agent::online(forwarder::settings::Settings {
            compression,
            tunnel_id,
            ..settings(&stack, origin.address)
        })
        .await;
        let request = Request::post(&agent.url)
            .header("content-type", "application/json")
            .body(vec![b' '; 500_000].into());
        let got = visit(request.expect("a request")).await;
        assert_eq!(
            (got.status, got.header("content-length"), got.header("etag")),
            (StatusCode::OK, Some("960000"), Some("\"1\""))
        );
        assert!(got.body == text, "the body is another");
        assert_eq!(origin.last().body, vec![b' '; 500_000]);
        agent.stop().await.expect("stopped as asked");
    }
}
