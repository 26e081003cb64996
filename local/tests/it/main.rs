//! The end-to-end suite: visitor, stack, agent and a recording local service, all on real sockets.

#![allow(clippy::panic, reason = "a story that goes wrong ends here")]
#![allow(clippy::expect_used, clippy::unwrap_used, reason = "so does this")]

mod access;
mod compatibility;
mod events;
mod executable;
mod faults;
mod fidelity;
mod front;
mod harness;
mod hostile;
mod http2;
mod inspector;
mod jwt;
mod lifecycle;
mod load;
mod login;
mod operator;
mod ownership;
mod pages;
mod protocol;
mod quotas;
mod recheck;
mod replies;
mod responses;
mod serving;
mod template;
mod tls;
mod visitor_sockets;
mod websocket;
