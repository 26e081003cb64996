//! Pages behind path addresses. A page at `https://example.com/my-app/` that asks for `/main.js` means its own tunnel, though the
//! address does not say so. What a browser sends along does: the page's address in `Referer`, or, after a route of the page's own
//! has replaced that address, a cookie that was set when the page was opened.
//!
//! No body is touched. A navigation without the final slash is redirected to the address with it, so that relative links work; a
//! request that names no tunnel is redirected (307) to the tunnel of the page that made it; a WebSocket handshake, which follows
//! no redirect, is served as if it had named the tunnel of the page.

use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, Uri, header};
use tunnel_protocol::{id::TunnelId, upgrade};
use tunnel_service::routing::{PublicUrl, Route, Routing, host_name};

use crate::{
    request::VisitorRequest,
    response::{self, ResponseBody},
};

/// The cookie that says which tunnel's page was opened last under this host.
pub(crate) const COOKIE: &str = "ttf_tunnel";

/// What is known of the page that a request comes from, or that it asks for.
#[derive(Debug, Default)]
pub(crate) struct Page {
    /// Where a request that names no tunnel may belong, the likelier place first. The tunnel need not exist.
    pub(crate) homes: Vec<Home>,
    /// The cookie for the answer to a navigation.
    cookie: Option<HeaderValue>,
}

/// A tunnel's address for what was asked for.
#[derive(Clone, Debug)]
pub(crate) struct Home {
    pub(crate) id: TunnelId,
    /// The path of the tunnel, without the final slash.
    prefix: String,
    /// The path and query that were asked for.
    target: String,
}

impl Page {
    /// Reads what a request says about its page. `route` is what its address means.
    pub(crate) fn of(
        routing: Routing,
        base: &PublicUrl,
        route: &Route,
        request: &VisitorRequest,
    ) -> Self {
        match route {
            Route::Tunnel { prefix, .. } if prefix.is_empty() => Self::default(),
            Route::OwnOrigin { .. } => Self::default(),
            // Paths below `/_` are the service's own, but Next.js, for one, has its scripts there.
            Route::Own(_) | Route::None => Self {
                homes: homes(routing, base, request),
                cookie: None,
            },
            Route::Tunnel { id, prefix, .. } => Self {
                // A request for a page of a tunnel that does not exist must not be sent to itself.
                homes: homes(routing, base, request)
                    .into_iter()
                    .filter(|home| home.id != *id)
                    .collect(),
                cookie: is_navigation(&request.method, &request.headers)
                    .then(|| set_cookie(id, prefix, &request.scheme))
                    .flatten(),
            },
        }
    }

    /// Sets the cookie where the answer is to a navigation.
    pub(crate) fn mark(self, response: &mut Response<ResponseBody>) {
        if let Some(cookie) = self.cookie {
            response.headers_mut().append(header::SET_COOKIE, cookie);
        }
    }
}

impl Home {
    /// The address, for requests that follow no redirect.
    pub(crate) fn into_route(self) -> Route {
        let path = self.target.split('?').next().unwrap_or("/").to_owned();
        Route::Tunnel {
            id: self.id,
            prefix: self.prefix,
            path,
        }
    }

    /// The redirect to the address.
    pub(crate) fn redirect(&self) -> Option<Response<ResponseBody>> {
        let mut response = redirect(&format!("{}{}", self.prefix, self.target))?;
        response.headers_mut().insert(
            header::VARY,
            HeaderValue::from_static("Referer, Cookie, Sec-Fetch-Site"),
        );
        Some(response)
    }
}

/// The redirect of a navigation to a tunnel's path without the final slash.
pub(crate) fn final_slash(
    route: &Route,
    request: &VisitorRequest,
) -> Option<Response<ResponseBody>> {
    let Route::Tunnel { prefix, .. } = route else {
        return None;
    };
    let is_without_slash = !prefix.is_empty() && request.path == *prefix;
    if !is_without_slash || !is_navigation(&request.method, &request.headers) {
        return None;
    }
    let query = request.query.as_ref().map(|query| format!("?{query}"));
    redirect(&format!("{prefix}/{}", query.unwrap_or_default()))
}

/// Takes the cookie of this name out of the fields, because it is not the local service's, and returns its first value.
pub(crate) fn take_cookie(headers: &mut HeaderMap, name: &str) -> Option<String> {
    let value = cookie(headers, name)?.to_owned();
    let is_named = |pair: &str| pair.trim().split('=').next() == Some(name);
    let fields: Vec<HeaderValue> = headers.get_all(header::COOKIE).iter().cloned().collect();
    headers.remove(header::COOKIE);
    for field in fields {
        let has_it = |text: &&str| text.split(';').any(is_named);
        let Some(text) = field.to_str().ok().filter(has_it) else {
            headers.append(header::COOKIE, field);
            continue;
        };
        let rest: Vec<&str> = text.split(';').filter(|pair| !is_named(pair)).collect();
        let rest = rest.join(";");
        if let Ok(value) = HeaderValue::from_str(rest.trim())
            && !value.is_empty()
        {
            headers.append(header::COOKIE, value);
        }
    }
    Some(value)
}

/// Where a request may belong that names no tunnel: to the page in its `Referer`, and, if it comes from a page of this host, to the
/// page that was opened last.
fn homes(routing: Routing, base: &PublicUrl, request: &VisitorRequest) -> Vec<Home> {
    let headers = &request.headers;
    let referer = headers.get(header::REFERER);
    let referring = referer.and_then(|referer| same_origin_path(referer, &request.host));
    let has_own_page = match referer {
        Some(_) => referring.is_some(),
        None => comes_from_a_page(&request.method, headers, &request.host),
    };
    let opened_last = cookie(headers, COOKIE)
        .and_then(|id| id.parse::<TunnelId>().ok())
        .filter(|_| has_own_page)
        .map(|id| format!("{}/{id}/", base.path()));
    let target = || {
        let query = request.query.as_ref().map(|query| format!("?{query}"));
        format!("{}{}", request.path, query.unwrap_or_default())
    };
    let home = |path: String| match Route::of(routing, base, &request.host, &path) {
        Route::Tunnel { id, prefix, .. } if !prefix.is_empty() => Some(Home {
            id,
            prefix,
            target: target(),
        }),
        _ => None,
    };
    referring
        .into_iter()
        .chain(opened_last)
        .filter_map(home)
        .collect()
}

/// The path of a `Referer` or `Origin` of the host that the request was sent to.
fn same_origin_path(value: &HeaderValue, host: &str) -> Option<String> {
    let uri: Uri = value.to_str().ok()?.parse().ok()?;
    let authority = uri.authority()?;
    let is_same =
        host_name(authority.as_str()) == host_name(host) && port(authority.as_str()) == port(host);
    is_same.then(|| uri.path().to_owned())
}

fn port(host: &str) -> Option<&str> {
    let (_, port) = host.rsplit_once(':')?;
    port.bytes().all(|b| b.is_ascii_digit()).then_some(port)
}

/// Whether a script, style, form or WebSocket of a page of this host sent the request, or the browser's user did, who reloads a
/// page or opens a bookmark. A page of another site cannot use the cookie.
fn comes_from_a_page(method: &Method, headers: &HeaderMap, host: &str) -> bool {
    let site = headers.get(HeaderName::from_static("sec-fetch-site"));
    let is_same_site = site.is_none_or(|site| {
        site == "same-origin" || (site == "none" && is_navigation(method, headers))
    });
    let is_own_handshake = upgrade::requested(headers).is_some()
        && headers
            .get(header::ORIGIN)
            .is_some_and(|origin| same_origin_path(origin, host).is_some());
    is_same_site && (site.is_some() || is_own_handshake)
}

/// Whether a browser opens a page with the request.
fn is_navigation(method: &Method, headers: &HeaderMap) -> bool {
    let wants_html = || {
        headers
            .get_all(header::ACCEPT)
            .iter()
            .any(|accept| accept.to_str().is_ok_and(|text| text.contains("text/html")))
    };
    let mode = headers.get(HeaderName::from_static("sec-fetch-mode"));
    matches!(*method, Method::GET | Method::HEAD)
        && mode.map_or_else(wants_html, |mode| mode == "navigate")
}

fn cookie<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    let fields = headers.get_all(header::COOKIE).iter();
    fields
        .filter_map(|field| field.to_str().ok())
        .flat_map(|field| field.split(';'))
        .find_map(|pair| pair.trim().strip_prefix(name)?.strip_prefix('='))
}

/// Its `Path` is where all tunnels are, because the requests that it is for name none of them.
fn set_cookie(id: &TunnelId, prefix: &str, scheme: &str) -> Option<HeaderValue> {
    let base = prefix.strip_suffix(id.as_str())?;
    let secure = if scheme == "https" { "; Secure" } else { "" };
    let cookie = format!("{COOKIE}={id}; Path={base}; HttpOnly; SameSite=Lax{secure}");
    HeaderValue::from_str(&cookie).ok()
}

/// 307, which keeps method and body, and is not remembered.
fn redirect(location: &str) -> Option<Response<ResponseBody>> {
    let mut response = Response::new(response::whole(""));
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    let headers = response.headers_mut();
    headers.insert(header::LOCATION, HeaderValue::from_str(location).ok()?);
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Some(response)
}
