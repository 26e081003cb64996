//! The tables: their keys, and what is kept.

use tunnel_local_aws::dynamodb;

use super::{assert_written, resources_of, template, written};

#[test]
fn the_template_describes_the_tables_that_the_functions_use() {
    let tables = dynamodb::tables().expect("a template");
    let keys: Vec<(&str, Vec<&str>)> = tables
        .iter()
        .map(|table| {
            (
                table.logical_id.as_str(),
                table.keys.iter().map(|(name, _)| name.as_str()).collect(),
            )
        })
        .collect();
    assert_eq!(
        keys,
        [
            (dynamodb::TUNNELS, vec!["tunnelId"]),
            (dynamodb::CONNECTIONS, vec!["connectionId"]),
            (dynamodb::PENDING_REQUESTS, vec!["requestKey", "part"]),
            (dynamodb::TOKENS, vec!["tokenHash"]),
        ]
    );
    assert!(
        tables
            .iter()
            .all(|table| table.ttl.as_deref() == Some("ttl")),
        "{tables:?}"
    );
}

#[test]
fn only_tables_that_cannot_be_rebuilt_are_backed_up_and_protected() {
    let template = template();
    for table in resources_of(&template, "AWS::DynamoDB::Table") {
        let is_kept = matches!(table.as_str(), dynamodb::TUNNELS | dynamodb::TOKENS);
        let kept = |text: &'static str| if is_kept { text } else { "" };
        assert_written(
            &template,
            &table,
            &[
                ("BillingMode", "PAY_PER_REQUEST"),
                ("TimeToLiveSpecification/Enabled", "true"),
                (
                    "PointInTimeRecoverySpecification/PointInTimeRecoveryEnabled",
                    kept("!Ref PointInTimeRecovery"),
                ),
                ("DeletionProtectionEnabled", kept("!Ref DeletionProtection")),
            ],
        );
        assert_eq!(
            written(&template["Resources"][table.as_str()]["UpdateReplacePolicy"]),
            if is_kept { "Retain" } else { "Delete" },
            "{table}: a table that an update replaces"
        );
    }
}

#[test]
fn an_owners_tunnel_ids_can_be_counted() {
    assert_written(
        &template(),
        dynamodb::TUNNELS,
        &[(
            "GlobalSecondaryIndexes",
            "[{IndexName: byOwner, KeySchema: [{AttributeName: owner, KeyType: HASH}], Projection: {ProjectionType: KEYS_ONLY}}]",
        )],
    );
}
