//! `/_status/{tunnel_id}`: how a tunnel is, for its owner alone. Everybody else is answered as if there were no such tunnel.

use std::time::{Duration, UNIX_EPOCH};

use http::{HeaderMap, HeaderValue, Response, header};
use tunnel_protocol::id::TunnelId;
use tunnel_service::{
    auth::Authenticator,
    now,
    routing::{PublicUrl, Routing},
    tables::tunnels::TunnelsTable,
};

use crate::{
    error::ForwardError,
    response::{self, ResponseBody},
};

/// The last second of the year 9999: RFC 3339 has no later one.
const LAST: u64 = 253_402_300_799;

/// What the answers are made from.
#[derive(Debug)]
pub(crate) struct Status {
    pub(crate) authenticator: Authenticator,
    pub(crate) tunnels: TunnelsTable,
    pub(crate) public_url: PublicUrl,
    pub(crate) routing: Routing,
}

impl Status {
    /// Answers for the tunnel that `name` names.
    ///
    /// # Errors
    /// If the caller is not the owner, or DynamoDB does not answer.
    pub(crate) async fn answer(
        &self,
        name: &str,
        headers: &HeaderMap,
    ) -> Result<Response<ResponseBody>, ForwardError> {
        let identity = self
            .authenticator
            .identify(headers, now())
            .await?
            .ok_or(ForwardError::NotTheOwner)?;
        let id: TunnelId = name.parse().map_err(|_| ForwardError::NoSuchTunnel)?;
        let found = self
            .tunnels
            .get(&id, now())
            .await?
            .filter(|tunnel| tunnel.identity.owner == identity.owner);
        let tunnel = found.ok_or(ForwardError::NoSuchTunnel)?;
        let since = Some(tunnel.since).filter(|since| *since > 0);
        let text = serde_json::json!({
            "tunnel_id": id,
            "status": if tunnel.online.is_some() { "online" } else { "offline" },
            "since": since.map(|since| humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(since.min(LAST))).to_string()),
            "since_seconds": since,
            "public_url": self.public_url.of(&id, self.routing),
        });
        let mut response = Response::new(response::whole(format!("{text}\n")));
        response.headers_mut().insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/json"),
        );
        response
            .headers_mut()
            .insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        Ok(response)
    }
}
