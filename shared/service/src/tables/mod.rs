//! The DynamoDB tables. Each module is one of them; `dynamodb` is what they have in common.

pub mod connections;
pub mod dynamodb;
pub mod mailbox;
pub mod tokens;
pub mod tunnels;
