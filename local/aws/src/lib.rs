//! What stands in for AWS on one machine: [`dynamodb`] is the embedded engine with the tables of template.yaml, [`management`]
//! the open connections with the @connections API, [`events`] the events of WebSocket routes, [`quotas`] API Gateway's limits,
//! [`backup`] copies of its data, [`revision`] whether that has changed, and [`caller`] who may call any of it.

pub mod backup;
pub mod caller;
pub mod dynamodb;
pub mod events;
pub mod management;
pub mod quotas;
pub mod revision;
