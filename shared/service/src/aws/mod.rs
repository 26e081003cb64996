//! What is AWS's own: the SDK's configuration, and the events and answers of WebSocket routes.

pub mod route_event;
pub mod sdk;
