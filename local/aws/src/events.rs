//! WebSocket events as API Gateway makes them ("Set up a WebSocket API integration request" in its developer guide).

use std::collections::BTreeMap;

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use http::{HeaderMap, Uri};
use serde_json::{Value, json};
use tunnel_protocol::{headers::value_to_text, id::ConnectionId};
use tunnel_service::now;

/// What all events of one connection have in common.
#[derive(Clone, Debug)]
pub struct EventSource {
    /// The connection.
    pub connection_id: ConnectionId,
    /// When it was opened, in milliseconds since 1970.
    pub connected_at: u64,
    /// The agent's address.
    pub source_ip: String,
    /// The stage in the WebSocket API's address.
    pub stage: &'static str,
}

impl EventSource {
    /// The event of the `$connect` route.
    pub fn connect(&self, headers: &HeaderMap, uri: &Uri) -> ApiGatewayWebsocketProxyRequest {
        let mut event = self.event("$connect", "CONNECT", &json!({}));
        let values: BTreeMap<&str, Vec<String>> = headers
            .keys()
            .map(|name| {
                (
                    name.as_str(),
                    headers
                        .get_all(name)
                        .iter()
                        .map(|value| value_to_text(value).into_owned())
                        .collect(),
                )
            })
            .collect();
        let last: BTreeMap<&str, &String> = values
            .iter()
            .filter_map(|(name, values)| Some((*name, values.last()?)))
            .collect();
        event["headers"] = json!(last);
        event["multiValueHeaders"] = json!(values);
        let mut query: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, value) in form_urlencoded::parse(uri.query().unwrap_or_default().as_bytes()) {
            query
                .entry(name.into_owned())
                .or_default()
                .push(value.into_owned());
        }
        if !query.is_empty() {
            let last: BTreeMap<&String, &String> = query
                .iter()
                .filter_map(|(name, values)| Some((name, values.last()?)))
                .collect();
            event["queryStringParameters"] = json!(last);
            event["multiValueQueryStringParameters"] = json!(query);
        }
        typed(event)
    }

    /// The event of a message.
    pub fn message(&self, body: String) -> ApiGatewayWebsocketProxyRequest {
        let mut event = typed(self.event("$default", "MESSAGE", &json!({ "messageId": unique() })));
        event.body = Some(body);
        event
    }

    /// The event of the `$disconnect` route.
    pub fn disconnect(&self, code: u16, reason: &str) -> ApiGatewayWebsocketProxyRequest {
        typed(self.event(
            "$disconnect",
            "DISCONNECT",
            &json!({ "disconnectStatusCode": code, "disconnectReason": reason }),
        ))
    }

    fn event(&self, route_key: &str, event_type: &str, more: &Value) -> Value {
        let request_id = unique();
        let mut context = json!({
            "routeKey": route_key,
            "eventType": event_type,
            "messageDirection": "IN",
            "stage": self.stage,
            "connectedAt": self.connected_at,
            "requestTimeEpoch": u64::try_from(now().as_millis()).unwrap_or(u64::MAX),
            "identity": { "sourceIp": self.source_ip },
            "requestId": request_id,
            "extendedRequestId": request_id,
            "domainName": "localhost",
            "connectionId": self.connection_id.as_str(),
            "apiId": "local",
        });
        if let (Some(context), Some(more)) = (context.as_object_mut(), more.as_object()) {
            context.extend(more.clone());
        }
        json!({ "requestContext": context, "isBase64Encoded": false })
    }
}

fn typed(event: Value) -> ApiGatewayWebsocketProxyRequest {
    serde_json::from_value(event).expect("an event with all fields its type requires")
}

fn unique() -> String {
    tunnel_protocol::id::RequestId::generate().to_string()
}
