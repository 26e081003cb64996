//! What is AWS's own: Lambda, the SDK's configuration, and the events and answers of WebSocket routes.

pub mod lambda;
pub mod route_event;
pub mod sdk;
