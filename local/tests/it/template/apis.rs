//! The WebSocket APIs and the HTTP API: their routes, limits and access logs.

use tunnel_service::aws::route_event::VISITORS_STAGE;

use super::{assert_written, properties, resources_of, template, written};

#[test]
fn each_route_of_the_websocket_api_calls_its_function() {
    assert_written(
        &template(),
        "WebSocketApi",
        &[
            ("StageName", "v1"),
            // A constant: no message can choose another route.
            ("RouteSelectionExpression", r"\$default"),
            ("Routes/$connect/FunctionArn", "!GetAtt ConnectFunction.Arn"),
            (
                "Routes/$disconnect/FunctionArn",
                "!GetAtt DisconnectFunction.Arn",
            ),
            ("Routes/$default/FunctionArn", "!GetAtt DefaultFunction.Arn"),
        ],
    );
}

#[test]
fn the_http_api_sends_every_request_to_forward_in_payload_format_2() {
    let template = template();
    assert_written(
        &template,
        "HttpIntegration",
        &[
            ("ApiId", "!Ref HttpApi"),
            ("IntegrationType", "AWS_PROXY"),
            ("IntegrationUri", "!GetAtt ForwardFunction.Arn"),
            ("PayloadFormatVersion", "2.0"),
            ("TimeoutInMillis", "30000"),
        ],
    );
    assert_written(
        &template,
        "HttpRoute",
        &[
            ("ApiId", "!Ref HttpApi"),
            ("RouteKey", "$default"),
            ("Target", "!Sub integrations/${HttpIntegration}"),
        ],
    );
    assert_written(
        &template,
        "HttpStage",
        &[
            ("ApiId", "!Ref HttpApi"),
            ("StageName", "$default"),
            ("AutoDeploy", "true"),
        ],
    );
    // With it, API Gateway would answer OPTIONS in the local service's stead.
    assert_written(&template, "HttpApi", &[("CorsConfiguration", "")]);
}

/// The WebSocket APIs, each with its functions.
#[test]
fn visitors_have_a_websocket_api_of_their_own() {
    let template = template();
    assert_eq!(
        resources_of(&template, "AWS::Serverless::WebSocketApi"),
        ["WebSocketApi", "VisitorSockets"]
    );
    let visitors = properties(&template, "VisitorSockets");
    assert_eq!(written(&visitors["StageName"]), VISITORS_STAGE);
    // A constant: no message can choose another route.
    assert_eq!(written(&visitors["RouteSelectionExpression"]), r"\$default");
    for (route, function) in [
        ("$connect", "ForwardFunction"),
        ("$disconnect", "DisconnectFunction"),
        ("$default", "DefaultFunction"),
    ] {
        assert_eq!(
            written(&visitors["Routes"][route]["FunctionArn"]),
            format!("!GetAtt {function}.Arn"),
            "{route}"
        );
    }
}

#[test]
fn limits_of_agents_and_of_visitors_apply_to_their_own_apis() {
    let template = template();
    for (resource, condition, parameters) in [
        ("WebSocketApi", "LimitsAgents", "Agents"),
        ("HttpStage", "LimitsVisitors", "Visitors"),
        ("VisitorSockets", "LimitsVisitors", "Visitors"),
    ] {
        let expected = format!(
            "!If [{condition}, {{ThrottlingRateLimit: !Ref {parameters}RateLimit, \
             ThrottlingBurstLimit: !Ref {parameters}BurstLimit}}, !Ref AWS::NoValue]"
        );
        assert_written(&template, resource, &[("DefaultRouteSettings", &expected)]);
    }
}

#[test]
fn access_logs_hold_no_address_of_a_visitor_or_of_a_page() {
    let settings = written(&properties(&template(), "HttpStage")["AccessLogSettings"]);
    assert!(settings.contains("$context.requestId"), "{settings}");
    for secret in [
        "path",
        "Path",
        "query",
        "sourceIp",
        "routeKey",
        "authorizer",
    ] {
        assert!(!settings.contains(secret), "{settings}");
    }
}
