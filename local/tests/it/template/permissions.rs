//! Who may invoke a function, and what each function may call.

use std::collections::BTreeSet;

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use lambda_http::request::LambdaRequest;
use lambda_runtime::FunctionResponse;
use serde_yaml_ng::Value;
use tunnel_connect::Connect;
use tunnel_default::DefaultRoute;
use tunnel_disconnect::Disconnect;
use tunnel_forward::Forward;
use tunnel_local_aws::dynamodb;
use tunnel_protocol::limits::LAMBDA_TIMEOUT;
use tunnel_service::{now, tables::connections::ConnectionsTable};

use super::{
    FUNCTIONS, assert_written, properties, resources_of,
    surroundings::{Calls, Database, EDGE_SECRET, Observed, made},
    template,
};
use crate::harness::within;

/// The calls that a function's policies allow: `dynamodb:GetItem TunnelsTable`, `execute-api POST`.
fn allowed(template: &Value, function: &str) -> BTreeSet<String> {
    let list = |value: &Value| match value {
        Value::Sequence(values) => values.clone(),
        other => vec![other.clone()],
    };
    let text = |value: &Value| match value {
        Value::Tagged(tagged) => tagged.value.as_str().unwrap_or_default().to_owned(),
        other => other.as_str().unwrap_or_default().to_owned(),
    };
    let mut allowed = BTreeSet::new();
    for policy in list(&properties(template, function)["Policies"]) {
        for statement in list(&policy["Statement"]) {
            for (action, resource) in list(&statement["Action"]).iter().flat_map(|action| {
                list(&statement["Resource"])
                    .into_iter()
                    .map(move |resource| (action.clone(), resource))
            }) {
                let (action, resource) = (text(&action), text(&resource));
                if action == "execute-api:ManageConnections" {
                    let route = resource.rsplit(':').next().unwrap_or_default();
                    let [_, stage, method, "@connections", "*"] =
                        route.split('/').collect::<Vec<_>>()[..]
                    else {
                        panic!("{resource}: not an API, a stage, a method and all connections")
                    };
                    allowed.insert(format!("@connections {stage} {method}"));
                } else {
                    let resource = resource.replace("${", "").replace('}', "");
                    let (table, index) = resource.split_once(".Arn").expect("a table");
                    let keys =
                        &statement["Condition"]["ForAllValues:StringLike"]["dynamodb:LeadingKeys"];
                    let call = format!("{action} {table}{index}");
                    match keys.as_sequence() {
                        None => drop(allowed.insert(call)),
                        Some(keys) => {
                            allowed
                                .extend(keys.iter().map(|keys| format!("{call} {}", text(keys))));
                        }
                    }
                }
            }
        }
    }
    assert!(!allowed.is_empty(), "{function} has no policies");
    allowed
}

fn websocket(event: &str, replace: &[(&str, &str)]) -> ApiGatewayWebsocketProxyRequest {
    let event = replace.iter().fold(event.to_owned(), |event, (from, to)| {
        event.replace(from, to)
    });
    serde_json::from_str(&event).expect("an event")
}

/// The connection id in the sample events.
const ID: &str = "L0SM9cOFvHcCIhw=";

/// What stands for `ready` in the sample event when the agent names its features, as JSON within JSON.
const READY_TO_BE_REPLACED: &str = r#"ready\",\"features\":[\"notices\"],\"agent\":\"x"#;

const READY_TO_REPLY: &str = r#"ready\",\"features\":[\"reply_to\"],\"agent\":\"x"#;

const READY_FOR_SOCKETS: &str = r#"ready\",\"features\":[\"websockets\"],\"agent\":\"x"#;

const READY_WITH_A_PASSWORD: &str = r#"ready\",\"access\":{\"salt\":\"AAAAAAAAAAAAAAAAAAAAAA==\",\"basic\":[\"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=\"]},\"agent\":\"x"#;

/// All functions. They are sent the sample events, with some texts replaced.
struct Functions {
    connect: Observed<Connect>,
    disconnect: Observed<Disconnect>,
    default: Observed<DefaultRoute>,
    forward: Observed<Forward>,
}

impl Functions {
    async fn load(database: &Database) -> Self {
        Self {
            connect: Observed::load(database, Connect::load).await,
            disconnect: Observed::load(database, Disconnect::load).await,
            default: Observed::load(database, DefaultRoute::load).await,
            forward: Observed::load(database, Forward::load).await,
        }
    }

    /// The calls of each function, in the order of [`FUNCTIONS`].
    fn calls(&self) -> [&Calls; 4] {
        [
            &self.connect.surroundings.calls,
            &self.disconnect.surroundings.calls,
            &self.default.surroundings.calls,
            &self.forward.surroundings.calls,
        ]
    }

    /// The status with which a handshake is answered.
    async fn connect(&self, replace: &[(&str, &str)]) -> u16 {
        let event = websocket(include_str!("../../../../events/connect.json"), replace);
        let answer = self.connect.function.handle(event).await;
        answer.expect("handled").status_code
    }

    /// The status that the `ready` of an agent gets, or what stands in its place.
    async fn ready(&self, id: &str, ready: &str) -> u16 {
        let event = include_str!("../../../../events/ready.json");
        self.message(event, &[(ID, id), ("ready", ready)]).await
    }

    async fn message(&self, event: &str, replace: &[(&str, &str)]) -> u16 {
        let answer = self
            .default
            .function
            .handle(websocket(event, replace))
            .await;
        answer.expect("handled").status_code
    }

    async fn disconnect(&self, id: &str) {
        let event = include_str!("../../../../events/disconnect.json");
        let answer = self
            .disconnect
            .function
            .handle(websocket(event, &[(ID, id)]));
        answer.await.expect("handled");
    }
}

/// Asserts that a visitor's request is answered, if only with an error.
async fn assert_answered(forward: &Forward, why: &str) {
    let event =
        serde_json::from_str::<LambdaRequest>(include_str!("../../../../events/http-v2.json"))
            .expect("an event");
    assert!(forward.handle(event, LAMBDA_TIMEOUT).await.is_ok(), "{why}");
}

/// Agents' connections, one that releases a tunnel id, and the reply connection.
async fn open_connections(functions: &Functions, database: &Database) {
    for id in [ID, "second=", "third=", "gone"] {
        assert_eq!(functions.connect(&[(ID, id)]).await, 200);
    }
    let releases = [(ID, "releases="), ("\"tunnel_id\"", "\"release\"")];
    assert_eq!(functions.connect(&releases).await, 200);
    let ticket = ConnectionsTable::new(&database.sdk, dynamodb::CONNECTIONS.to_owned())
        .issue_ticket(now())
        .await
        .expect("a ticket");
    let bearer = format!("Bearer {ticket}");
    for (connection, status) in [("reply=", 200), ("reply=", 200), ("another=", 401)] {
        let handshake = [
            (ID, connection),
            ("tunnel_id", "reply"),
            ("Bearer sample", &bearer),
        ];
        assert_eq!(
            functions.connect(&handshake).await,
            status,
            "a ticket is good for one connection"
        );
    }
}

/// Every message that agents send. In the end the tunnel belongs to a connection that is gone.
async fn send_messages(functions: &Functions) {
    // An old agent, then one that knows of being replaced, then one that replaces it, then one that is gone.
    for (id, ready) in [
        (ID, "ready"),
        ("second=", READY_TO_BE_REPLACED),
        ("third=", "ready"),
        ("gone", "ready"),
        ("reply=", "ready"),
    ] {
        functions.ready(id, ready).await;
    }
    let response = include_str!("../../../../events/http-response.json");
    functions.message(response, &[]).await;
    let ping = include_str!("../../../../events/ping.json");
    functions.message(ping, &[(ID, "third=")]).await;
    assert_eq!(functions.ready("releases=", "release").await, 200);
    // The tunnel is nobody's now; the next steps need it again.
    assert_eq!(functions.connect(&[(ID, "gone")]).await, 200);
    functions.ready("gone", "ready").await;
}

/// Nobody answers a request, so `forward` looks into the mailbox, doubts, and finds the connection gone once it is.
async fn lose_an_agent(functions: &Functions) {
    functions.ready("third=", READY_TO_REPLY).await;
    let forward = &functions.forward;
    let answered = assert_answered(&forward.function, "the agent is lost, which is an answer");
    tokio::join!(answered, async {
        within("a look at the connection", async {
            let expected = [
                "dynamodb:GetItem ConnectionsTable",
                "dynamodb:PutItem ConnectionsTable ticket/*",
            ];
            let is_made = |call: &&str| made(&forward.surroundings.calls).contains(*call);
            while !expected.iter().all(is_made) {
                tokio::task::yield_now().await;
            }
        })
        .await;
        functions.disconnect("third=").await;
    });
}

/// An agent whose token is revoked is closed; a function that starts afresh has not seen the token when it was good.
async fn revoke_a_token(functions: &Functions, database: &Database) {
    assert_eq!(functions.connect(&[(ID, "third=")]).await, 200);
    functions.ready("third=", READY_TO_REPLY).await;
    database.tokens.revoke("sample").await.expect("revoked");
    let afresh = functions.forward.surroundings.load(Forward::load);
    assert_answered(&afresh, "the tunnel is offline, which is an answer").await;
}

/// An event of the visitors' WebSocket API.
fn of_visitor(event: &str, visitor: &str) -> serde_json::Value {
    let mut event: serde_json::Value = serde_json::from_str(event).expect("JSON");
    event["requestContext"]["stage"] = "visitors".into();
    event["requestContext"]["connectionId"] = visitor.into();
    event
}

fn typed(event: serde_json::Value) -> ApiGatewayWebsocketProxyRequest {
    serde_json::from_value(event).expect("an event")
}

/// Opens a visitor's WebSocket, whose other end is the connection `third=`, and returns the request that opened it.
async fn open_visitor_socket(functions: &Functions, visitor: &str) -> String {
    let mut handshake = of_visitor(include_str!("../../../../events/connect.json"), visitor);
    for (name, value) in [
        ("X-Tunnel-Edge", EDGE_SECRET),
        ("X-Tunnel-Host", "tunnel.example.com"),
        ("X-Tunnel-Address", "203.0.113.9"),
        ("X-Tunnel-Target", "/sample/chat"),
    ] {
        handshake["multiValueHeaders"][name] = serde_json::json!([value]);
    }
    let event: LambdaRequest = serde_json::from_value(handshake).expect("an event");
    let forward = &functions.forward;
    let accepting = forward.function.handle(event, LAMBDA_TIMEOUT);
    let (accepted, request) = tokio::join!(accepting, async {
        let request = within("the handshake at the agent", async {
            loop {
                let texts = forward
                    .surroundings
                    .texts
                    .lock()
                    .expect("not poisoned")
                    .clone();
                let asked = texts.iter().rev().find(|text| text.contains(visitor));
                match asked.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok()) {
                    Some(request) => {
                        return request["request_id"].as_str().expect("an id").to_owned();
                    }
                    None => tokio::task::yield_now().await,
                }
            }
        })
        .await;
        let response = include_str!("../../../../events/http-response.json");
        let mut response: serde_json::Value = serde_json::from_str(response).expect("JSON");
        response["requestContext"]["connectionId"] = "third=".into();
        response["body"] = serde_json::json!({ "type": "http_response", "request_id": request, "status_code": 101, "headers": {} }).to_string().into();
        let answer = functions.default.function.handle(typed(response)).await;
        assert_eq!(answer.expect("handled").status_code, 200);
        request
    });
    let Ok(FunctionResponse::BufferedResponse(answer)) = accepted else {
        panic!("not a whole answer")
    };
    let answer = serde_json::to_value(&answer).expect("JSON");
    assert_eq!(answer["statusCode"], 200, "{answer}");
    request
}

/// Opens, uses and closes visitors' WebSockets.
async fn use_visitor_sockets(functions: &Functions) {
    assert_eq!(functions.connect(&[(ID, "third=")]).await, 200);
    assert_eq!(functions.ready("third=", READY_FOR_SOCKETS).await, 200);
    for visitor in ["visitor1=", "visitor2="] {
        let request = open_visitor_socket(functions, visitor).await;
        let said = of_visitor(include_str!("../../../../events/ping.json"), visitor);
        let answer = functions.default.function.handle(typed(said)).await;
        assert_eq!(answer.expect("handled").status_code, 200);
        for message in [
            serde_json::json!({ "type": "websocket_batch", "request_id": request, "websocket": visitor, "batch": 0, "texts": ["hello"] }),
            serde_json::json!({ "type": "websocket_close", "request_id": request, "websocket": visitor }),
        ] {
            let event = include_str!("../../../../events/ping.json");
            let mut event: serde_json::Value = serde_json::from_str(event).expect("JSON");
            event["requestContext"]["connectionId"] = "third=".into();
            event["body"] = message.to_string().into();
            let answer = functions.default.function.handle(typed(event)).await;
            assert_eq!(answer.expect("handled").status_code, 200);
        }
    }
    let left = of_visitor(
        include_str!("../../../../events/disconnect.json"),
        "visitor1=",
    );
    let answer = functions.disconnect.function.handle(typed(left)).await;
    assert_eq!(answer.expect("handled").status_code, 200);
    // The second is open when its agent leaves.
    functions.disconnect("third=").await;
}

/// A tunnel that wants a password, and visitors who have a cookie that is none, or a password that is wrong.
async fn ask_for_a_password(functions: &Functions) {
    assert_eq!(functions.connect(&[(ID, "third=")]).await, 200);
    assert_eq!(functions.ready("third=", READY_WITH_A_PASSWORD).await, 200);
    let forward = functions.forward.surroundings.load(Forward::load);
    for (field, value) in [
        ("cookies", serde_json::json!(["ttf_login=AAAA"])),
        ("authorization", serde_json::json!("Basic d3Jvbmc=")),
    ] {
        let event = include_str!("../../../../events/http-v2.json");
        let mut event: serde_json::Value = serde_json::from_str(event).expect("JSON");
        if field == "cookies" {
            event[field] = value;
        } else {
            event["headers"][field] = value;
        }
        let event: LambdaRequest = serde_json::from_value(event).expect("an event");
        let answer = forward.handle(event, LAMBDA_TIMEOUT).await;
        let Ok(FunctionResponse::BufferedResponse(answer)) = answer else {
            panic!("not a whole answer")
        };
        let answer = serde_json::to_value(&answer).expect("JSON");
        assert_eq!(answer["statusCode"], 401, "{answer}");
    }
}

#[tokio::test]
async fn each_functions_policy_allows_exactly_the_calls_it_makes() {
    let database = Database::start().await;
    let functions = Functions::load(&database).await;
    open_connections(&functions, &database).await;
    send_messages(&functions).await;
    let why = "the tunnel's agent is gone, which is an answer";
    assert_answered(&functions.forward.function, why).await;
    lose_an_agent(&functions).await;
    use_visitor_sockets(&functions).await;
    ask_for_a_password(&functions).await;
    revoke_a_token(&functions, &database).await;

    let template = template();
    for (function, calls) in FUNCTIONS.into_iter().zip(functions.calls()) {
        let allowed = allowed(&template, function);
        // What is allowed for all items is allowed for those of one kind.
        let of_all_items = |call: &String| {
            let (call, kind) = call.rsplit_once(' ').unwrap_or_default();
            kind.ends_with("/*") && allowed.contains(call)
        };
        let mut made = made(calls).clone();
        made.retain(|call| !of_all_items(call));
        assert_eq!(made, allowed, "{function}: made, allowed");
    }
}

#[test]
fn only_the_fronts_may_invoke_forward() {
    let template = template();
    let permissions = resources_of(&template, "AWS::Lambda::Permission");
    assert_eq!(
        permissions,
        [
            "HttpPermission",
            "StreamingUrlPermission",
            "StreamingInvokePermission"
        ]
    );
    assert_written(
        &template,
        "HttpPermission",
        &[
            ("Action", "lambda:InvokeFunction"),
            ("FunctionName", "!Ref ForwardFunction"),
            ("Principal", "apigateway.amazonaws.com"),
            (
                "SourceArn",
                "!Sub arn:${AWS::Partition}:execute-api:${AWS::Region}:${AWS::AccountId}:${HttpApi}/$default/$default",
            ),
        ],
    );
    // A public function URL needs both since October 2025.
    assert_written(
        &template,
        "StreamingUrlPermission",
        &[
            ("Action", "lambda:InvokeFunctionUrl"),
            ("FunctionName", "!Ref ForwardFunction"),
            ("Principal", "*"),
            ("FunctionUrlAuthType", "NONE"),
        ],
    );
    assert_written(
        &template,
        "StreamingInvokePermission",
        &[
            ("Action", "lambda:InvokeFunction"),
            ("FunctionName", "!Ref ForwardFunction"),
            ("Principal", "*"),
            ("InvokedViaFunctionUrl", "true"),
        ],
    );
}
