//! How the functions are built, how long they may run, and how many at once.

use super::{FUNCTIONS, assert_written, properties, resources_of, template, written};

#[test]
fn the_function_url_streams_for_as_long_as_its_parameter_says() {
    let template = template();
    assert_eq!(
        resources_of(&template, "AWS::Lambda::Url"),
        ["StreamingUrl"]
    );
    assert_written(
        &template,
        "StreamingUrl",
        &[
            ("InvokeMode", "RESPONSE_STREAM"),
            ("AuthType", "NONE"),
            ("TargetFunctionArn", "!Ref ForwardFunction"),
        ],
    );
    assert_written(
        &template,
        "ForwardFunction",
        &[("Timeout", "!Ref StreamTimeout")],
    );
    let timeout = &template["Parameters"]["StreamTimeout"];
    assert_eq!(
        (
            written(&timeout["Default"]),
            written(&timeout["MinValue"]),
            written(&timeout["MaxValue"])
        ),
        ("900".to_owned(), "30".to_owned(), "900".to_owned())
    );
}

#[test]
fn the_other_functions_time_out_when_a_websocket_api_does() {
    let template = template();
    assert_eq!(
        written(&template["Globals"]["Function"]["Timeout"]),
        "29",
        "seconds"
    );
    for function in ["ConnectFunction", "DisconnectFunction", "DefaultFunction"] {
        assert_written(&template, function, &[("Timeout", "")]);
    }
}

#[test]
fn each_function_is_built_from_its_own_crate_and_logs_to_its_own_group() {
    let template = template();
    for (function, name) in
        FUNCTIONS
            .into_iter()
            .zip(["connect", "disconnect", "default", "forward"])
    {
        let metadata = &template["Resources"][function]["Metadata"];
        assert_eq!(written(&metadata["BuildMethod"]), "rust-cargolambda");
        assert_eq!(
            written(&metadata["BuildProperties"]["Binary"]),
            format!("tunnel-{name}")
        );
        let logs = function.replace("Function", "Logs");
        assert_written(
            &template,
            function,
            &[
                ("CodeUri", format!("functions/{name}").as_str()),
                ("LoggingConfig/LogGroup", format!("!Ref {logs}").as_str()),
            ],
        );
        assert_written(
            &template,
            &logs,
            &[
                (
                    "LogGroupName",
                    format!("!Sub /aws/lambda/${{AWS::StackName}}/{name}").as_str(),
                ),
                ("RetentionInDays", "!Ref LogRetentionDays"),
            ],
        );
    }
    let shared = &template["Globals"]["Function"];
    assert_eq!(
        (
            written(&shared["Runtime"]),
            written(&shared["Handler"]),
            written(&shared["Architectures"]),
            written(&shared["MemorySize"])
        ),
        (
            "provided.al2023".to_owned(),
            "bootstrap".to_owned(),
            "[!Ref Architecture]".to_owned(),
            "!Ref MemorySize".to_owned()
        )
    );
}

#[test]
fn what_reserves_executions_needs_the_quota_and_the_quota_has_an_alarm() {
    let template = template();
    for (function, condition, parameter) in [
        ("ConnectFunction", "ReservesForAgents", "AgentsConcurrency"),
        (
            "DisconnectFunction",
            "ReservesForAgents",
            "AgentsConcurrency",
        ),
        ("DefaultFunction", "ReservesForAgents", "AgentsConcurrency"),
        ("ForwardFunction", "CapsVisitors", "VisitorsConcurrency"),
    ] {
        assert_written(
            &template,
            function,
            &[(
                "ReservedConcurrentExecutions",
                format!("!If [{condition}, !Ref {parameter}, !Ref AWS::NoValue]").as_str(),
            )],
        );
        let rule = &template["Rules"][format!("{parameter}NeedsQuota").as_str()];
        assert_eq!(
            written(&rule["RuleCondition"]),
            format!("!Not [!Equals [!Ref {parameter}, 0]]")
        );
        assert_eq!(
            written(&rule["Assertions"][0]["Assert"]),
            "!Not [!Contains [[0, 10, 50, 100], !Ref AccountConcurrency]]"
        );
    }
    assert_eq!(
        written(&template["Resources"]["ConcurrencyAlarm"]["Condition"]),
        "KnowsQuota"
    );
    let alarm = properties(&template, "ConcurrencyAlarm");
    assert_eq!(
        written(&alarm["Metrics"][0]["Expression"]),
        "!Sub 100 * executions / ${AccountConcurrency}"
    );
    assert_eq!(written(&alarm["Threshold"]), "80");
}
