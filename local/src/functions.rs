//! The four functions, with the settings that the options give them.

use std::sync::Arc;

use tunnel_connect::Connect;
use tunnel_default::DefaultRoute;
use tunnel_disconnect::{Disconnect, WebSocketApis};
use tunnel_forward::Forward;
use tunnel_local_aws::{dynamodb, management::ConnectionRegistry};
use tunnel_service::{
    agent_path::{AgentPath, CloudPath, InProcess},
    agents::WebSocketApiUrl,
    auth::{AuthMode, AuthSettings, Credentials, jwt::Jwt},
    aws::sdk::SdkConfig,
    replies::Replies,
    routing::PublicUrl,
};

use crate::{
    front::visitor_sockets::EdgeSecret,
    options::{Options, OptionsError, Transport},
};

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
    /// The WebSocket API, where @connections is.
    pub(crate) websocket_api: &'s WebSocketApiUrl,
    /// The visitors' WebSocket API, if there is one, and the secret of its edge.
    pub(crate) sockets: Option<(&'s WebSocketApiUrl, &'s EdgeSecret)>,
    /// Where the tables are.
    pub(crate) sdk: &'s SdkConfig,
    /// Agents' connections.
    pub(crate) connections: &'s ConnectionRegistry,
    /// Where replies are waited for.
    pub(crate) replies: &'s Replies,
}

impl Functions {
    /// Makes them.
    ///
    /// # Errors
    /// If the settings for JSON Web Tokens cannot be used.
    pub(crate) fn new(
        options: &Options,
        surroundings: &Surroundings<'_>,
    ) -> Result<Self, OptionsError> {
        let auth = auth(options)?;
        let sdk = surroundings.sdk;
        let connect = tunnel_connect::Settings {
            auth: auth.clone(),
            tunnels_table: dynamodb::TUNNELS.to_owned(),
            connections_table: dynamodb::CONNECTIONS.to_owned(),
            max_tunnel_ids: options.max_tunnel_ids_per_owner,
        };
        let disconnect = tunnel_disconnect::Settings {
            tunnels_table: dynamodb::TUNNELS.to_owned(),
            connections_table: dynamodb::CONNECTIONS.to_owned(),
            websockets: surroundings.sockets.map(|(visitors, _)| WebSocketApis {
                agents: surroundings.websocket_api.clone(),
                visitors: visitors.clone(),
            }),
        };
        Ok(Self {
            connect: Connect::new(connect, sdk),
            default: DefaultRoute::new(surroundings.default(options), sdk),
            disconnect: Disconnect::new(disconnect, sdk),
            forward: Forward::new(surroundings.forward(options, auth), sdk),
        })
    }
}

impl Surroundings<'_> {
    fn default(&self, options: &Options) -> tunnel_default::Settings {
        tunnel_default::Settings {
            auth: options.auth,
            tokens_table: dynamodb::TOKENS.to_owned(),
            tunnels_table: dynamodb::TUNNELS.to_owned(),
            connections_table: dynamodb::CONNECTIONS.to_owned(),
            agent_path: self.agent_path(options),
            public_url: self.public_url.clone(),
            routing: options.routing,
            visitor_sockets: self.sockets.map(|(visitors, _)| visitors.clone()),
        }
    }

    fn forward(&self, options: &Options, auth: AuthSettings) -> tunnel_forward::Settings {
        tunnel_forward::Settings {
            auth,
            tunnels_table: dynamodb::TUNNELS.to_owned(),
            connections_table: dynamodb::CONNECTIONS.to_owned(),
            agent_path: self.agent_path(options),
            public_url: self.public_url.clone(),
            routing: options.routing,
            streaming_url: None,
            max_concurrent_requests: options.max_concurrent_requests,
            max_requests_per_second: options.max_requests_per_second,
            edge_secrets: self
                .sockets
                .map(|(_, secret)| secret.known())
                .unwrap_or_default(),
            pad_empty_streams: false,
            lambda: None,
        }
    }

    fn agent_path(&self, options: &Options) -> AgentPath {
        match options.transport {
            Transport::InProcess => AgentPath::InProcess(InProcess {
                connections: Arc::new(self.connections.clone()),
                replies: self.replies.clone(),
                life: options.quotas.life,
            }),
            Transport::Emulated => AgentPath::Cloud(CloudPath {
                websocket_api: self.websocket_api.clone(),
                management: self.websocket_api.clone(),
                pending_requests_table: dynamodb::PENDING_REQUESTS.to_owned(),
            }),
        }
    }
}

fn auth(options: &Options) -> Result<AuthSettings, OptionsError> {
    let credentials = match options.auth {
        AuthMode::Token => Credentials::Token,
        AuthMode::Jwt => {
            let settings = options.jwt.clone().unwrap_or_default();
            let jwt = Jwt::new(settings).map_err(|error| OptionsError::of_jwt(&error))?;
            Credentials::Jwt(Arc::new(jwt))
        }
        AuthMode::Open => Credentials::Open,
    };
    Ok(AuthSettings {
        credentials,
        tokens_table: dynamodb::TOKENS.to_owned(),
    })
}
