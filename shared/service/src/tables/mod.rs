//! The DynamoDB tables. Each module is one of them; `dynamodb` is what they have in common.

pub mod connections;
pub mod dynamodb;
pub mod logins;
pub mod mailbox;
pub mod tokens;
pub mod tunnels;
pub mod visitor_sockets;
