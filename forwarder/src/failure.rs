//! Why the local service gave no response, in words.

use std::{error::Error, io};

use http::uri::Scheme;

use crate::{
    connector::CONNECT_TIMEOUT,
    origin::OriginError,
    target::{Target, TargetTransport},
    tls,
};

/// How much of a faulty line is shown, in characters.
const MAX_SHOWN_CHARS: usize = 80;
/// What visitors are told of a response that cannot be read.
const NOT_HTTP: &str = "its response is not HTTP";
/// How a TLS alert begins: a record of type 21, version 3.
const TLS_ALERT: [u8; 2] = [21, 3];

/// Explains why a request had no response, of which `head` is what there was.
pub(crate) fn explain(error: &hyper::Error, head: &[u8], target: &Target) -> OriginError {
    if error.is_parse() {
        let reason = if head.starts_with(&TLS_ALERT) {
            "it speaks TLS; write https:// before the target".to_owned()
        } else if error.is_parse_too_large() {
            return head_too_long();
        } else {
            faulty_line(head).unwrap_or_else(|| format!("its response is not HTTP: {error}"))
        };
        return OriginError::unavailable(NOT_HTTP, Some(reason));
    }
    // Node's and Python's TLS servers answer plain HTTP with nothing at all.
    let may_speak_tls = head.is_empty()
        && target.scheme == Scheme::HTTP
        && matches!(
            target.transport,
            TargetTransport::Tcp | TargetTransport::Loopback
        );
    let hint = may_speak_tls.then(|| {
        "it closed the connection without a response; if it speaks TLS, write https:// before the target".to_owned()
    });
    OriginError::unavailable("it closed the connection without a response", hint)
}

/// The head of a response that is too long, or has too many fields.
pub(crate) fn head_too_long() -> OriginError {
    let reason = "the head of its response is too long".to_owned();
    OriginError::unavailable(NOT_HTTP, Some(reason))
}

/// Explains why there is no connection.
pub(crate) fn explain_connect(error: &(dyn Error + 'static), target: &Target) -> OriginError {
    let unreachable = |cause| OriginError::unavailable("cannot connect to it", cause);
    if let Some(fault) = find::<rustls::Error>(error) {
        let host = target.authority.host();
        let remedy = if tunnel_protocol::url::is_loopback(host) {
            "pass --target-insecure or --target-ca FILE"
        } else {
            "pass --target-ca FILE to accept it"
        };
        return unreachable(Some(tls::explain(fault, host, remedy)));
    }
    let Some(fault) = find::<io::Error>(error) else {
        return unreachable(innermost(error));
    };
    if is_out_of_files(fault) {
        return unreachable(Some(
            "too many open files; raise the limit with `ulimit -n`, or lower --max-concurrent"
                .to_owned(),
        ));
    }
    match fault.kind() {
        io::ErrorKind::ConnectionRefused => {
            OriginError::unavailable("it refused the connection", None)
        }
        // Of the two loopback addresses, this machine has only the first.
        io::ErrorKind::AddrNotAvailable if target.transport == TargetTransport::Loopback => {
            OriginError::unavailable("it refused the connection", None)
        }
        io::ErrorKind::TimedOut => unreachable(Some(format!(
            "no connection could be made within {} s",
            CONNECT_TIMEOUT.as_secs()
        ))),
        io::ErrorKind::NotFound => unreachable(Some(format!("{target} does not exist"))),
        io::ErrorKind::UnexpectedEof => unreachable(Some(
            "it closed the connection during the TLS handshake".to_owned(),
        )),
        _ => unreachable(innermost(error)),
    }
}

fn is_out_of_files(error: &io::Error) -> bool {
    // EMFILE and ENFILE, which have the same numbers on Linux, macOS and the BSDs.
    cfg!(unix) && matches!(error.raw_os_error(), Some(23 | 24))
}

/// The first cause of a type. Errors that `io::Error` wraps are looked into, too: its own `source` skips them.
pub(crate) fn find<'a, T: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a T> {
    causes(error).find_map(|cause| cause.downcast_ref::<T>())
}

fn innermost(error: &(dyn Error + 'static)) -> Option<String> {
    let cause = causes(error).last()?;
    Some(format!("cannot connect to it: {cause}"))
}

/// An error and what caused it, the outermost first.
pub(crate) fn causes<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn Error + 'static)| {
        let error: &'a (dyn Error + 'static) = *error;
        let wrapped = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::get_ref);
        match wrapped {
            Some(wrapped) => Some(wrapped as &(dyn Error + 'static)),
            None => error.source(),
        }
    })
}

/// Says which line of a response's head HTTP does not allow, if one can be named.
fn faulty_line(head: &[u8]) -> Option<String> {
    let mut lines = head
        .split(|byte| *byte == b'\n')
        .map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let status_line = lines.next()?;
    let (number, line) = if is_status_line(status_line) {
        (2..)
            .zip(lines)
            .take_while(|(_, line)| !line.is_empty())
            .find(|(_, line)| !is_field_line(line))?
    } else {
        (1, status_line)
    };
    let shown: String = String::from_utf8_lossy(line)
        .chars()
        .take(MAX_SHOWN_CHARS)
        .collect();
    Some(format!(
        "line {number} of its response is not valid HTTP: {shown}"
    ))
}

fn is_status_line(line: &[u8]) -> bool {
    let after_version = [&b"HTTP/1.1 "[..], b"HTTP/1.0 "]
        .iter()
        .find_map(|version| line.strip_prefix(*version));
    after_version.is_some_and(|rest| {
        let (status, reason) = rest.split_at(rest.len().min(3));
        status.len() == 3
            && status.iter().all(u8::is_ascii_digit)
            && (reason.is_empty() || reason.starts_with(b" "))
    })
}

fn is_field_line(line: &[u8]) -> bool {
    let Some(colon) = line.iter().position(|byte| *byte == b':') else {
        return false;
    };
    let (name, value) = line.split_at(colon);
    let is_text = |byte: &u8| *byte == b'\t' || (*byte >= 32 && *byte != 127);
    http::HeaderName::from_bytes(name).is_ok() && value.iter().all(is_text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_faulty_line_of_a_head_is_named() {
        for (head, line) in [
            (
                "HTTP/1.1 200 OK\r\nA: b\r\nX-A : b\r\n\r\n",
                Some("line 3 of its response is not valid HTTP: X-A : b"),
            ),
            (
                "HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
                Some("line 3 of its response is not valid HTTP:  c"),
            ),
            (
                "HTTP/1.1 200 OK\nno colon\n\n",
                Some("line 2 of its response is not valid HTTP: no colon"),
            ),
            (
                "HTTP/1.1 200 OK\r\n: b\r\n\r\n",
                Some("line 2 of its response is not valid HTTP: : b"),
            ),
            (
                "HTTP/1.2 200 OK\r\n\r\n",
                Some("line 1 of its response is not valid HTTP: HTTP/1.2 200 OK"),
            ),
            (
                "SSH-2.0-OpenSSH\r\n",
                Some("line 1 of its response is not valid HTTP: SSH-2.0-OpenSSH"),
            ),
            ("HTTP/1.1 200 OK\r\nA: \u{fc}\r\n\r\nbody", None),
            ("HTTP/1.0 404\r\n\r\n", None),
        ] {
            assert_eq!(faulty_line(head.as_bytes()).as_deref(), line, "{head:?}");
        }
    }
}
