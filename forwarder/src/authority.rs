//! Host and port as users write them, checked more strictly than `http::uri::Authority` does: it takes ports that do not exist, and
//! `Uri` then reports none, so that a typo would reach another port.

use std::net::{Ipv4Addr, Ipv6Addr};

use http::uri::Authority;

/// Why a text is not a host with an optional port.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
pub enum AuthorityError {
    /// It has a user name or password, which would be printed with the address.
    #[error("leave out the user name and password")]
    UserInfo,
    /// No machine has this name.
    #[error("the host is missing or is not a host name or IP address")]
    Host,
    /// A colon without a number from 1 to 65535 behind it.
    #[error("the port must be a number from 1 to 65535")]
    Port,
}

/// Checks that an authority is a host and, at most, a port, and returns the port.
///
/// # Errors
/// If it has user information, no host, or a port that cannot be.
pub(crate) fn check(authority: &Authority) -> Result<Option<u16>, AuthorityError> {
    if authority.as_str().contains('@') {
        return Err(AuthorityError::UserInfo);
    }
    let host = authority.host();
    let port = match authority.as_str().strip_prefix(host) {
        Some("") => None,
        Some(rest) => Some(port(rest.strip_prefix(':').ok_or(AuthorityError::Host)?)?),
        None => return Err(AuthorityError::Host),
    };
    if is_host(host) {
        Ok(port)
    } else {
        Err(AuthorityError::Host)
    }
}

/// Reads a port that a service can listen on.
///
/// # Errors
/// If the text is not a number from 1 to 65535.
pub(crate) fn port(text: &str) -> Result<u16, AuthorityError> {
    match text.parse() {
        Ok(port) if port > 0 && text.bytes().all(|byte| byte.is_ascii_digit()) => Ok(port),
        _ => Err(AuthorityError::Port),
    }
}

fn is_host(host: &str) -> bool {
    if let Some(address) = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
    {
        return address.parse::<Ipv6Addr>().is_ok();
    }
    let name = host.strip_suffix('.').unwrap_or(host);
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    // A name that ends in a number is an IPv4 address or a mistake (URL Standard, "ends in a number").
    let ends_in_number = name
        .rsplit('.')
        .next()
        .is_some_and(|label| label.bytes().all(|byte| byte.is_ascii_digit()));
    name.split('.').all(is_label) && (!ends_in_number || name.parse::<Ipv4Addr>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(text: &str) -> Result<Option<u16>, AuthorityError> {
        check(&text.parse().expect("an authority"))
    }

    #[test]
    fn a_host_may_have_a_port_and_nothing_else() {
        for (text, port) in [
            ("localhost", None),
            ("my_app.test.:1", Some(1)),
            ("127.0.0.1:65535", Some(65535)),
            ("[::1]:80", Some(80)),
        ] {
            assert_eq!(checked(text), Ok(port), "{text}");
        }
        for (text, error) in [
            ("user:pass@localhost", AuthorityError::UserInfo),
            ("localhost:", AuthorityError::Port),
            ("localhost:0", AuthorityError::Port),
            ("localhost:99999", AuthorityError::Port),
            (":3000", AuthorityError::Host),
            (".", AuthorityError::Host),
            ("a..b", AuthorityError::Host),
            ("-1", AuthorityError::Host),
            ("3000", AuthorityError::Host),
            ("3000.5", AuthorityError::Host),
            ("127.0.0.256", AuthorityError::Host),
        ] {
            assert_eq!(checked(text), Err(error), "{text}");
        }
    }
}
