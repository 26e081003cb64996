//! The sockets. `listener` accepts connections; on each, `request_stream` and `request_head` check requests before hyper reads
//! them from `socket`; those over HTTP/2 go through `http2`; `visitors` serves them, by the rules of `host` and `forwarded`. `agents`
//! serves the connections that `handshake` and `agent_limit` accept, in the order of `connection_clock`, and `recheck` checks which
//! of them may stay; `visitor_sockets` serves those of visitors where every step is as in AWS. `response` has the front's own answers.

pub(crate) mod agent_limit;
pub(crate) mod agents;
pub(crate) mod connection_clock;
pub(crate) mod forwarded;
pub(crate) mod handshake;
pub(crate) mod host;
mod http2;
pub(crate) mod listener;
mod recheck;
mod request_head;
mod request_stream;
mod response;
pub(crate) mod socket;
pub(crate) mod upgrade;
pub(crate) mod visitor_sockets;
pub(crate) mod visitors;
