//! Parameters, the conditions that follow from them, and outputs.

use std::collections::BTreeSet;

use super::{properties, template, written};

#[test]
fn each_condition_is_what_its_name_says() {
    let is_given = |parameter: &str| format!("!Not [!Equals [!Ref {parameter}, ]]");
    let is_not_0 = |parameter: &str| format!("!Not [!Equals [!Ref {parameter}, 0]]");
    let both = |one: &str, other: &str| format!("!And [!Condition {one}, !Condition {other}]");
    let expected = [
        ("HasJwtSecret", is_given("JwtSecretName")),
        ("HasJwtSecretVersion", is_given("JwtSecretVersion")),
        ("HasDomain", is_given("DomainName")),
        ("HasHostedZone", is_given("HostedZoneId")),
        (
            "HasSubdomains",
            "!Equals [!Ref Routing, subdomain]".to_owned(),
        ),
        ("HasEdge", "!Equals [!Ref Edge, CloudFront]".to_owned()),
        ("HasEdgeRecord", both("HasEdge", "HasHostedZone")),
        (
            "HasEdgeWildcardRecord",
            both("HasEdgeRecord", "HasSubdomains"),
        ),
        ("HasEdgeSecretVersion", is_given("EdgeSecretVersion")),
        (
            "HasPreviousEdgeSecretVersion",
            is_given("PreviousEdgeSecretVersion"),
        ),
        (
            "HasApiDomain",
            "!And [!Condition HasDomain, !Not [!Condition HasEdge]]".to_owned(),
        ),
        ("HasDomainRecord", both("HasApiDomain", "HasHostedZone")),
        ("HasWildcard", both("HasApiDomain", "HasSubdomains")),
        ("HasWildcardRecord", both("HasWildcard", "HasDomainRecord")),
        ("LimitsVisitors", is_not_0("VisitorsRateLimit")),
        ("LimitsAgents", is_not_0("AgentsRateLimit")),
        ("ReservesForAgents", is_not_0("AgentsConcurrency")),
        ("CapsVisitors", is_not_0("VisitorsConcurrency")),
        ("KnowsQuota", is_not_0("AccountConcurrency")),
        (
            "LogsAccess",
            "!Equals [!Ref AccessLogs, Enabled]".to_owned(),
        ),
        ("HasAlarmTopic", is_given("AlarmTopicArn")),
    ];
    let template = template();
    let conditions = template["Conditions"].as_mapping().expect("conditions");
    let conditions: Vec<(String, String)> = conditions
        .iter()
        .map(|(name, condition)| (written(name), written(condition)))
        .collect();
    let expected = expected.map(|(name, condition)| (name.to_owned(), condition));
    assert_eq!(conditions, expected);
}

#[test]
fn the_outputs_are_the_addresses_that_the_functions_know() {
    let template = template();
    let output = |name: &str| written(&template["Outputs"][name]["Value"]);
    let variables = properties(&template, "DefaultFunction")["Environment"]["Variables"].clone();
    assert_eq!(
        output("AgentEndpoint"),
        written(&variables["WEBSOCKET_API_ENDPOINT"])
    );
    assert_eq!(output("PublicUrl"), written(&variables["PUBLIC_URL"]));
    for (name, value) in [
        ("StreamingUrl", "!GetAtt StreamingUrl.FunctionUrl"),
        ("DomainTarget", "!GetAtt Domain.RegionalDomainName"),
        ("WildcardTarget", "!GetAtt Wildcard.RegionalDomainName"),
        ("EdgeTarget", "!GetAtt Distribution.DomainName"),
        ("EdgeSecret", "!Ref EdgeSecret"),
    ] {
        assert_eq!(output(name), value, "{name}");
    }
}

#[test]
fn every_parameter_is_used_shown_and_described() {
    let text = include_str!("../../../../template.yaml");
    let template = template();
    let shown: BTreeSet<String> =
        template["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"]
            .as_sequence()
            .expect("groups")
            .iter()
            .flat_map(|group| group["Parameters"].as_sequence().expect("parameters"))
            .map(written)
            .collect();
    let parameters = template["Parameters"].as_mapping().expect("parameters");
    for (name, parameter) in parameters {
        let name = name.as_str().expect("a name");
        assert!(shown.contains(name), "{name} is in no group");
        assert!(!written(&parameter["Description"]).is_empty(), "{name}");
        let uses = [
            format!("!Ref {name}"),
            format!("${{{name}}}"),
            format!("!Ref {name}]"),
        ];
        assert!(
            uses.iter().any(|used| text.contains(used.as_str())),
            "{name} is used nowhere"
        );
    }
    assert_eq!(shown.len(), parameters.len());
}
