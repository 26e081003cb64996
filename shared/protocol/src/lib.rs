//! What the agent and the service agree on: the only crate that both ends share. It knows nothing of AWS.
//!
//! [`message`] is the wire protocol. [`body`] is how a body travels in it. [`frames`] is how messages become WebSocket frames, and
//! [`writer`] sends them. [`backoff`] is how long to wait between attempts.
//! [`headers`], [`id`], [`limits`] and [`url`] are rules that both ends follow. [`visitor_policy`] is what
//! an agent requires of visitors and the service enforces, with the networks of [`cidr`].

pub mod backoff;
pub mod body;
pub mod cidr;
pub mod frames;
pub mod headers;
pub mod id;
pub mod limits;
pub mod message;
pub mod upgrade;
pub mod url;
pub mod visitor_policy;
pub mod writer;
