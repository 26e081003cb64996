//! The files in events/ are what the functions take, and none takes another's.

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use lambda_http::request::LambdaRequest;
use tunnel_forward::request::{Ingress, Payload, VisitorRequest};
use tunnel_protocol::{message, message::FromAgent};
use tunnel_service::aws::route_event::connection_of;

macro_rules! event {
    ($name:literal) => {
        include_str!(concat!("../../../events/", $name, ".json"))
    };
}

const HTTP: [&str; 3] = [event!("http-v1"), event!("http-v2"), event!("url")];
const WEBSOCKET: [(&str, &str); 7] = [
    ("CONNECT", event!("connect")),
    ("DISCONNECT", event!("disconnect")),
    ("MESSAGE", event!("ready")),
    ("MESSAGE", event!("ping")),
    ("MESSAGE", event!("http-response")),
    ("MESSAGE", event!("body-part")),
    ("MESSAGE", event!("agent-error")),
];

fn visit(event: &str) -> VisitorRequest {
    VisitorRequest::from_event(
        serde_json::from_str::<LambdaRequest>(event).expect("an HTTP event"),
        None,
    )
    .expect("a visit")
}

#[test]
fn payload_1_0_and_2_0_and_function_urls_are_read_alike() {
    let visits = HTTP.map(visit);
    assert_eq!(
        visits.each_ref().map(|visit| visit.ingress),
        [
            Ingress::HttpApi(Payload::V1),
            Ingress::HttpApi(Payload::V2),
            Ingress::Streaming
        ]
    );
    for visit in visits {
        assert_eq!(
            (
                visit.method.as_str(),
                visit.path.as_str(),
                visit.query.as_deref()
            ),
            ("GET", "/sample/hello", Some("name=world"))
        );
        assert_eq!(
            (visit.source_ip.as_str(), visit.scheme.as_str()),
            ("203.0.113.9", "https")
        );
        assert_eq!(visit.headers["cookie"], "a=1; b=2");
        assert_eq!(visit.headers["user-agent"], "curl/8.14.1");
    }
}

#[test]
fn http_events_are_never_mistaken_for_websocket_events() {
    for event in HTTP {
        assert!(
            serde_json::from_str::<ApiGatewayWebsocketProxyRequest>(event).is_err(),
            "{event}"
        );
    }
    // Nor would one that had all other fields: only a WebSocket event has a type.
    assert!(connection_of("MESSAGE", None, Some("L0SM9cOFvHcCIhw=")).is_err());
    assert!(connection_of("MESSAGE", Some("CONNECT"), Some("L0SM9cOFvHcCIhw=")).is_err());
    assert!(connection_of("MESSAGE", Some("MESSAGE"), Some("L0SM9cOFvHcCIhw=")).is_ok());
}

#[test]
fn websocket_events_are_never_mistaken_for_http_events() {
    for (event_type, event) in WEBSOCKET {
        // `forward` takes these too, because it answers visitors' handshakes.
        let request = serde_json::from_str::<LambdaRequest>(event);
        assert!(
            matches!(request, Ok(LambdaRequest::WebSocket(_))),
            "{event}"
        );
        let event: ApiGatewayWebsocketProxyRequest =
            serde_json::from_str(event).expect("a WebSocket event");
        assert_eq!(
            event.request_context.event_type.as_deref(),
            Some(event_type)
        );
    }
}

#[test]
fn the_sample_messages_are_messages_of_the_protocol() {
    let bodies = WEBSOCKET
        .iter()
        .filter(|(event_type, _)| *event_type == "MESSAGE");
    let mut count = 0;
    for (_, event) in bodies {
        let event: ApiGatewayWebsocketProxyRequest =
            serde_json::from_str(event).expect("a WebSocket event");
        let message = message::decode::<FromAgent>(event.body.as_deref().expect("a body"))
            .expect("a message");
        assert_ne!(message, FromAgent::Unknown);
        count += 1;
    }
    assert_eq!(count, 5);
}

#[test]
fn paths_decoded_by_an_http_api_are_encoded_again_and_those_of_a_function_url_are_not() {
    let with_path = |event: &str, path: &str| {
        visit(&event.replace("\"/sample/hello\"", &serde_json::json!(path).to_string())).path
    };
    assert_eq!(
        with_path(event!("http-v2"), "/sample/caf\u{e9} {x}?#"),
        "/sample/caf%C3%A9%20%7Bx%7D%3F%23"
    );
    assert_eq!(
        with_path(event!("url"), "/sample/a%2Fb{x}"),
        "/sample/a%2Fb{x}"
    );
}

#[test]
fn bodies_are_decoded_according_to_the_events_flag() {
    use http_body_util::BodyExt;
    let with_body = |body: &str, is_base64: bool| {
        let flag = format!(
            "\"body\": {}, \"isBase64Encoded\": {is_base64}",
            serde_json::json!(body)
        );
        visit(&event!("http-v2").replace("\"isBase64Encoded\": false", &flag)).body
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .expect("a runtime");
    for (body, is_base64, expected) in [("aGk=", true, "hi"), ("aGk=", false, "aGk=")] {
        let bytes = runtime
            .block_on(with_body(body, is_base64).collect())
            .expect("a body")
            .to_bytes();
        assert_eq!(bytes, expected);
    }
}

#[test]
fn a_function_url_behind_a_custom_name_is_recognised_once_configured() {
    let event = event!("url").replace(".lambda-url.us-east-1.on.aws", ".example.com");
    let visit = |streaming_url: Option<&str>| {
        let url = streaming_url.map(|url| url.parse().expect("an address"));
        VisitorRequest::from_event(
            serde_json::from_str(&event).expect("an HTTP event"),
            url.as_ref(),
        )
        .expect("a visit")
        .ingress
    };
    let domain = serde_json::from_str::<serde_json::Value>(&event).expect("JSON")["requestContext"]
        ["domainName"]
        .clone();
    assert_eq!(visit(None), Ingress::HttpApi(Payload::V2));
    assert_eq!(
        visit(Some("https://other.example.com")),
        Ingress::HttpApi(Payload::V2)
    );
    assert_eq!(
        visit(Some(&format!(
            "https://{}",
            domain.as_str().expect("a name")
        ))),
        Ingress::Streaming
    );
}
