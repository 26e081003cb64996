//! Who is let in, and how much of it: rules that agents set, limits that the service sets, and proxies whose word counts.

use bytes::Bytes;
use forwarder::{settings::Secret, tunnel::TunnelError, visitor_rules::PolicyArgs};
use http::{Request, StatusCode};
use local::{Options, Server};
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite;
use tunnel_local_aws::quotas::Quotas;
use tunnel_protocol::cidr::Cidr;
use tunnel_service::routing::Routing;

use crate::harness::{
    Agent, Got, Origin, ScriptedAgent, ScriptedService, agent, get, raw, response, settings, stack,
    stack_with, visit, within,
};

/// `alice:opensesame`, as a visitor sends it.
pub(crate) const ALICE: &str = "Basic YWxpY2U6b3BlbnNlc2FtZQ==";

pub(crate) fn secrets(texts: &[&str]) -> Option<Vec<Secret>> {
    Some(
        texts
            .iter()
            .map(|text| Secret::from((*text).to_owned()))
            .collect(),
    )
}

fn networks(texts: &[&str]) -> Option<Vec<Cidr>> {
    Some(
        texts
            .iter()
            .map(|text| text.parse().expect("a network"))
            .collect(),
    )
}

pub(crate) async fn protected(stack: &Server, origin: &Origin, rules: PolicyArgs) -> Agent {
    let access = rules.check().expect("rules");
    Agent::online(forwarder::settings::Settings {
        access,
        ..settings(stack, origin.address)
    })
    .await
}

async fn visit_with(url: &str, fields: &[(&str, &str)]) -> Got {
    let request = fields
        .iter()
        .fold(Request::get(url), |request, (name, value)| {
            request.header(*name, *value)
        });
    visit(request.body(Bytes::new()).expect("a request")).await
}

async fn with_subdomains() -> Server {
    stack_with(Options {
        routing: Routing::Subdomain,
        ..Options::default()
    })
    .await
}

fn with_passwords() -> PolicyArgs {
    PolicyArgs {
        basic_auth: secrets(&["bob:x", "alice:opensesame"]),
        ..PolicyArgs::default()
    }
}

#[tokio::test]
async fn a_password_is_required_on_every_way_to_a_tunnel() {
    let (stack, origin) = (with_subdomains().await, Origin::echo().await);
    let _agent = protected(&stack, &origin, with_passwords()).await;
    let host = stack.public_url.to_string().split_off("http://".len());
    let subdomain = format!("my-app.{host}");
    let wrong = "authorization: Basic YWxpY2U6b3BlbnNlc2FtZA==\r\n";
    let twice = format!("authorization: {ALICE}\r\nauthorization: {ALICE}\r\n");
    let other_scheme = ALICE.replace("Basic", "authorization: Bearer") + "\r\n";
    let preflight = "origin: https://x.example\r\naccess-control-request-method: GET\r\n";
    for (line, host, fields) in [
        ("GET /my-app/ HTTP/1.1", &host, ""),
        ("GET /my-app HTTP/1.1", &host, ""),
        ("GET /my-app//x/../y HTTP/1.1", &host, ""),
        ("GET /my-app/?authorization=x HTTP/1.1", &host, ""),
        ("get /my-app/ HTTP/1.1", &host, ""),
        ("POST /my-app/ HTTP/1.1", &host, "content-length: 0\r\n"),
        ("OPTIONS /my-app/ HTTP/1.1", &host, preflight),
        ("GET /my-app/ HTTP/1.0", &host, ""),
        ("GET / HTTP/1.1", &subdomain, ""),
        ("GET / HTTP/1.0", &subdomain, ""),
        ("GET / HTTP/1.1", &subdomain.to_uppercase(), ""),
        ("GET /my-app/ HTTP/1.1", &subdomain, ""),
        ("GET /my-app/ HTTP/1.1", &host, wrong),
        ("GET /my-app/ HTTP/1.1", &host, &*twice),
        ("GET /my-app/ HTTP/1.1", &host, &*other_scheme),
        (
            "GET /my-app/ HTTP/1.1",
            &host,
            &*format!("connection: authorization\r\nx-authorization: {ALICE}\r\n"),
        ),
    ] {
        let answer = raw(
            &stack,
            format!("{line}\r\nhost: {host}\r\n{fields}connection: close\r\n\r\n").as_bytes(),
        )
        .await
        .to_lowercase();
        assert!(
            answer.starts_with("http/1.") && answer[8..].starts_with(" 401 "),
            "{line} {host} {fields}: {answer}"
        );
        assert!(
            answer.contains("x-tunnel-error: visitor_unauthorized\r\n"),
            "{answer}"
        );
        assert!(
            answer.contains("www-authenticate: basic realm=\"my-app\""),
            "{answer}"
        );
    }
    let upper_case = raw(
        &stack,
        format!("GET /MY-APP/ HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n").as_bytes(),
    )
    .await;
    assert!(upper_case.starts_with("HTTP/1.1 404 "), "{upper_case}");
    assert_eq!(origin.count(), 0, "a request came through");
}

#[tokio::test]
async fn a_password_lets_in_and_is_not_passed_on() {
    let (stack, origin) = (with_subdomains().await, Origin::echo().await);
    let _agent = protected(&stack, &origin, with_passwords()).await;
    let by_path = stack.public_url.to_string() + "/my-app/";
    for scheme in ["Basic", "basic", "BASIC"] {
        let got = visit_with(
            &by_path,
            &[
                ("authorization", &ALICE.replace("Basic", scheme)),
                ("x-other", "1"),
            ],
        )
        .await;
        assert_eq!(got.status, StatusCode::OK);
    }
    assert_eq!(
        (
            origin.last().header("authorization"),
            origin.last().header("x-other")
        ),
        (None, Some("1")),
        "what was meant for us"
    );
}

#[tokio::test]
async fn without_rules_authorization_is_passed_to_the_local_service() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let agent = agent(&stack, &origin).await;
    visit_with(&agent.url, &[("authorization", ALICE)]).await;
    assert_eq!(origin.last().header("authorization"), Some(ALICE));
}

#[tokio::test]
async fn networks_are_checked_for_the_visitors_real_address_only() {
    let stack = stack().await;
    let claims = [
        ("x-forwarded-for", "192.0.2.1"),
        ("forwarded", "for=192.0.2.1"),
        ("x-real-ip", "192.0.2.1"),
    ];
    for (allow, deny, is_admitted) in [
        (None, networks(&["192.0.2.0/24"]), true),
        (networks(&["127.0.0.0/8"]), None, true),
        (networks(&["192.0.2.0/24", "::ffff:127.0.0.1"]), None, true),
        (networks(&["192.0.2.0/24"]), None, false),
        (networks(&["::1"]), None, false),
        (None, networks(&["::ffff:127.0.0.0/104"]), false),
        (networks(&["127.0.0.1"]), networks(&["127.0.0.0/8"]), false),
    ] {
        let origin = Origin::echo().await;
        let agent = protected(
            &stack,
            &origin,
            PolicyArgs {
                allow: allow.clone(),
                deny: deny.clone(),
                ..PolicyArgs::default()
            },
        )
        .await;
        let got = visit_with(&agent.url, &claims).await;
        let expected = if is_admitted {
            (StatusCode::OK, None, 1)
        } else {
            (StatusCode::FORBIDDEN, Some("visitor_forbidden"), 0)
        };
        assert_eq!(
            (got.status, got.error(), origin.count()),
            expected,
            "allow {allow:?}, deny {deny:?}"
        );
        agent.stop().await.expect("stopped as asked");
    }
}

#[tokio::test]
async fn a_secret_header_is_required_and_not_passed_on() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let rules = PolicyArgs {
        require_header: secrets(&["X-Origin-Verify: swordfish", "x-origin-verify: next"]),
        ..PolicyArgs::default()
    };
    let agent = protected(&stack, &origin, rules).await;
    for fields in [
        &[][..],
        &[("x-origin-verify", "Swordfish")],
        &[
            ("x-origin-verify", "swordfish"),
            ("x-origin-verify", "next"),
        ],
    ] {
        let got = visit_with(&agent.url, fields).await;
        assert_eq!(
            (got.status, got.error()),
            (StatusCode::FORBIDDEN, Some("visitor_forbidden")),
            "{fields:?}"
        );
        assert!(
            !String::from_utf8_lossy(&got.body).contains("verify"),
            "it tells which header: {got:?}"
        );
    }
    assert_eq!(origin.count(), 0);
    for value in ["swordfish", "next"] {
        assert_eq!(
            visit_with(&agent.url, &[("X-Origin-Verify", value)])
                .await
                .status,
            StatusCode::OK
        );
        assert_eq!(origin.last().header("x-origin-verify"), None);
    }
}

/// PolicyArgs that a scripted agent can send.
fn rules(rules: PolicyArgs) -> Value {
    rules
        .check()
        .expect("rules")
        .for_one_connection()
        .expect("rules")
        .to_json()
}

#[tokio::test]
async fn a_request_that_moves_to_another_connection_is_held_to_the_rules_there() {
    let stack = stack().await;
    let mut open = ScriptedAgent::online(&stack, "my-app", &["notices"]).await;
    let url = format!("{}/my-app/", stack.public_url);
    // Which connection serves the tunnel is remembered now.
    open.answer(&url, |request| vec![response(request, "aGk=")])
        .await;
    let mut closed = ScriptedAgent::connect(&stack, "?tunnel_id=my-app").await;
    let access = rules(PolicyArgs {
        basic_auth: secrets(&["alice:opensesame"]),
        ..PolicyArgs::default()
    });
    closed
        .ready(&json!({ "type": "ready", "access": access }))
        .await;
    assert_eq!(open.hear().await["type"], "replaced");

    let give_back = async |open: &mut ScriptedAgent| {
        let request = open.hear().await;
        open.say(
            &json!({ "type": "error", "request_id": request["request_id"], "code": "replaced" }),
        )
        .await;
        request
    };
    let (got, _) = tokio::join!(get(&url), give_back(&mut open));
    assert_eq!(
        (got.status, got.error()),
        (StatusCode::UNAUTHORIZED, Some("visitor_unauthorized"))
    );
    closed.expect_quiet("the request was sent on").await;

    let admitted = visit_with(&url, &[("authorization", ALICE)]);
    let (got, ()) = tokio::join!(admitted, async {
        let request = closed.hear().await;
        assert_eq!(
            request["headers"]["authorization"],
            Value::Null,
            "the password went on"
        );
        closed.say(&response(&request, "aGk=")).await;
    });
    assert_eq!(got.status, StatusCode::OK);
}

#[tokio::test]
async fn a_connection_without_rules_after_one_with_rules_admits_everyone() {
    let stack = stack().await;
    let access = rules(PolicyArgs {
        deny: networks(&["127.0.0.1"]),
        ..PolicyArgs::default()
    });
    let mut strict = ScriptedAgent::connect(&stack, "?tunnel_id=my-app").await;
    strict
        .ready(&json!({ "type": "ready", "access": access }))
        .await;
    let mut open = ScriptedAgent::online(&stack, "my-app", &[]).await;
    let url = format!("{}/my-app/", stack.public_url);
    let got = open
        .answer(&url, |request| vec![response(request, "aGk=")])
        .await;
    assert_eq!(got.status, StatusCode::OK);
}

#[tokio::test]
async fn visitor_rules_that_the_service_cannot_enforce_open_no_tunnel() {
    let stack = stack().await;
    let hash = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    let salt = "AAAAAAAAAAAAAAAAAAAAAA==";
    for access in [
        json!({}),
        json!([]),
        json!(true),
        json!("nobody"),
        json!({ "allow": ["everybody"] }),
        json!({ "allow": ["192.0.2.0/24"], "captcha": true }),
        json!({ "allow": vec!["192.0.2.0/24"; 65] }),
        json!({ "salt": salt, "basic": vec![hash; 33] }),
        json!({ "salt": "", "basic": [hash] }),
        json!({ "salt": salt, "basic": ["c2hvcnQ="] }),
        json!({ "salt": salt, "headers": [{ "name": "host", "hash": hash }] }),
    ] {
        let mut agent = ScriptedAgent::connect(&stack, "?tunnel_id=my-app").await;
        let said = agent
            .ready(&json!({ "type": "ready", "access": access }))
            .await;
        assert_eq!(said["type"], "error", "{access}: {said}");
        assert_eq!(agent.close_code().await, 1000);
        let got = get(&format!("{}/my-app/", stack.public_url)).await;
        assert_eq!(
            (got.status, got.error()),
            (StatusCode::SERVICE_UNAVAILABLE, Some("tunnel_offline")),
            "{access}"
        );
    }
}

#[tokio::test]
async fn an_agent_with_visitor_rules_exits_if_the_service_does_not_know_them() {
    let (service, origin) = (ScriptedService::listening().await, Origin::echo().await);
    let settings = |rules: PolicyArgs| forwarder::settings::Settings {
        endpoint: service.endpoint.parse().expect("an endpoint"),
        access: rules.check().expect("rules"),
        ..settings_without_stack(&origin)
    };
    let all = PolicyArgs {
        basic_auth: secrets(&["alice:opensesame"]),
        allow: networks(&["192.0.2.0/24"]),
        deny: networks(&["192.0.2.1"]),
        require_header: secrets(&["X-Key: swordfish"]),
    };
    let mut agent = Agent::start(settings(all));
    let mut connection = service.accept().await;
    let ready = connection.hear().await;
    let access = ready["access"].to_string();
    assert!(access.contains("192.0.2.1"), "{ready}");
    assert!(
        !access.contains("alice") && !access.contains("sesame") && !access.contains("swordfish"),
        "{access}"
    );
    connection
        .establish("my-app", &["body_parts", "cancel", "notices", "window"])
        .await;
    assert_eq!(agent.ended().await, Err(TunnelError::Unprotected));
    assert_eq!(connection.close_code().await, 1005, "it was not closed");
    assert_eq!(origin.count(), 0);

    let mut agent = Agent::start(settings(PolicyArgs::default()));
    let mut connection = service.accept().await;
    assert_eq!(connection.hear().await["access"], Value::Null);
    connection.establish("my-app", &[]).await;
    agent.until_online().await;
}

fn settings_without_stack(origin: &Origin) -> forwarder::settings::Settings {
    crate::harness::settings_for("ws://127.0.0.1:9/_ws", origin.address)
}

#[tokio::test]
async fn forwarding_fields_are_believed_from_trusted_proxies_only() {
    let trusted = networks(&["127.0.0.1", "198.51.100.0/24"]).expect("networks");
    let stack = stack_with(Options {
        trusted_proxies: trusted,
        ..Options::default()
    })
    .await;
    let origin = Origin::echo().await;
    let agent = agent(&stack, &origin).await;
    for (said, address) in [
        (&["203.0.113.9"][..], "203.0.113.9"),
        (&["192.0.2.1, 203.0.113.9"], "203.0.113.9"),
        (&["192.0.2.1,203.0.113.9 , 198.51.100.7"], "203.0.113.9"),
        (&["192.0.2.1", "203.0.113.9"], "203.0.113.9"),
        (&["203.0.113.9:4711"], "203.0.113.9"),
        (&["2001:db8::1"], "2001:db8::1"),
        (&["[2001:db8::1]:443"], "2001:db8::1"),
        (&["::ffff:203.0.113.9"], "203.0.113.9"),
        (&["198.51.100.8, 198.51.100.7"], "198.51.100.8"),
        (&["203.0.113.9, unreadable"], "unknown"),
        (&["203.0.113.9, "], "unknown"),
        (&[], "127.0.0.1"),
    ] {
        let fields: Vec<(&str, &str)> = said
            .iter()
            .map(|value| ("x-forwarded-for", *value))
            .collect();
        visit_with(&agent.url, &fields).await;
        assert_eq!(
            origin.last().header("x-forwarded-for"),
            Some(address),
            "{said:?}"
        );
    }
    visit_with(
        &agent.url,
        &[("x-forwarded-proto", "gopher"), ("x-forwarded-host", "")],
    )
    .await;
    assert_eq!(origin.last().header("x-forwarded-proto"), Some("http"));
    visit_with(
        &agent.url,
        &[
            ("x-forwarded-proto", "http, HTTPS"),
            ("x-forwarded-host", "evil.example, public.example"),
        ],
    )
    .await;
    let seen = origin.last();
    assert_eq!(
        (
            seen.header("x-forwarded-proto"),
            seen.header("x-forwarded-host")
        ),
        (Some("https"), Some("public.example"))
    );
}

#[tokio::test]
async fn networks_are_checked_for_the_visitor_behind_a_trusted_proxy() {
    let trusted = networks(&["127.0.0.1"]).expect("networks");
    let stack = stack_with(Options {
        trusted_proxies: trusted,
        ..Options::default()
    })
    .await;
    let origin = Origin::echo().await;
    let agent = protected(
        &stack,
        &origin,
        PolicyArgs {
            allow: networks(&["203.0.113.0/24"]),
            ..PolicyArgs::default()
        },
    )
    .await;
    for (said, status) in [
        ("203.0.113.9", StatusCode::OK),
        ("192.0.2.1, 203.0.113.9", StatusCode::OK),
        ("203.0.113.9, 192.0.2.1", StatusCode::FORBIDDEN),
        ("203.0.113.9, unreadable", StatusCode::FORBIDDEN),
        ("", StatusCode::FORBIDDEN),
    ] {
        assert_eq!(
            visit_with(&agent.url, &[("x-forwarded-for", said)])
                .await
                .status,
            status,
            "{said}"
        );
    }
}

#[tokio::test]
async fn a_tunnels_requests_at_once_are_limited() {
    let stack = stack_with(Options {
        max_concurrent_requests: 1,
        ..Options::default()
    })
    .await;
    let mut busy = ScriptedAgent::online(&stack, "busy", &[]).await;
    let mut other = ScriptedAgent::online(&stack, "other", &[]).await;
    let (busy_url, other_url) = (
        format!("{}/busy/", stack.public_url),
        format!("{}/other/", stack.public_url),
    );

    let (first, ()) = tokio::join!(get(&busy_url), async {
        let request = busy.hear().await;
        let second = get(&busy_url).await;
        assert_eq!(
            (second.status, second.error()),
            (StatusCode::TOO_MANY_REQUESTS, Some("rate_limited"))
        );
        assert_eq!(second.header("retry-after"), Some("1"));
        let (elsewhere, ()) = tokio::join!(get(&other_url), async {
            let request = other.hear().await;
            other.say(&response(&request, "aGk=")).await;
        });
        assert_eq!(
            elsewhere.status,
            StatusCode::OK,
            "another tunnel has to wait"
        );
        busy.say(&response(&request, "aGk=")).await;
    });
    assert_eq!(first.status, StatusCode::OK);

    // The place is free as soon as the service has written the last byte, which the visitor may have read by then.
    let again = async { while get(&busy_url).await.status == StatusCode::TOO_MANY_REQUESTS {} };
    let serve = async {
        let request = busy.hear().await;
        busy.say(&response(&request, "aGk=")).await;
    };
    within("a free place", async { tokio::join!(again, serve) }).await;
}

#[tokio::test]
async fn a_tunnels_requests_per_second_are_limited() {
    let stack = stack_with(Options {
        max_requests_per_second: 1,
        ..Options::default()
    })
    .await;
    let origin = Origin::echo().await;
    let agent = agent(&stack, &origin).await;
    let visits = (0..40).map(|_| get(&agent.url));
    let got = within("answers", futures_util::future::join_all(visits)).await;
    let (served, refused): (Vec<&Got>, Vec<&Got>) =
        got.iter().partition(|got| got.status == StatusCode::OK);
    assert!(
        served.len() >= 2 && !refused.is_empty(),
        "{} were served",
        served.len()
    );
    assert_eq!(origin.count(), served.len());
    for got in refused {
        assert_eq!(
            (got.status, got.error()),
            (StatusCode::TOO_MANY_REQUESTS, Some("rate_limited"))
        );
        assert_eq!(got.header("retry-after"), Some("1"));
    }
}

#[tokio::test]
async fn requests_refused_by_the_visitor_rules_do_not_count() {
    let stack = stack_with(Options {
        max_requests_per_second: 1,
        ..Options::default()
    })
    .await;
    let origin = Origin::echo().await;
    let rules = PolicyArgs {
        basic_auth: secrets(&["alice:opensesame"]),
        ..PolicyArgs::default()
    };
    let agent = protected(&stack, &origin, rules).await;
    for _ in 0..20 {
        assert_eq!(get(&agent.url).await.status, StatusCode::UNAUTHORIZED);
    }
    let admitted = visit_with(&agent.url, &[("authorization", ALICE)]).await;
    assert_eq!(admitted.status, StatusCode::OK, "strangers used it up");
}

#[tokio::test]
async fn the_number_of_agents_of_one_owner_is_limited() {
    let quotas = Quotas {
        agents_of_one: 2,
        ..Quotas::default()
    };
    let auth = tunnel_service::auth::AuthMode::Token;
    let stack = stack_with(Options {
        quotas,
        auth,
        ..Options::default()
    })
    .await;
    let (alice, bob) = (
        stack.create_token("alice").await.expect("a token"),
        stack.create_token("bob").await.expect("a token"),
    );
    let connect = |token: String| {
        let stack = &stack;
        async move { ScriptedAgent::try_connect(stack, "", Some(&token)).await }
    };
    let is_refused = |outcome: &Result<ScriptedAgent, tungstenite::Error>| matches!(outcome, Err(tungstenite::Error::Http(response)) if response.status() == 429);
    let first = connect(alice.clone()).await.expect("a connection");
    let _second = connect(alice.clone()).await.expect("a connection");
    assert!(is_refused(&connect(alice.clone()).await));
    assert!(connect(bob).await.is_ok(), "another owner has to wait");
    drop(first);
    within("a free place", async {
        while is_refused(&connect(alice.clone()).await) {}
    })
    .await;
}
