//! What a request's head must be, so that this front, a proxy before it and the local service behind it see the same
//! request (RFC 9112, 2.2, 3.2, 6.1, 6.3 and 11.2). hyper would silently drop a second length, and would answer other
//! faults with an empty 400, so each head is checked here before hyper sees it.

use std::{borrow::Cow, mem::MaybeUninit};

use bytes::{Bytes, BytesMut};
use http::{Uri, uri::Authority};
use tunnel_protocol::limits::MAX_HEADER_FIELDS;
use tunnel_service::routing::{encode_path, encode_query};

/// Longest request line plus header fields, in bytes. API Gateway takes 10,240.
pub(crate) const MAX_HEAD_BYTES: usize = 64 * 1024;
/// Longest target, in bytes: what hyper takes.
const MAX_TARGET_BYTES: usize = u16::MAX as usize - 1;
/// Longest body that a length may announce, in bytes. hyper cannot count above 2^64 - 3; nothing real is longer than this.
const MAX_CONTENT_LENGTH: u64 = i64::MAX as u64;

/// Why a request is not served.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub(crate) enum RequestHeadError {
    /// Not HTTP/1, or not as the RFC wants it.
    #[error("{0}")]
    Malformed(&'static str),
    /// Too long, or too many fields.
    #[error(
        "its request line and headers are over {MAX_HEAD_BYTES} bytes or {MAX_HEADER_FIELDS} fields"
    )]
    TooLarge,
    /// It announces a body that is impossibly long.
    #[error("its Content-Length is over {MAX_CONTENT_LENGTH}")]
    BodyTooLarge,
    /// Its body is coded in a way that this front does not undo.
    #[error("Transfer-Encoding: {0:?} is not supported; only chunked is")]
    TransferEncoding(String),
}

/// How a request's body ends.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Framing {
    /// After this many bytes.
    Length(u64),
    /// With the last chunk.
    Chunked,
}

/// A head that may be served.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) struct RequestHead {
    /// The head as hyper is to see it: as sent, but for characters in the target that had to be escaped.
    pub(crate) bytes: Bytes,
    /// How the body after it ends.
    pub(crate) framing: Framing,
}

/// Takes a head off the front of `input`, once it is there whole.
pub(crate) fn take(input: &mut BytesMut) -> Result<Option<RequestHead>, RequestHeadError> {
    let mut fields = [const { MaybeUninit::uninit() }; MAX_HEADER_FIELDS];
    let mut request = httparse::Request::new(&mut []);
    let length = match request.parse_with_uninit_headers(input, &mut fields) {
        Ok(httparse::Status::Complete(length)) if length <= MAX_HEAD_BYTES => length,
        Ok(httparse::Status::Partial) if input.len() <= MAX_HEAD_BYTES => return Ok(None),
        Ok(_) | Err(httparse::Error::TooManyHeaders) => return Err(RequestHeadError::TooLarge),
        Err(_) => return Err(RequestHeadError::Malformed("it is not HTTP/1")),
    };
    let is_http_11 = request.version == Some(1);
    check_host(request.headers, is_http_11)?;
    let framing = framing(request.headers, is_http_11)?;
    let (Some(method), Some(target)) = (request.method, request.path) else {
        return Err(RequestHeadError::Malformed("it is not HTTP/1"));
    };
    let escaped = escape_target(method, target)?;
    let target_at = target.as_ptr() as usize - input.as_ptr() as usize;
    let target_end = target_at + target.len();
    let bytes = match escaped {
        None => input.split_to(length).freeze(),
        Some(escaped) => {
            let head = input.split_to(length);
            [&head[..target_at], escaped.as_bytes(), &head[target_end..]]
                .concat()
                .into()
        }
    };
    Ok(Some(RequestHead { bytes, framing }))
}

fn values<'h>(
    fields: &'h [httparse::Header<'h>],
    name: &'static str,
) -> impl Iterator<Item = &'h [u8]> {
    fields
        .iter()
        .filter(move |field| field.name.eq_ignore_ascii_case(name))
        .map(|field| field.value)
}

/// RFC 9112, 3.2: exactly one `Host` in HTTP/1.1, and a valid one.
fn check_host(fields: &[httparse::Header<'_>], is_http_11: bool) -> Result<(), RequestHeadError> {
    let mut hosts = values(fields, "host");
    match (hosts.next(), hosts.next()) {
        (None, _) if is_http_11 => Err(RequestHeadError::Malformed("it has no Host")),
        (None, _) => Ok(()),
        (Some(_), Some(_)) => Err(RequestHeadError::Malformed("it has several Host fields")),
        (Some(host), None) if is_host(host) => Ok(()),
        (Some(_), None) => Err(RequestHeadError::Malformed("its Host is not valid")),
    }
}

/// Whether a value is a host with, at most, a port.
pub(crate) fn is_host(value: &[u8]) -> bool {
    let Ok(authority) = Authority::try_from(value) else {
        return false;
    };
    let host = authority.host();
    let Some(port) = authority.as_str().strip_prefix(host) else {
        return false;
    };
    let is_port = port.is_empty()
        || port.strip_prefix(':').is_some_and(|port| {
            port.bytes().all(|b| b.is_ascii_digit())
                && (port.is_empty() || port.parse::<u16>().is_ok())
        });
    // Fewer characters than RFC 3986 allows in a name: real names have no others, and a list of names is not a name.
    let is_name = host
        .bytes()
        .all(|b| b.is_ascii_alphanumeric() || b"-._~%[]:".contains(&b));
    !host.is_empty() && is_name && is_port
}

/// RFC 9112, 6.1 and 6.3: the length of the body is given once, and in a way that all recipients understand.
fn framing(fields: &[httparse::Header<'_>], is_http_11: bool) -> Result<Framing, RequestHeadError> {
    let mut codings = values(fields, "transfer-encoding");
    let mut lengths = values(fields, "content-length");
    match (codings.next(), lengths.next()) {
        (None, None) => Ok(Framing::Length(0)),
        (Some(_), Some(_)) => Err(RequestHeadError::Malformed(
            "it has both Content-Length and Transfer-Encoding",
        )),
        (None, Some(length)) if lengths.next().is_none() => content_length(length),
        (None, Some(_)) => Err(RequestHeadError::Malformed(
            "it has several Content-Length fields",
        )),
        (Some(_), None) if !is_http_11 => Err(RequestHeadError::Malformed(
            "it has a Transfer-Encoding, which HTTP/1.0 does not know",
        )),
        (Some(coding), None) => match codings.next() {
            None if coding.eq_ignore_ascii_case(b"chunked") => Ok(Framing::Chunked),
            second => {
                let all: Vec<&[u8]> = std::iter::once(coding)
                    .chain(second)
                    .chain(codings)
                    .collect();
                let text = String::from_utf8_lossy(&all.join(&b", "[..])).into_owned();
                Err(RequestHeadError::TransferEncoding(text))
            }
        },
    }
}

/// Reads the one Content-Length of a request.
pub(crate) fn content_length(value: &[u8]) -> Result<Framing, RequestHeadError> {
    let is_number = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    if !is_number {
        return Err(RequestHeadError::Malformed(
            "its Content-Length is not a number",
        ));
    }
    std::str::from_utf8(value)
        .ok()
        .and_then(|digits| digits.parse().ok())
        .filter(|length| *length <= MAX_CONTENT_LENGTH)
        .map(Framing::Length)
        .ok_or(RequestHeadError::BodyTooLarge)
}

/// The target with what cannot stand in it escaped; `None` where nothing has to be.
pub(crate) fn escape_target(
    method: &str,
    target: &str,
) -> Result<Option<String>, RequestHeadError> {
    let is_origin_form = target.starts_with('/') || (method == "OPTIONS" && target == "*");
    if !is_origin_form || method == "CONNECT" {
        return Err(RequestHeadError::Malformed(
            "its target is not a path: this is not a proxy",
        ));
    }
    let escaped = match target.split_once('?') {
        Some((path, query)) => {
            let (escaped_path, escaped_query) = (encode_path(path), encode_query(query));
            if escaped_path == path && escaped_query == query {
                Cow::Borrowed(target)
            } else {
                Cow::Owned(format!("{escaped_path}?{escaped_query}"))
            }
        }
        None => encode_path(target),
    };
    if escaped.len() > MAX_TARGET_BYTES {
        return Err(RequestHeadError::TooLarge);
    }
    if escaped.parse::<Uri>().is_err() {
        return Err(RequestHeadError::Malformed("its target is not valid"));
    }
    Ok((escaped != target).then(|| escaped.into_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(head: &str) -> Result<Option<RequestHead>, RequestHeadError> {
        take(&mut BytesMut::from(head.as_bytes()))
    }

    fn framing_of(fields: &str) -> Result<Framing, RequestHeadError> {
        check(&format!("POST /t/ HTTP/1.1\r\nhost: x\r\n{fields}\r\n"))
            .map(|head| head.expect("a whole head").framing)
    }

    #[test]
    fn a_body_has_a_length_or_is_chunked() {
        for (fields, expected) in [
            ("", Framing::Length(0)),
            ("Content-Length: 5\r\n", Framing::Length(5)),
            ("content-length: 005\r\n", Framing::Length(5)),
            (
                "Content-Length: 9223372036854775807\r\n",
                Framing::Length(i64::MAX as u64),
            ),
            ("Transfer-Encoding: chunked\r\n", Framing::Chunked),
            ("Transfer-Encoding:\tChunked \r\n", Framing::Chunked),
            (
                "Transfer_Encoding: chunked\r\nContent-Length: 4\r\n",
                Framing::Length(4),
            ),
        ] {
            assert_eq!(framing_of(fields), Ok(expected), "{fields:?}");
        }
    }

    #[test]
    fn a_length_that_recipients_may_understand_differently_is_refused() {
        use RequestHeadError::{BodyTooLarge, Malformed};
        let both = Malformed("it has both Content-Length and Transfer-Encoding");
        let several = Malformed("it has several Content-Length fields");
        let not_a_number = Malformed("its Content-Length is not a number");
        for (fields, expected) in [
            ("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", &both),
            ("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n", &both),
            ("Content-Length: 5\r\nContent-Length: 5\r\n", &several),
            ("Content-Length: 5, 5\r\n", &not_a_number),
            ("Content-Length: +5\r\n", &not_a_number),
            ("Content-Length: -1\r\n", &not_a_number),
            ("Content-Length:\r\n", &not_a_number),
            ("Content-Length: 18446744073709551615\r\n", &BodyTooLarge),
            ("Content-Length: 18446744073709551616\r\n", &BodyTooLarge),
        ] {
            assert_eq!(framing_of(fields).as_ref(), Err(expected), "{fields:?}");
        }
    }

    #[test]
    fn chunked_is_the_only_transfer_coding() {
        for (fields, refused) in [
            ("Transfer-Encoding: gzip, chunked\r\n", "gzip, chunked"),
            (
                "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
                "chunked, chunked",
            ),
            ("Transfer-Encoding: chunked;q=1\r\n", "chunked;q=1"),
            ("Transfer-Encoding:\r\n", ""),
        ] {
            let expected = RequestHeadError::TransferEncoding(refused.to_owned());
            assert_eq!(framing_of(fields), Err(expected), "{fields:?}");
        }
    }

    #[test]
    fn http_11_has_one_valid_host() {
        let outcome = |version: &str, fields: &str| {
            check(&format!("GET /t/ HTTP/{version}\r\n{fields}\r\n")).map(drop)
        };
        for host in [
            "x",
            "t.example.com:8080",
            "T.Example.com.",
            "127.0.0.1",
            "[::1]:80",
            "a_b",
            "x:",
        ] {
            assert_eq!(
                outcome("1.1", &format!("Host: {host}\r\n")),
                Ok(()),
                "{host}"
            );
        }
        for host in [
            "", "a b", "a/b", "a?b", "u@x", "x:99999", "x:http", "<script>", "[::1", "a,b", "x:1:2",
        ] {
            assert_eq!(
                outcome("1.1", &format!("Host: {host}\r\n")),
                Err(RequestHeadError::Malformed("its Host is not valid")),
                "{host}"
            );
        }
        let none = Err(RequestHeadError::Malformed("it has no Host"));
        assert_eq!(outcome("1.1", ""), none);
        assert_eq!(outcome("1.0", ""), Ok(()));
        let several = Err(RequestHeadError::Malformed("it has several Host fields"));
        assert_eq!(outcome("1.1", "Host: x\r\nhost: x\r\n"), several);
        assert_eq!(outcome("1.0", "Host: x\r\nhost: y\r\n"), several);
    }

    #[test]
    fn only_characters_not_allowed_in_a_target_are_escaped() {
        for (sent, seen) in [
            ("/t/a?q={job=\"x\"}", "/t/a?q={job=%22x%22}"),
            ("/t/<a>?<b>", "/t/%3Ca%3E?%3Cb%3E"),
            ("/t/?\"", "/t/?%22"),
            ("/t/?#", "/t/?%23"),
            ("/\"", "/\""),
            ("/t/a`b?a`b", "/t/a%60b?a`b"),
            ("/t/\u{e9}?\u{e9}=\u{202e}", "/t/%C3%A9?%C3%A9=%E2%80%AE"),
            ("/t/%22%zz?a%20b+c", "/t/%22%zz?a%20b+c"),
            ("/t/a\"{|}^\\[]", "/t/a\"{|}^\\[]"),
            ("/t//../x?a?b", "/t//../x?a?b"),
        ] {
            let sent_head = format!("GET {sent} HTTP/1.1\r\nHost: x\r\nA: {sent}\r\n\r\n");
            let mut input = BytesMut::from(format!("{sent_head}rest").as_bytes());
            let head = take(&mut input).expect("good").expect("whole");
            let expected = sent_head.replacen(sent, seen, 1);
            assert_eq!(String::from_utf8_lossy(&head.bytes), expected, "{sent}");
            assert_eq!(&input[..], b"rest", "{sent}");
        }
    }

    #[test]
    fn what_is_not_a_request_to_this_server_is_refused() {
        for line in [
            "GET http://x/t/ HTTP/1.1",
            "GET x:80 HTTP/1.1",
            "CONNECT x:443 HTTP/1.1",
            "CONNECT / HTTP/1.1",
            "GET * HTTP/1.1",
            "GET /t/ HTTP/1.2",
            "GET /t/ NOTHTTP/1.1",
            "PRI * HTTP/2.0",
            "GET /a b HTTP/1.1",
        ] {
            let outcome = check(&format!("{line}\r\nHost: x\r\n\r\n"));
            assert!(
                matches!(outcome, Err(RequestHeadError::Malformed(_))),
                "{line}: {outcome:?}"
            );
        }
        for field in [
            "A : b",
            "A: b\r\n c",
            "A: b\rc",
            "A: b\0",
            "\u{e9}: b",
            ": b",
        ] {
            let outcome = check(&format!("GET / HTTP/1.1\r\nHost: x\r\n{field}\r\n\r\n"));
            assert!(
                matches!(outcome, Err(RequestHeadError::Malformed(_))),
                "{field:?}: {outcome:?}"
            );
        }
        assert!(check("OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n").is_ok());
    }

    #[test]
    fn a_head_is_waited_for_up_to_its_longest() {
        assert_eq!(check("GET / HTTP/1.1\r\nHost: x\r\n\r"), Ok(None));
        let long = format!(
            "GET / HTTP/1.1\r\nHost: x\r\nA: {}",
            "a".repeat(MAX_HEAD_BYTES)
        );
        assert_eq!(check(&long), Err(RequestHeadError::TooLarge));
        let many = format!(
            "GET / HTTP/1.1\r\n{}\r\n",
            "A: b\r\n".repeat(MAX_HEADER_FIELDS + 1)
        );
        assert_eq!(check(&many), Err(RequestHeadError::TooLarge));
    }
}
