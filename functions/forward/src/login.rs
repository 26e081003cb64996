//! Logging in with a form, for browsers that are not asked: not every front passes `WWW-Authenticate` on.
//!
//! Who sends the form of the 401 page to any address of the tunnel, with a user name and password that its rules accept, gets a cookie
//! that has them, sealed. From then on they count as if they had been sent in `Authorization`, so a login ends with its password, and
//! does not end when the agent connects again. An address may try only so often.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD, prelude::BASE64_URL_SAFE_NO_PAD};
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use http_body_util::BodyExt;
use ring::{
    aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    rand::{SecureRandom, SystemRandom},
};
use tunnel_protocol::id::TunnelId;
use tunnel_service::{
    aside::aside,
    now,
    tables::logins::{KEY_BYTES, LoginsTable},
};

use crate::{
    TunnelPath,
    error::ForwardError,
    pages,
    request::{VisitorRequest, wants_html},
    response::{self, ResponseBody},
};

/// The cookie with which a browser stays logged in.
const COOKIE: &str = "ttf_login";
/// For how long.
const LIFETIME: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// Attempts of one address with one tunnel's passwords within the window of [`LoginsTable::attempt`].
const MAX_ATTEMPTS: u64 = 10;
/// Most addresses that are remembered to have tried too often.
const MAX_REFUSED: usize = 10_000;
/// The longest form.
const MAX_FORM_BYTES: usize = 8 * 1024;
/// The form's fields.
const USER: &str = "ttf_user";
const PASSWORD: &str = "ttf_password";

/// The form, for the 401 page. It is sent to the address that was asked for.
pub(crate) const FORM: &str = r#"<form method="post">
<p><label>User name<br><input name="ttf_user" autocomplete="username" autofocus required></label></p>
<p><label>Password<br><input name="ttf_password" type="password" autocomplete="current-password" required></label></p>
<p><button>Log in</button></p>
</form>
"#;

/// What logins need.
#[derive(Debug)]
pub(crate) struct Logins {
    table: LoginsTable,
    key: OnceLock<LessSafeKey>,
    /// Until when an address is refused at a tunnel, in seconds since 1970.
    refused: Mutex<HashMap<(TunnelId, String), u64>>,
}

/// What a visitor says of itself besides `Authorization`.
#[derive(Clone, Debug, Default)]
pub(crate) struct LoginCookie(Option<String>);

impl LoginCookie {
    /// Takes the cookie out of a request: it is not the local service's.
    pub(crate) fn take(headers: &mut HeaderMap) -> Self {
        Self(pages::take_cookie(headers, COOKIE))
    }
}

impl Logins {
    pub(crate) fn new(table: LoginsTable) -> Self {
        Self {
            table,
            key: OnceLock::new(),
            refused: Mutex::default(),
        }
    }

    /// The visitor's fields as if what is in its cookie had been sent. `None` if nothing is.
    pub(crate) async fn fields(
        &self,
        cookie: &LoginCookie,
        tunnel: &TunnelId,
        fields: &HeaderMap,
    ) -> Result<Option<HeaderMap>, ForwardError> {
        let Some(sealed) = cookie
            .0
            .as_deref()
            .filter(|_| !fields.contains_key(header::AUTHORIZATION))
        else {
            return Ok(None);
        };
        let key = self.key().await?;
        let Some(credentials) = open(key, tunnel, sealed, now()) else {
            return Ok(None);
        };
        let mut fields = fields.clone();
        fields.extend(basic(&credentials).map(|value| (header::AUTHORIZATION, value)));
        Ok(Some(fields))
    }

    /// Refuses an address that has tried too often, as far as this process knows.
    pub(crate) fn check(
        &self,
        tunnel: &TunnelId,
        address: Option<IpAddr>,
    ) -> Result<(), ForwardError> {
        let refused = self.refused();
        if refused.is_empty() {
            return Ok(());
        }
        match refused.get(&(tunnel.clone(), network(address))) {
            Some(&until) if until > now().as_secs() => Err(too_often(until)),
            _ => Ok(()),
        }
    }

    /// Counts an attempt, and refuses the address if it was one too many.
    pub(crate) async fn count(
        &self,
        tunnel: &TunnelId,
        address: Option<IpAddr>,
    ) -> Result<(), ForwardError> {
        self.check(tunnel, address)?;
        let from = network(address);
        let attempts = self.table.attempt(tunnel, &from, now()).await?;
        if attempts.count <= MAX_ATTEMPTS {
            return Ok(());
        }
        let mut refused = self.refused();
        if refused.len() >= MAX_REFUSED {
            let now = now().as_secs();
            refused.retain(|_, until| *until > now);
        }
        if refused.len() < MAX_REFUSED {
            refused.insert((tunnel.clone(), from), attempts.until);
        }
        Err(too_often(attempts.until))
    }

    /// The cookie for a visitor whose user name and password were right, and the way back to the page.
    pub(crate) async fn welcome(
        &self,
        login: &LoginForm,
        path: &TunnelPath,
        page: &Page,
    ) -> Result<Response<ResponseBody>, ForwardError> {
        let key = self.key().await?;
        let sealed = seal(key, &path.tunnel, &login.credentials, now() + LIFETIME);
        let secure = if page.scheme == "http" {
            ""
        } else {
            "; Secure"
        };
        let cookie = format!(
            "{COOKIE}={sealed}; Path={}/; Max-Age={}; HttpOnly; SameSite=Lax{secure}",
            path.prefix,
            LIFETIME.as_secs()
        );
        let mut response = Response::new(response::whole(""));
        *response.status_mut() = StatusCode::SEE_OTHER;
        let headers = response.headers_mut();
        for (name, value) in [
            (header::SET_COOKIE, &*cookie),
            (header::LOCATION, &*page.address),
            (header::CACHE_CONTROL, "no-store"),
        ] {
            let value = HeaderValue::from_str(value)
                .map_err(|_| ForwardError::BadRequest("its address is not valid".to_owned()))?;
            headers.insert(name, value);
        }
        Ok(response)
    }

    async fn key(&self) -> Result<&LessSafeKey, ForwardError> {
        if let Some(key) = self.key.get() {
            return Ok(key);
        }
        let mut fresh = [0; KEY_BYTES];
        random(&mut fresh);
        let key = aside(|| self.table.key(fresh)).await?;
        let key = UnboundKey::new(&CHACHA20_POLY1305, &key).expect("32 bytes");
        Ok(self.key.get_or_init(|| LessSafeKey::new(key)))
    }

    /// Held between awaits only.
    fn refused(&self) -> MutexGuard<'_, HashMap<(TunnelId, String), u64>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where the visitor is.
#[derive(Debug)]
pub(crate) struct Page {
    scheme: String,
    address: String,
}

impl Page {
    /// The page that a request is for.
    pub(crate) fn of(request: &VisitorRequest) -> Self {
        let query = request.query.as_ref().map(|query| format!("?{query}"));
        // With the host, because a path may begin with two slashes.
        let address = format!(
            "{}://{}{}{}",
            request.scheme,
            request.host,
            request.path,
            query.unwrap_or_default()
        );
        Self {
            scheme: request.scheme.clone(),
            address,
        }
    }
}

/// The form, filled in.
#[derive(Debug)]
pub(crate) struct LoginForm {
    /// `name:password`.
    credentials: String,
}

impl LoginForm {
    /// Whether a request may be the form: what a browser sends for it. The body decides.
    pub(crate) fn may_be(request: &VisitorRequest) -> bool {
        let is_form = request
            .headers
            .get(header::CONTENT_TYPE)
            .is_some_and(|kind| {
                kind.as_bytes()
                    .starts_with(b"application/x-www-form-urlencoded")
            });
        request.method == Method::POST && is_form && wants_html(&request.headers)
    }

    /// Reads the form from a request's body. `None` if it is something else.
    pub(crate) async fn read(request: Box<VisitorRequest>) -> Option<Self> {
        let mut stream = request.body;
        let mut body = Vec::new();
        while let Some(frame) = stream.frame().await {
            body.extend_from_slice(&frame.ok()?.into_data().unwrap_or_default());
            if body.len() > MAX_FORM_BYTES {
                return None;
            }
        }
        let value = |name: &str| {
            form_urlencoded::parse(&body)
                .find(|(key, _)| key == name)
                .map(|(_, value)| value.into_owned())
        };
        let credentials = format!("{}:{}", value(USER)?, value(PASSWORD)?);
        Some(Self { credentials })
    }

    /// The form as the field in which the rules expect it.
    pub(crate) fn fields(&self, fields: &HeaderMap) -> HeaderMap {
        let mut fields = fields.clone();
        fields.extend(basic(&self.credentials).map(|value| (header::AUTHORIZATION, value)));
        fields
    }
}

fn basic(credentials: &str) -> Option<HeaderValue> {
    HeaderValue::from_str(&format!("Basic {}", BASE64_STANDARD.encode(credentials))).ok()
}

fn too_often(until: u64) -> ForwardError {
    let pause = until.saturating_sub(now().as_secs());
    ForwardError::RateLimited(Duration::from_secs(pause))
}

/// What stands for an address: who has an IPv6 address has the 2^64 of its network.
fn network(address: Option<IpAddr>) -> String {
    match address.map(|address| address.to_canonical()) {
        None => "unknown".to_owned(),
        Some(IpAddr::V4(address)) => address.to_string(),
        Some(IpAddr::V6(address)) => {
            let network = std::net::Ipv6Addr::from_bits(address.to_bits() >> 64 << 64);
            format!("{network}/64")
        }
    }
}

fn random(bytes: &mut [u8]) {
    SystemRandom::new()
        .fill(bytes)
        .expect("the system has random bytes");
}

/// Seals credentials for one tunnel: nonce, then end of life and credentials, encrypted.
fn seal(key: &LessSafeKey, tunnel: &TunnelId, credentials: &str, expires: Duration) -> String {
    let mut nonce = [0; NONCE_LEN];
    random(&mut nonce);
    let mut text = expires.as_secs().to_be_bytes().to_vec();
    text.extend_from_slice(credentials.as_bytes());
    key.seal_in_place_append_tag(
        Nonce::assume_unique_for_key(nonce),
        Aad::from(tunnel.as_str().as_bytes()),
        &mut text,
    )
    .expect("a form is shorter than what can be sealed");
    BASE64_URL_SAFE_NO_PAD.encode([&nonce[..], &text].concat())
}

/// The credentials, if the cookie was sealed for this tunnel and has not expired.
fn open(key: &LessSafeKey, tunnel: &TunnelId, sealed: &str, now: Duration) -> Option<String> {
    let mut bytes = BASE64_URL_SAFE_NO_PAD.decode(sealed).ok()?;
    let (nonce, text) = bytes.split_at_mut_checked(NONCE_LEN)?;
    let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
    let aad = Aad::from(tunnel.as_str().as_bytes());
    let text = key.open_in_place(nonce, aad, text).ok()?;
    let (expires, credentials) = text.split_first_chunk()?;
    let is_live = u64::from_be_bytes(*expires) > now.as_secs();
    is_live.then(|| String::from_utf8(credentials.to_vec()).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> LessSafeKey {
        LessSafeKey::new(UnboundKey::new(&CHACHA20_POLY1305, &[7; KEY_BYTES]).expect("a key"))
    }

    #[test]
    fn a_cookie_opens_for_its_tunnel_and_until_it_expires() {
        let (tunnel, other): (TunnelId, TunnelId) = (
            "my-app".parse().expect("an id"),
            "other".parse().expect("an id"),
        );
        let second = Duration::from_secs;
        let sealed = seal(&key(), &tunnel, "alice:pass", second(100));
        assert!(!sealed.contains("alice"));
        assert_eq!(
            open(&key(), &tunnel, &sealed, second(99)).as_deref(),
            Some("alice:pass")
        );
        assert_eq!(open(&key(), &tunnel, &sealed, second(100)), None);
        assert_eq!(open(&key(), &other, &sealed, second(99)), None);
        let mut forged = sealed.clone().into_bytes();
        for at in 0..forged.len() {
            forged[at] ^= 1;
            let text = String::from_utf8_lossy(&forged).into_owned();
            assert_eq!(open(&key(), &tunnel, &text, second(99)), None, "{at}");
            forged[at] ^= 1;
        }
        for text in ["", "x", "AAAA", &sealed[1..]] {
            assert_eq!(open(&key(), &tunnel, text, second(99)), None, "{text}");
        }
    }

    #[test]
    fn addresses_of_one_network_are_one() {
        let of = |text: &str| network(text.parse().ok());
        assert_eq!(of("192.0.2.1"), "192.0.2.1");
        assert_eq!(of("::ffff:192.0.2.1"), "192.0.2.1");
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
    }
}
