//! The variables that each function gets.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
};

use tunnel_connect::Connect;
use tunnel_default::DefaultRoute;
use tunnel_disconnect::Disconnect;
use tunnel_forward::Forward;
use tunnel_service::{
    aws::sdk,
    aws::sdk::SdkConfig,
    settings::{SettingsError, Variables},
};

use super::{FUNCTIONS, assert_written, properties, template, written};

/// The variables that a function reads, found by loading it.
fn asked_for<T>(
    load: impl Fn(Variables<'_>, &SdkConfig) -> Result<T, SettingsError>,
) -> BTreeSet<String> {
    let asked = RefCell::new(BTreeSet::new());
    let read = |name: &str| {
        asked.borrow_mut().insert(name.to_owned());
        None
    };
    let loaded = load(
        Variables::new(read),
        &sdk::for_loopback("http://127.0.0.1:9", "nobody"),
    );
    assert!(loaded.is_err(), "a function does without any settings");
    asked.into_inner()
}

#[test]
fn each_function_gets_exactly_the_variables_it_reads() {
    let template = template();
    let asked = [
        asked_for(Connect::load),
        asked_for(Disconnect::load),
        asked_for(DefaultRoute::load),
        asked_for(Forward::load),
    ];
    for (function, mut asked) in FUNCTIONS.into_iter().zip(asked) {
        // Set by Lambda, read by the SDK, and read when logging starts.
        asked.remove("AWS_LAMBDA_FUNCTION_NAME");
        // For emulators, whose @connections may be at another address.
        asked.remove("AWS_ENDPOINT_URL_APIGATEWAYMANAGEMENTAPI");
        asked.insert("AWS_ENDPOINT_URL_DYNAMODB".to_owned());
        asked.insert("LOG_LEVEL".to_owned());
        let mut given: BTreeSet<String> = BTreeSet::new();
        for variables in [
            &template["Globals"]["Function"]["Environment"]["Variables"],
            &properties(&template, function)["Environment"]["Variables"],
        ] {
            let names = variables
                .as_mapping()
                .into_iter()
                .flatten()
                .filter_map(|(name, _)| name.as_str());
            given.extend(names.map(str::to_owned));
        }
        assert_eq!(given, asked, "{function}");
    }
}

/// The variables of each function that say where something is, or who may do something.
#[test]
fn each_function_gets_its_own_tables_addresses_and_rules() {
    let template = template();
    let tables = [
        ("TUNNELS_TABLE", "!Ref TunnelsTable"),
        ("CONNECTIONS_TABLE", "!Ref ConnectionsTable"),
        ("PENDING_REQUESTS_TABLE", "!Ref PendingRequestsTable"),
        ("TOKENS_TABLE", "!Ref TokensTable"),
    ];
    let others = [
        ("AUTH", "!Ref Auth"),
        ("JWT_ISSUER", "!Ref JwtIssuer"),
        ("JWT_AUDIENCE", "!Ref JwtAudience"),
        ("JWT_JWKS_URL", "!Ref JwtJwksUrl"),
        (
            "WEBSOCKET_API_ENDPOINT",
            "!Sub wss://${WebSocketApi}.execute-api.${AWS::Region}.${AWS::URLSuffix}/v1",
        ),
        (
            "PUBLIC_URL",
            "!If [HasDomain, !Sub https://${DomainName}, !Sub https://${HttpApi}.execute-api.${AWS::Region}.${AWS::URLSuffix}]",
        ),
        ("STREAMING_URL", "!Ref KnownStreamingUrl"),
        ("PAD_EMPTY_STREAMS", "!Ref PadEmptyStreams"),
        (
            "VISITOR_SOCKETS_ENDPOINT",
            "!Sub wss://${VisitorSockets}.execute-api.${AWS::Region}.${AWS::URLSuffix}/visitors",
        ),
        ("ROUTING", "!Ref Routing"),
        ("MAX_TUNNEL_IDS_PER_OWNER", "!Ref MaxTunnelIdsPerOwner"),
        ("MAX_CONCURRENT_REQUESTS", "!Ref MaxConcurrentRequests"),
        ("MAX_REQUESTS_PER_SECOND", "!Ref MaxRequestsPerSecond"),
        ("LOG_LEVEL", "!Ref LogLevel"),
        // Named for sam local, which passes on only what the template names; it has no value once deployed.
        ("AWS_ENDPOINT_URL_DYNAMODB", "!Ref AWS::NoValue"),
    ];
    let expected: BTreeMap<&str, &str> = tables.into_iter().chain(others).collect();
    for function in FUNCTIONS {
        let variables = properties(&template, function)["Environment"]["Variables"].clone();
        for (name, value) in variables.as_mapping().expect("variables") {
            let name = name.as_str().expect("a name");
            // Those are in the next test.
            if matches!(name, "EDGE_SECRETS" | "JWT_SECRET") {
                continue;
            }
            assert_eq!(
                Some(written(value).as_str()),
                expected.get(name).copied(),
                "{function} {name}"
            );
        }
    }
}

#[test]
fn secrets_and_log_levels_are_those_of_their_parameters() {
    let template = template();
    let versioned = |condition: &str, secret: &str, version: &str| {
        format!(
            "!If [{condition}, !Sub {{{{resolve:secretsmanager:${{{secret}}}:SecretString:::${{{version}}}}}}}, \
             !Sub {{{{resolve:secretsmanager:${{{secret}}}}}}}]"
        )
    };
    let jwt = versioned("HasJwtSecretVersion", "JwtSecretName", "JwtSecretVersion");
    let jwt = format!("!If [HasJwtSecret, {jwt}, ]");
    let edge = versioned("HasEdgeSecretVersion", "EdgeSecret", "EdgeSecretVersion");
    // While the secret changes, CloudFront may send either.
    let previous = "!If [HasPreviousEdgeSecretVersion, !Sub {{resolve:secretsmanager:${EdgeSecret}:SecretString:::${PreviousEdgeSecretVersion}}}, ]";
    let edge = format!("!If [HasEdge, !Join [ , [{edge}, {previous}]], ]");
    for (function, variable, expected) in [
        ("ConnectFunction", "JWT_SECRET", &jwt),
        ("ForwardFunction", "JWT_SECRET", &jwt),
        ("ForwardFunction", "EDGE_SECRETS", &edge),
    ] {
        let variable = format!("Environment/Variables/{variable}");
        assert_written(&template, function, &[(&variable, expected)]);
    }
    let logging = &template["Globals"]["Function"]["LoggingConfig"];
    // Lambda passes on everything: what is logged is for LOG_LEVEL to decide.
    assert_eq!(
        written(logging),
        "{LogFormat: JSON, ApplicationLogLevel: TRACE, SystemLogLevel: WARN}"
    );
}
