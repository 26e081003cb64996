//! Logging in with the form of the 401 page, as a browser that is not asked for a password.

use bytes::Bytes;
use forwarder::visitor_rules::PolicyArgs;
use http::{HeaderValue, Request, StatusCode};
use local::Server;

use crate::{
    access::{protected, secrets},
    harness::{Agent, Got, Origin, stack, visit},
};

const RIGHT: &str = "ttf_user=alice&ttf_password=open+sesame%21";
const WRONG: &str = "ttf_user=alice&ttf_password=open";

async fn with_password(stack: &Server, origin: &Origin, password: &str) -> Agent {
    let rules = PolicyArgs {
        basic_auth: secrets(&[password]),
        ..PolicyArgs::default()
    };
    protected(stack, origin, rules).await
}

/// A browser's request.
fn request(method: &str, url: &str, fields: &[(&'static str, &str)], body: &str) -> Request<Bytes> {
    let mut request = Request::builder()
        .method(method)
        .uri(url)
        .header("accept", "text/html,*/*;q=0.8");
    for (name, value) in fields {
        request = request.header(*name, HeaderValue::from_str(value).expect("a value"));
    }
    request
        .body(Bytes::copy_from_slice(body.as_bytes()))
        .expect("a request")
}

async fn log_in(url: &str, form: &str) -> Got {
    let kind = ("content-type", "application/x-www-form-urlencoded");
    visit(request("POST", url, &[kind], form)).await
}

fn cookie(got: &Got) -> String {
    let set = got.header("set-cookie").expect("a cookie");
    set.split(';').next().expect("a pair").to_owned()
}

#[tokio::test]
async fn the_form_lets_a_browser_in_and_survives_the_agents_next_connection() {
    let stack = stack().await;
    let origin = Origin::echo().await;
    let agent = with_password(&stack, &origin, "alice:open sesame!").await;
    let page = format!("{}/page?x=1", agent.url);
    let asked = visit(request("GET", &page, &[], "")).await;
    assert_eq!(asked.status, StatusCode::UNAUTHORIZED);
    assert_eq!(
        asked.header("www-authenticate"),
        Some("Basic realm=\"my-app\", charset=\"UTF-8\"")
    );
    let html = String::from_utf8_lossy(&asked.body).into_owned();
    for part in [
        "<form method=\"post\">",
        "name=\"ttf_user\"",
        "name=\"ttf_password\"",
    ] {
        assert!(html.contains(part), "{part}: {html}");
    }

    let welcome = log_in(&page, RIGHT).await;
    assert_eq!(welcome.status, StatusCode::SEE_OTHER, "{welcome:?}");
    assert_eq!(welcome.header("location"), Some(&*page));
    let set = welcome.header("set-cookie").expect("a cookie");
    for part in ["Path=/my-app/", "HttpOnly", "SameSite=Lax", "Max-Age="] {
        assert!(set.contains(part), "{part}: {set}");
    }
    assert!(!set.contains("alice") && !set.contains("sesame"), "{set}");
    assert_eq!(origin.count(), 0);

    let ours = cookie(&welcome);
    let cookies = format!("a=1; {ours}; b=2");
    let visited = visit(request("GET", &page, &[("cookie", &cookies)], "")).await;
    assert_eq!(visited.status, StatusCode::OK);
    assert_eq!(origin.last().header("cookie"), Some("a=1; b=2"));
    assert_eq!(origin.last().header("authorization"), None);

    agent.stop().await.expect("stopped as asked");
    let agent = with_password(&stack, &origin, "alice:open sesame!").await;
    let again = visit(request("GET", &page, &[("cookie", &ours)], "")).await;
    assert_eq!(again.status, StatusCode::OK);

    agent.stop().await.expect("stopped as asked");
    let _agent = with_password(&stack, &origin, "alice:another").await;
    let changed = visit(request("GET", &page, &[("cookie", &ours)], "")).await;
    assert_eq!(
        changed.status,
        StatusCode::UNAUTHORIZED,
        "a cookie ends with its password"
    );
}

#[tokio::test]
async fn a_form_of_the_local_services_own_is_passed_on_once_the_visitor_is_in() {
    let stack = stack().await;
    let origin = Origin::echo().await;
    let agent = with_password(&stack, &origin, "alice:open sesame!").await;
    let url = format!("{}/", agent.url);
    let ours = cookie(&log_in(&url, RIGHT).await);
    let fields = [
        ("content-type", "application/x-www-form-urlencoded"),
        ("cookie", &*ours),
    ];
    let posted = visit(request("POST", &url, &fields, WRONG)).await;
    assert_eq!(
        (posted.status, &posted.body[..]),
        (StatusCode::OK, WRONG.as_bytes())
    );
    // A stranger's is not: it is no login.
    let stranger = log_in(&url, "a=1").await;
    assert_eq!(stranger.status, StatusCode::UNAUTHORIZED);
    assert_eq!(origin.count(), 1);
}

#[tokio::test]
async fn guessing_is_slowed_down_for_the_form_and_for_the_field() {
    let stack = stack().await;
    let origin = Origin::echo().await;
    let agent = with_password(&stack, &origin, "alice:open sesame!").await;
    let url = format!("{}/", agent.url);
    let ours = cookie(&log_in(&url, RIGHT).await);
    let mut refused = None;
    for attempt in 0..30 {
        let got = log_in(&url, WRONG).await;
        match got.status {
            StatusCode::UNAUTHORIZED => {}
            StatusCode::TOO_MANY_REQUESTS => {
                assert!(got.header("retry-after").is_some());
                refused.get_or_insert(attempt);
            }
            other => panic!("{other}"),
        }
    }
    // The right one counted too, and a new window may begin in between.
    let refused = refused.expect("too many");
    assert!((9..=20).contains(&refused), "{refused}");
    // Also the right one, and in the field of Basic authentication too.
    assert_eq!(
        log_in(&url, RIGHT).await.status,
        StatusCode::TOO_MANY_REQUESTS
    );
    let right = [("authorization", "Basic YWxpY2U6b3BlbiBzZXNhbWUh")];
    assert_eq!(
        visit(request("GET", &url, &right, "")).await.status,
        StatusCode::TOO_MANY_REQUESTS
    );
    assert_eq!(origin.count(), 0);
    // Whoever is in already does not guess.
    let visited = visit(request("GET", &url, &[("cookie", &ours)], "")).await;
    assert_eq!(visited.status, StatusCode::OK);
}

#[tokio::test]
async fn curl_with_a_password_goes_on_to_work() {
    let stack = stack().await;
    let origin = Origin::echo().await;
    let agent = with_password(&stack, &origin, "alice:open sesame!").await;
    let url = format!("{}/", agent.url);
    for _ in 0..20 {
        let right = [("authorization", "Basic YWxpY2U6b3BlbiBzZXNhbWUh")];
        let got = visit(request("GET", &url, &right, "")).await;
        assert_eq!(got.status, StatusCode::OK);
    }
}
