//! template.yaml and the code agree, and each resource is what it is meant to be. Here is how the tests read the template.

mod apis;
mod domains;
mod edge;
mod functions;
mod monitoring;
mod parameters;
mod permissions;
mod surroundings;
mod tables;
mod variables;

use serde_yaml_ng::Value;

const FUNCTIONS: [&str; 4] = [
    "ConnectFunction",
    "DisconnectFunction",
    "DefaultFunction",
    "ForwardFunction",
];

fn template() -> Value {
    serde_yaml_ng::from_str(include_str!("../../../template.yaml")).expect("YAML")
}

fn properties(template: &Value, resource: &str) -> Value {
    template["Resources"][resource]["Properties"].clone()
}

/// A value as it stands in the template: `!Ref X`, `!GetAtt X.Arn`, `!Sub text`, and lists and maps in brackets.
fn written(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::Bool(flag) => flag.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
        Value::Sequence(values) => {
            let values: Vec<String> = values.iter().map(written).collect();
            format!("[{}]", values.join(", "))
        }
        Value::Mapping(entries) => {
            let entries = entries
                .iter()
                .map(|(name, value)| format!("{}: {}", written(name), written(value)));
            format!("{{{}}}", entries.collect::<Vec<_>>().join(", "))
        }
        Value::Tagged(tagged) => format!("{} {}", tagged.tag, written(&tagged.value)),
    }
}

/// The logical ids of all resources of a type, in the template's order.
fn resources_of(template: &Value, kind: &str) -> Vec<String> {
    template["Resources"]
        .as_mapping()
        .expect("resources")
        .iter()
        .filter(|(_, resource)| resource["Type"] == kind)
        .map(|(id, _)| id.as_str().expect("a logical id").to_owned())
        .collect()
}

/// Asserts that properties of a resource are what is written here.
fn assert_written(template: &Value, resource: &str, expected: &[(&str, &str)]) {
    let properties = properties(template, resource);
    for (path, expected) in expected {
        let value = path
            .split('/')
            .fold(properties.clone(), |value, name| value[name].clone());
        assert_eq!(written(&value), *expected, "{resource} {path}");
    }
}
