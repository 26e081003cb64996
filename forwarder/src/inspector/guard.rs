//! Who may ask: scripts on this machine and the page itself, but no page of another origin, whatever name it has given this machine.

use std::net::{IpAddr, SocketAddr};

use http::{
    HeaderMap, Method, Request, StatusCode, header,
    uri::{Authority, PathAndQuery},
};

use super::reply::ApiError;

/// What a browser says about the page that asks (Fetch Metadata). There is no constant for it.
const SEC_FETCH_SITE: &str = "sec-fetch-site";

/// Which names the inspector answers to.
#[derive(Clone, Debug)]
pub(crate) struct Guard {
    /// The name that the user has told it to listen at.
    name: Option<String>,
    /// It listens at addresses that other machines reach.
    is_public: bool,
}

impl Guard {
    pub(crate) fn new(name: Option<String>, address: SocketAddr) -> Self {
        Self {
            name,
            is_public: !address.ip().is_loopback(),
        }
    }

    /// Whether a request may be answered.
    ///
    /// # Errors
    /// If it is for another host, or comes from a page of another origin.
    pub(crate) fn check<B>(&self, request: &Request<B>) -> Result<(), ApiError> {
        let host = self.host(request.headers())?;
        let path = request
            .uri()
            .path_and_query()
            .map_or("/", PathAndQuery::path);
        let is_write = !matches!(*request.method(), Method::GET | Method::HEAD);
        // A link on any page may lead to the inspector's page, which then asks itself.
        if !is_write && !path.starts_with("/api") {
            return Ok(());
        }
        let foreign = || {
            ApiError::new(
                StatusCode::FORBIDDEN,
                "foreign_origin",
                "the request comes from a page of another origin",
            )
        };
        if let Some(origin) = request.headers().get(header::ORIGIN)
            && origin.as_bytes() != format!("http://{host}").as_bytes()
        {
            return Err(foreign());
        }
        match request.headers().get(SEC_FETCH_SITE) {
            None => Ok(()),
            Some(site) if site == "same-origin" => Ok(()),
            // The address was typed.
            Some(site) if site == "none" && !is_write => Ok(()),
            Some(_) => Err(foreign()),
        }
    }

    /// The host that a request is for, if the inspector answers to it. Another one was made to lead here (DNS rebinding): its pages
    /// would have the origin of this one.
    fn host(&self, headers: &HeaderMap) -> Result<Authority, ApiError> {
        let mut hosts = headers.get_all(header::HOST).iter();
        let host = match (hosts.next(), hosts.next()) {
            (Some(host), None) => Authority::try_from(host.as_bytes()).ok(),
            _ => None,
        };
        host.filter(|host| !host.as_str().contains('@') && self.answers_to(host.host())).ok_or(ApiError::new(
            StatusCode::FORBIDDEN,
            "foreign_host",
            "the inspector is not at this host: ask for localhost, for its IP address, or for the name that it was started with",
        ))
    }

    fn answers_to(&self, host: &str) -> bool {
        let name = self.name.as_deref();
        if host.eq_ignore_ascii_case("localhost")
            || name.is_some_and(|name| host.eq_ignore_ascii_case(name))
        {
            return true;
        }
        let address = host.trim_start_matches('[').trim_end_matches(']');
        address
            .parse::<IpAddr>()
            .is_ok_and(|ip| self.is_public || ip.is_loopback())
    }
}

/// Whether a request's body is JSON: a form of another page cannot send that.
///
/// # Errors
/// If it is not.
pub(crate) fn check_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let content_type = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    if media_type.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    Err(ApiError::new(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "not_json",
        "send the request with Content-Type: application/json",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(
        guard: &Guard,
        method: &str,
        path: &str,
        fields: &[(&str, &str)],
    ) -> Option<&'static str> {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let request = request.body(()).expect("a request");
        guard.check(&request).err().map(|error| error.code)
    }

    fn loopback() -> Guard {
        Guard::new(None, ([127, 0, 0, 1], 4040).into())
    }

    #[test]
    fn only_hosts_that_cannot_be_rebound_are_answered() {
        let public = Guard::new(Some("agent".to_owned()), ([0, 0, 0, 0], 4040).into());
        for (guard, host, is_answered) in [
            (loopback(), "127.0.0.1:4040", true),
            (loopback(), "localhost:5050", true),
            (loopback(), "LOCALHOST", true),
            (loopback(), "[::1]:4040", true),
            (loopback(), "evil.example.com:4040", false),
            (loopback(), "127.0.0.1.evil.example.com", false),
            (loopback(), "localhost.evil.example.com:4040", false),
            (loopback(), "192.0.2.1:4040", false),
            (loopback(), "user@127.0.0.1:4040x", false),
            (loopback(), "", false),
            (public.clone(), "192.0.2.1:4040", true),
            (public.clone(), "agent:4040", true),
            (public, "evil.example.com:4040", false),
        ] {
            for path in ["/", "/api/tunnels"] {
                let refused = check(&guard, "GET", path, &[("host", host)]);
                assert_eq!(refused.is_none(), is_answered, "{host} {path}");
            }
        }
        assert_eq!(check(&loopback(), "GET", "/", &[]), Some("foreign_host"));
        let twice = [("host", "127.0.0.1"), ("host", "127.0.0.1")];
        assert_eq!(check(&loopback(), "GET", "/", &twice), Some("foreign_host"));
    }

    #[test]
    fn pages_of_other_origins_get_nothing() {
        let host = ("host", "127.0.0.1:4040");
        for (method, path, field, is_answered) in [
            (
                "GET",
                "/api/tunnels",
                ("origin", "http://127.0.0.1:4040"),
                true,
            ),
            (
                "POST",
                "/api/requests/http",
                ("origin", "http://127.0.0.1:4040"),
                true,
            ),
            (
                "POST",
                "/api/requests/http",
                ("origin", "http://127.0.0.1:3000"),
                false,
            ),
            (
                "POST",
                "/api/requests/http",
                ("origin", "https://127.0.0.1:4040"),
                false,
            ),
            ("POST", "/api/requests/http", ("origin", "null"), false),
            (
                "DELETE",
                "/api/requests/http",
                ("sec-fetch-site", "same-site"),
                false,
            ),
            (
                "DELETE",
                "/api/requests/http",
                ("sec-fetch-site", "none"),
                false,
            ),
            (
                "GET",
                "/api/requests/http",
                ("sec-fetch-site", "same-site"),
                false,
            ),
            (
                "GET",
                "/api/requests/http",
                ("sec-fetch-site", "cross-site"),
                false,
            ),
            (
                "GET",
                "/api/requests/http",
                ("sec-fetch-site", "none"),
                true,
            ),
            ("GET", "/api/requests/http", ("accept", "*/*"), true),
            ("GET", "/", ("sec-fetch-site", "cross-site"), true),
        ] {
            let refused = check(&loopback(), method, path, &[host, field]);
            assert_eq!(refused.is_none(), is_answered, "{method} {path} {field:?}");
        }
    }

    #[test]
    fn only_json_is_taken() {
        for (value, is_taken) in [
            ("application/json", true),
            ("Application/JSON; charset=utf-8", true),
            ("text/plain", false),
            ("application/x-www-form-urlencoded", false),
            ("text/plain; application/json", false),
        ] {
            let headers = [(header::CONTENT_TYPE, value.parse().expect("a value"))];
            let headers: HeaderMap = headers.into_iter().collect();
            assert_eq!(check_json(&headers).is_ok(), is_taken, "{value}");
        }
        assert!(check_json(&HeaderMap::new()).is_err());
    }
}
