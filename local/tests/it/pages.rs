//! Pages behind path addresses, which think that they live at `/`.

use http::{Method, Request, StatusCode};

use crate::harness::{Got, Origin, ScriptedAgent, agent, stack, visit};

const NAVIGATION: [(&str, &str); 2] = [("sec-fetch-mode", "navigate"), ("accept", "text/html")];

async fn ask(method: Method, url: &str, fields: &[(&str, &str)]) -> Got {
    let request = Request::builder().method(method).uri(url);
    let request = fields.iter().fold(request, |request, (name, value)| {
        request.header(*name, *value)
    });
    visit(request.body("body".into()).expect("a request")).await
}

#[tokio::test]
async fn a_navigation_without_the_final_slash_is_redirected_to_the_address_with_it() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let _agent = agent(&stack, &origin).await;
    let url = format!("{}/my-app", stack.public_url);
    let redirected = ask(Method::GET, &format!("{url}?a=1"), &NAVIGATION).await;
    assert_eq!(redirected.status, StatusCode::TEMPORARY_REDIRECT);
    assert_eq!(redirected.header("location"), Some("/my-app/?a=1"));
    assert_eq!(redirected.header("cache-control"), Some("no-store"));
    assert_eq!(origin.count(), 0);

    for (method, fields) in [
        (Method::GET, &[("sec-fetch-mode", "cors")][..]),
        (Method::GET, &[("accept", "application/json")]),
        (Method::POST, &NAVIGATION),
    ] {
        let served = ask(method.clone(), &url, fields).await;
        assert_eq!(served.status, StatusCode::OK, "{method} {fields:?}");
        assert_eq!(origin.last().uri, "/", "{method} {fields:?}");
    }
}

#[tokio::test]
async fn a_request_that_names_no_tunnel_goes_to_the_tunnel_of_its_page() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let _agent = agent(&stack, &origin).await;
    let base = stack.public_url.to_string();
    let page = format!("{base}/my-app/deep/page?x=1");
    for (method, path) in [
        (Method::GET, "/@vite/client"),
        (Method::GET, "/src/main.js?t=1"),
        (Method::POST, "/api/form"),
        (Method::GET, "/"),
        (Method::GET, "//double"),
        (Method::GET, "/_next/static/main.js"),
    ] {
        let redirected = ask(method, &format!("{base}{path}"), &[("referer", &page)]).await;
        assert_eq!(redirected.status, StatusCode::TEMPORARY_REDIRECT, "{path}");
        let expected = format!("/my-app{path}");
        assert_eq!(redirected.header("location"), Some(&*expected), "{path}");
        assert_eq!(
            redirected.header("cache-control"),
            Some("no-store"),
            "{path}"
        );
        let vary = redirected.header("vary").expect("Vary");
        assert!(vary.contains("Referer"), "{vary}");
    }
    assert_eq!(origin.count(), 0);
}

#[tokio::test]
async fn pages_of_other_origins_and_of_no_tunnel_lead_nowhere() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let _agent = agent(&stack, &origin).await;
    let base = stack.public_url.to_string();
    for referer in [
        "http://other.example/my-app/".to_owned(),
        base.replacen(&stack.address.port().to_string(), "1", 1) + "/my-app/",
        format!("{base}/"),
        format!("{base}/_health"),
        "my-app/".to_owned(),
    ] {
        let fields = [("referer", &*referer)];
        let lost = ask(Method::GET, &format!("{base}/main.js"), &fields).await;
        assert_eq!(lost.status, StatusCode::NOT_FOUND, "{referer}");
    }
    // A tunnel that does not exist must not send its own page's requests round in circles.
    let fields = [("referer", &*format!("{base}/gone-app/"))];
    let lost = ask(Method::GET, &format!("{base}/gone-app/x"), &fields).await;
    assert_eq!(lost.status, StatusCode::NOT_FOUND);
    assert_eq!(origin.count(), 0);
}

#[tokio::test]
async fn a_page_that_has_changed_its_own_address_is_known_by_the_cookie() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let _agent = agent(&stack, &origin).await;
    let base = stack.public_url.to_string();
    let cookie = ("cookie", "ttf_tunnel=my-app");
    let own = format!("{base}/some/route");
    for path in ["/favicon.svg", "/api/items?x=1", "/_next/static/a.js"] {
        for page in [
            own.as_str(),
            &format!("{base}/"),
            &format!("{base}/_own/route"),
        ] {
            let fields = [("referer", page), cookie];
            let redirected = ask(Method::GET, &format!("{base}{path}"), &fields).await;
            let expected = format!("/my-app{path}");
            let location = redirected.header("location");
            assert_eq!(location, Some(&*expected), "{page} {path}");
        }
    }
    let foreign = [("referer", "http://other.example/some/route"), cookie];
    let lost = ask(Method::GET, &format!("{base}/favicon.svg"), &foreign).await;
    assert_eq!(lost.status, StatusCode::NOT_FOUND);
    // A page's own tunnel counts more than the one that was opened last.
    let _other = ScriptedAgent::online(&stack, "other-app", &[]).await;
    let page = format!("{base}/other-app/");
    let fields = [("referer", &*page), cookie];
    let redirected = ask(Method::GET, &format!("{base}/favicon.svg"), &fields).await;
    assert_eq!(
        redirected.header("location"),
        Some("/other-app/favicon.svg")
    );
}

#[tokio::test]
async fn an_address_that_names_a_tunnel_is_that_tunnels() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let _agent = agent(&stack, &origin).await;
    let mut other = ScriptedAgent::online(&stack, "other-app", &[]).await;
    let base = stack.public_url.to_string();
    let (page, url) = (format!("{base}/my-app/"), format!("{base}/other-app/x"));
    let fields = [("referer", &*page)];
    let served = ask(Method::GET, &url, &fields);
    let (served, ()) = tokio::join!(served, async {
        let request = other.hear_type("http_request").await;
        assert_eq!(request["uri"], "/x");
        other.say(&crate::harness::response(&request, "b3Ro")).await;
    });
    assert_eq!(served.status, StatusCode::OK);
}

#[tokio::test]
async fn pages_without_a_referer_are_known_by_a_cookie_of_their_navigation() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let _agent = agent(&stack, &origin).await;
    let base = stack.public_url.to_string();
    let page = ask(Method::GET, &format!("{base}/my-app/"), &NAVIGATION).await;
    let cookie = page.header("set-cookie").expect("a cookie");
    assert_eq!(cookie, "ttf_tunnel=my-app; Path=/; HttpOnly; SameSite=Lax");
    let others = ask(Method::GET, &format!("{base}/my-app/x"), &[]).await;
    assert_eq!(others.header("set-cookie"), None);

    let cookie = ("cookie", "a=1; ttf_tunnel=my-app; b=2");
    let own = [cookie, ("sec-fetch-site", "same-origin")];
    let redirected = ask(Method::GET, &format!("{base}/main.js"), &own).await;
    assert_eq!(redirected.header("location"), Some("/my-app/main.js"));
    for fields in [
        &[cookie][..],
        &[cookie, ("sec-fetch-site", "cross-site")],
        &[
            ("cookie", "ttf_tunnel=NO"),
            ("sec-fetch-site", "same-origin"),
        ],
    ] {
        let lost = ask(Method::GET, &format!("{base}/main.js"), fields).await;
        assert_eq!(lost.status, StatusCode::NOT_FOUND, "{fields:?}");
    }
    // A user who reloads a page that has changed its own address, or has a bookmark of it.
    let reload = [cookie, ("sec-fetch-site", "none"), NAVIGATION[0]];
    let redirected = ask(Method::GET, &format!("{base}/a/route"), &reload).await;
    assert_eq!(redirected.header("location"), Some("/my-app/a/route"));
    // The cookie is not for the local service.
    ask(Method::GET, &format!("{base}/my-app/"), &[cookie]).await;
    assert_eq!(origin.last().header("cookie"), Some("a=1; b=2"));
    ask(
        Method::GET,
        &format!("{base}/my-app/"),
        &[("cookie", "ttf_tunnel=my-app")],
    )
    .await;
    assert_eq!(origin.last().header("cookie"), None);
}

#[tokio::test]
async fn on_this_machine_every_tunnel_has_an_origin_of_its_own_below_localhost() {
    let (stack, origin) = (stack().await, Origin::echo().await);
    let _agent = agent(&stack, &origin).await;
    let port = stack.address.port();
    let host = format!("my-app.localhost:{port}");
    let served = ask(
        Method::GET,
        &format!("{}/main.js", stack.public_url),
        &[("host", &host)],
    )
    .await;
    assert_eq!(served.status, StatusCode::OK);
    assert_eq!(origin.last().uri, "/main.js");
    assert_eq!(origin.last().header("x-forwarded-host"), Some(&*host));
    assert_eq!(origin.last().header("x-forwarded-prefix"), None);

    let mut scripted = ScriptedAgent::connect(&stack, "?tunnel_id=other-app").await;
    let established = scripted
        .ready(&serde_json::json!({ "type": "ready" }))
        .await;
    assert_eq!(
        established["subdomain_url"],
        format!("http://other-app.localhost:{port}")
    );
}
