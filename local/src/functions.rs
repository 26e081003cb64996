//! The four functions, with the settings that the options give them.

use std::sync::Arc;

use tunnel_connect::Connect;
use tunnel_default::DefaultRoute;
use tunnel_disconnect::Disconnect;
use tunnel_forward::Forward;
use tunnel_local_aws::{dynamodb, management::ConnectionRegistry};
use tunnel_service::{
    agents::InProcess,
    aws::sdk::SdkConfig,
    replies::Replies,
    routing::{PublicUrl, Routing},
    settings::{SettingsError, Variables},
};

use crate::options::{Options, Transport};

/// The functions.
pub(crate) struct Functions {
    pub(crate) connect: Connect,
    pub(crate) default: DefaultRoute,
    pub(crate) disconnect: Disconnect,
    pub(crate) forward: Forward,
}

/// What the functions need besides the options.
pub(crate) struct Surroundings<'s> {
    /// The front for visitors.
    pub(crate) public_url: &'s PublicUrl,
    /// The address of the WebSocket API, where @connections is.
    pub(crate) websocket_api: &'s str,
    /// Where the tables are.
    pub(crate) sdk: &'s SdkConfig,
    /// Agents' connections.
    pub(crate) connections: &'s ConnectionRegistry,
    /// Where replies are waited for.
    pub(crate) replies: &'s Replies,
}

impl Functions {
    /// Makes them.
    pub(crate) fn load(
        options: &Options,
        surroundings: &Surroundings<'_>,
    ) -> Result<Self, SettingsError> {
        let variables = || {
            Variables::new(|name| match name {
                "WEBSOCKET_API_ENDPOINT" => Some(surroundings.websocket_api.to_owned()),
                "PUBLIC_URL" => Some(surroundings.public_url.to_string()),
                name => variable(options, name),
            })
        };
        let in_process = InProcess {
            connections: Arc::new(surroundings.connections.clone()),
            replies: surroundings.replies.clone(),
            life: options.quotas.life,
        };
        let in_process = match options.transport {
            Transport::InProcess => Some(&in_process),
            Transport::Emulated => None,
        };
        let sdk = surroundings.sdk;
        Ok(Self {
            connect: Connect::load(variables(), sdk)?,
            default: DefaultRoute::load(variables(), sdk, in_process)?,
            disconnect: Disconnect::load(variables(), sdk)?,
            forward: Forward::load(variables(), sdk, in_process)?,
        })
    }
}

fn variable(options: &Options, name: &str) -> Option<String> {
    let jwt = options.jwt.as_ref();
    match name {
        "ROUTING" => Some(
            match options.routing {
                Routing::Path => "path",
                Routing::Subdomain => "subdomain",
            }
            .to_owned(),
        ),
        "MAX_CONCURRENT_REQUESTS" => Some(options.max_concurrent_requests.to_string()),
        "MAX_REQUESTS_PER_SECOND" => Some(options.max_requests_per_second.to_string()),
        "MAX_TUNNEL_IDS_PER_OWNER" => Some(options.max_tunnel_ids_per_owner.to_string()),
        "AUTH" => Some(options.auth.word().to_owned()),
        "JWT_ISSUER" => Some(jwt?.issuer.clone()),
        "JWT_AUDIENCE" => Some(jwt?.audience.clone()),
        "JWT_JWKS_URL" => Some(jwt?.jwks_url.clone()),
        "JWT_SECRET" => Some(jwt?.secret.clone()),
        table => dynamodb::table_of_variable(table).map(str::to_owned),
    }
}
