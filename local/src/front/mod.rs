//! The sockets: visitors' requests and agents' connections.

pub mod agents;
pub mod forwarded;
pub mod length_check;
pub mod visitors;
