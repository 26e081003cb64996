//! Domains and their records.

use serde_yaml_ng::Value;

use super::{assert_written, properties, template, written};

#[test]
fn a_domain_leads_to_the_http_api() {
    let template = template();
    for (mapping, domain, record, name) in [
        ("DomainMapping", "Domain", "DomainRecord", "!Ref DomainName"),
        (
            "WildcardMapping",
            "Wildcard",
            "WildcardRecord",
            "!Sub *.${DomainName}",
        ),
    ] {
        assert_written(
            &template,
            mapping,
            &[
                ("ApiId", "!Ref HttpApi"),
                ("Stage", "!Ref HttpStage"),
                ("DomainName", format!("!Ref {domain}").as_str()),
            ],
        );
        assert_written(&template, domain, &[("DomainName", name)]);
        assert_written(
            &template,
            record,
            &[
                ("Name", name),
                ("Type", "A"),
                (
                    "AliasTarget/DNSName",
                    format!("!GetAtt {domain}.RegionalDomainName").as_str(),
                ),
            ],
        );
        let [mut ipv4, mut ipv6] = [record.to_owned(), format!("{record}Ipv6")]
            .map(|record| properties(&template, &record));
        assert_eq!(written(&ipv6["Type"]), "AAAA");
        for record in [&mut ipv4, &mut ipv6] {
            record["Type"] = Value::Null;
        }
        assert_eq!(written(&ipv4), written(&ipv6), "{record}");
    }
}

#[test]
fn the_domain_is_the_edges_where_there_is_one() {
    let template = template();
    for (resource, condition) in [
        ("Domain", "HasApiDomain"),
        ("DomainMapping", "HasApiDomain"),
        ("DomainRecord", "HasDomainRecord"),
        ("Wildcard", "HasWildcard"),
        ("Distribution", "HasEdge"),
        ("EdgeFunction", "HasEdge"),
        ("EdgeSecret", "HasEdge"),
        ("EdgeRecord", "HasEdgeRecord"),
        ("EdgeRecordIpv6", "HasEdgeRecord"),
        ("EdgeWildcardRecord", "HasEdgeWildcardRecord"),
        ("EdgeWildcardRecordIpv6", "HasEdgeWildcardRecord"),
    ] {
        assert_eq!(
            written(&template["Resources"][resource]["Condition"]),
            condition,
            "{resource}"
        );
    }
}

#[test]
fn each_record_leads_to_what_has_its_name() {
    let template = template();
    let api = |domain: &str| {
        format!(
            "{{DNSName: !GetAtt {domain}.RegionalDomainName, HostedZoneId: !GetAtt {domain}.RegionalHostedZoneId}}"
        )
    };
    let edge = "{DNSName: !GetAtt Distribution.DomainName, HostedZoneId: Z2FDTNDATAQYW2}";
    let wildcard = "!Sub *.${DomainName}";
    for (record, condition, name, target) in [
        (
            "DomainRecord",
            "HasDomainRecord",
            "!Ref DomainName",
            &*api("Domain"),
        ),
        (
            "WildcardRecord",
            "HasWildcardRecord",
            wildcard,
            &*api("Wildcard"),
        ),
        ("EdgeRecord", "HasEdgeRecord", "!Ref DomainName", edge),
        (
            "EdgeWildcardRecord",
            "HasEdgeWildcardRecord",
            wildcard,
            edge,
        ),
    ] {
        for (record, kind) in [(record.to_owned(), "A"), (format!("{record}Ipv6"), "AAAA")] {
            assert_eq!(
                written(&template["Resources"][record.as_str()]["Condition"]),
                condition,
                "{record}"
            );
            assert_written(
                &template,
                &record,
                &[
                    ("HostedZoneId", "!Ref HostedZoneId"),
                    ("Name", name),
                    ("Type", kind),
                    ("AliasTarget", target),
                ],
            );
        }
    }
    for domain in ["Domain", "Wildcard"] {
        assert_written(
            &template,
            domain,
            &[(
                "DomainNameConfigurations",
                "[{CertificateArn: !Ref CertificateArn, EndpointType: REGIONAL, IpAddressType: dualstack, SecurityPolicy: TLS_1_2}]",
            )],
        );
    }
}
