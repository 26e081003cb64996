//! Alarms and the dashboard.

use super::{FUNCTIONS, assert_written, properties, resources_of, template, written};

#[test]
fn each_functions_errors_raise_its_own_alarm() {
    let template = template();
    for function in FUNCTIONS {
        assert_written(
            &template,
            &function.replace("Function", "Alarm"),
            &[
                ("Namespace", "AWS/Lambda"),
                ("MetricName", "Errors"),
                (
                    "Dimensions",
                    format!("[{{Name: FunctionName, Value: !Ref {function}}}]").as_str(),
                ),
                ("ComparisonOperator", "GreaterThanThreshold"),
                ("Threshold", "0"),
            ],
        );
    }
    assert_written(
        &template,
        "GatewayAlarm",
        &[(
            "Dimensions",
            "[{Name: ApiId, Value: !Ref WebSocketApi}, {Name: Stage, Value: v1}]",
        )],
    );
    for alarm in resources_of(&template, "AWS::CloudWatch::Alarm") {
        assert_written(
            &template,
            &alarm,
            &[(
                "AlarmActions",
                "!If [HasAlarmTopic, [!Ref AlarmTopicArn], !Ref AWS::NoValue]",
            )],
        );
    }
}

#[test]
fn the_dashboard_is_json_that_shows_every_function() {
    let template = template();
    let body = written(&properties(&template, "Dashboard")["DashboardBody"]);
    let body = body.strip_prefix("!Sub ").expect("a substitution");
    let dashboard: serde_json::Value = serde_json::from_str(body).expect("JSON");
    let widgets = dashboard["widgets"].as_array().expect("widgets");
    let of_title = |title: &str| {
        let widget = widgets
            .iter()
            .find(|widget| widget["properties"]["title"] == title);
        widget.unwrap_or_else(|| panic!("{title}")).to_string()
    };
    for title in [
        "Invocations",
        "Errors",
        "Function duration p99 (ms)",
        "Cost: Lambda GB-seconds",
    ] {
        let widget = of_title(title);
        for function in FUNCTIONS {
            assert!(
                widget.contains(&format!("${{{function}}}")),
                "{title}: {function}"
            );
        }
    }
    assert!(of_title("Errors").contains("\"4xx\""));
    // A sum of metrics has no point where one of them has none.
    assert_eq!(
        of_title("Cost: Lambda GB-seconds").matches("FILL(").count(),
        4
    );
}
