//! Which host names are served. A page whose domain an attacker points at this machine has the attacker's name in
//! `Host`, and must not be served what only this machine may see (DNS rebinding). And a host that a visitor makes up must not reach
//! local services as the one that they are reached under.

use std::net::IpAddr;

use tunnel_protocol::url::is_loopback;
use tunnel_service::routing::{PublicUrl, host_name};

/// Which hosts are served.
#[derive(Clone, Debug)]
pub(crate) struct HostPolicy {
    public_url: PublicUrl,
    serves_any: bool,
}

/// The host is another's, and the request could be a page's that was lured here.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "The host {asked} is not this service's. Use {public_url}, or start tunnel-local with --public-url or --any-host to serve other names."
)]
pub(crate) struct ForeignHostError {
    asked: String,
    public_url: String,
}

impl HostPolicy {
    /// Hosts of `public_url`, or any if `serves_any`.
    pub(crate) fn new(public_url: PublicUrl, serves_any: bool) -> Self {
        Self {
            public_url,
            serves_any,
        }
    }

    /// The host under which to serve a request for `asked`: that host if it is ours, and that of the public URL otherwise.
    ///
    /// # Errors
    /// If the host is another's and the service is for this machine only.
    pub(crate) fn host(&self, asked: Option<&str>) -> Result<String, ForeignHostError> {
        let Some(asked) = asked else {
            return Ok(self.public_url.authority().to_owned());
        };
        if self.serves_any || self.public_url.covers_host(asked) {
            return Ok(asked.to_owned());
        }
        if !self.public_url.is_loopback() {
            return Ok(self.public_url.authority().to_owned());
        }
        // DNS can point neither an address nor a name without a domain at this machine.
        let name = host_name(asked);
        if is_loopback(&name) || is_address(&name) || !name.contains('.') {
            return Ok(asked.to_owned());
        }
        Err(ForeignHostError {
            asked: asked.to_owned(),
            public_url: self.public_url.to_string(),
        })
    }
}

impl HostPolicy {
    /// The scheme and host of the address to which visitors are sent who asked for this host without TLS: the same host, if it is
    /// ours, on the public URL's port.
    pub(crate) fn secure_origin(&self, asked: Option<&str>) -> String {
        let own = self.public_url.authority();
        let is_served = |asked: &&str| self.serves_any || self.public_url.covers_host(asked);
        let name = host_name(asked.filter(is_served).unwrap_or(own));
        let port = own.rsplit_once(':').map(|(_, port)| port);
        let port = port.filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()));
        match port {
            Some(port) => format!("https://{name}:{port}"),
            None => format!("https://{name}"),
        }
    }
}

fn is_address(name: &str) -> bool {
    let bare = name
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'))
        .unwrap_or(name);
    bare.parse::<IpAddr>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(public_url: &str, serves_any: bool) -> HostPolicy {
        HostPolicy::new(public_url.parse().expect("a URL"), serves_any)
    }

    #[test]
    fn a_server_for_this_machine_refuses_names_that_others_dns_could_point_at_it() {
        let local = policy("http://127.0.0.1:8080", false);
        for host in [
            "127.0.0.1:8080",
            "127.0.0.1",
            "localhost:9",
            "my-app.localhost.",
            "LOCALHOST",
            "[::1]:8080",
            "192.168.1.5:8080",
            "buildbox",
        ] {
            assert_eq!(local.host(Some(host)), Ok(host.to_owned()), "{host}");
        }
        for host in [
            "evil.example",
            "Evil.Example.:8080",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
        ] {
            let refused = local.host(Some(host)).expect_err(host);
            assert!(refused.to_string().contains("--any-host"), "{refused}");
        }
        assert_eq!(
            policy("http://127.0.0.1:8080", true).host(Some("evil.example")),
            Ok("evil.example".to_owned())
        );
        assert_eq!(
            policy("http://t.test:8080", false).host(Some("a.t.test")),
            Ok("a.t.test".to_owned())
        );
    }

    #[test]
    fn visitors_without_tls_are_sent_to_the_same_host_if_it_is_ours() {
        for (public_url, asked, expected) in [
            (
                "https://t.example.com",
                Some("t.example.com:80"),
                "https://t.example.com",
            ),
            (
                "https://t.example.com",
                Some("A.t.example.com"),
                "https://a.t.example.com",
            ),
            (
                "https://t.example.com:8443",
                Some("a.t.example.com:80"),
                "https://a.t.example.com:8443",
            ),
            (
                "https://t.example.com",
                Some("evil.example"),
                "https://t.example.com",
            ),
            ("https://t.example.com", None, "https://t.example.com"),
            ("https://[::1]:8443", Some("[::1]:80"), "https://[::1]:8443"),
            ("https://[::1]", Some("[::1]:80"), "https://[::1]"),
        ] {
            let policy = policy(public_url, false);
            assert_eq!(policy.secure_origin(asked), expected, "{asked:?}");
        }
    }

    #[test]
    fn a_public_server_serves_a_foreign_host_under_its_own() {
        let public = policy("https://t.example.com", false);
        for (asked, host) in [
            (Some("t.example.com"), "t.example.com"),
            (Some("A.T.example.com.:443"), "A.T.example.com.:443"),
            (Some("evil.example"), "t.example.com"),
            (Some("10.0.0.7:8080"), "t.example.com"),
            (Some("localhost"), "t.example.com"),
            (None, "t.example.com"),
        ] {
            assert_eq!(public.host(asked), Ok(host.to_owned()), "{asked:?}");
        }
        let any = policy("https://t.example.com", true);
        assert_eq!(
            any.host(Some("other.example")),
            Ok("other.example".to_owned())
        );
    }
}
