//! template.yaml and the code agree.

use local::dynamodb;

#[test]
fn the_template_describes_the_tables_that_the_functions_use() {
    let tables = dynamodb::tables().expect("a template");
    let keys: Vec<(&str, Vec<&str>)> =
        tables.iter().map(|table| (table.logical_id.as_str(), table.keys.iter().map(|(name, _)| name.as_str()).collect())).collect();
    assert_eq!(
        keys,
        [
            ("TunnelsTable", vec!["tunnelId"]),
            ("ConnectionsTable", vec!["connectionId"]),
            ("PendingRequestsTable", vec!["requestKey", "part"]),
            ("TokensTable", vec!["tokenHash"]),
        ]
    );
    assert!(tables.iter().all(|table| table.ttl.as_deref() == Some("ttl")), "{tables:?}");
}
