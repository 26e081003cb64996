//! The edge: a CloudFront distribution in front of both APIs.

use super::{properties, template, written};

#[test]
fn the_edge_proves_itself_to_both_origins_and_stores_nothing() {
    let template = template();
    let distribution = properties(&template, "Distribution")["DistributionConfig"].clone();
    let origins = distribution["Origins"].as_sequence().expect("origins");
    let proof = "[{HeaderName: x-tunnel-edge, HeaderValue: !If [HasEdgeSecretVersion, \
                 !Sub {{resolve:secretsmanager:${EdgeSecret}:SecretString:::${EdgeSecretVersion}}}, \
                 !Sub {{resolve:secretsmanager:${EdgeSecret}}}]}]";
    let expected = [
        (
            "requests",
            "!Select [2, !Split [/, !GetAtt StreamingUrl.FunctionUrl]]",
        ),
        (
            "sockets",
            "!Sub ${VisitorSockets}.execute-api.${AWS::Region}.${AWS::URLSuffix}",
        ),
    ];
    assert_eq!(origins.len(), expected.len());
    for (origin, (id, domain)) in origins.iter().zip(expected) {
        assert_eq!(written(&origin["Id"]), id);
        assert_eq!(written(&origin["DomainName"]), domain);
        assert_eq!(written(&origin["OriginCustomHeaders"]), proof, "{id}");
        // A request whose outcome is unknown is not for CloudFront to repeat.
        assert_eq!(written(&origin["ConnectionAttempts"]), "1", "{id}");
    }
    let behavior = &distribution["DefaultCacheBehavior"];
    for (property, expected) in [
        ("TargetOriginId", "requests"),
        (
            "AllowedMethods",
            "[GET, HEAD, OPTIONS, PUT, POST, PATCH, DELETE]",
        ),
        // CachingDisabled, AllViewerExceptHostHeader.
        ("CachePolicyId", "4135ea2d-6df8-44a3-9df3-4b5a84be39ad"),
        (
            "OriginRequestPolicyId",
            "b689b0a8-53d0-40ab-baf2-68738e2966ac",
        ),
        (
            "FunctionAssociations",
            "[{EventType: viewer-request, FunctionARN: !GetAtt EdgeFunction.FunctionARN}]",
        ),
    ] {
        assert_eq!(written(&behavior[property]), expected, "{property}");
    }
}

#[test]
fn the_edges_code_is_that_of_its_file() {
    let function = properties(&template(), "EdgeFunction");
    assert_eq!(
        written(&function["FunctionCode"]),
        include_str!("../../../../edge/viewer-request.js")
    );
}

#[test]
fn the_edge_is_reached_by_every_name_and_reaches_its_origins_over_tls() {
    let template = template();
    let distribution = properties(&template, "Distribution")["DistributionConfig"].clone();
    for (property, expected) in [
        (
            "Aliases",
            "!If [HasSubdomains, [!Ref DomainName, !Sub *.${DomainName}], [!Ref DomainName]]",
        ),
        (
            "ViewerCertificate",
            "{AcmCertificateArn: !Ref CertificateArn, SslSupportMethod: sni-only, MinimumProtocolVersion: TLSv1.2_2021}",
        ),
    ] {
        assert_eq!(written(&distribution[property]), expected, "{property}");
    }
    let behavior = &distribution["DefaultCacheBehavior"];
    assert_eq!(
        written(&behavior["ViewerProtocolPolicy"]),
        "redirect-to-https"
    );
    let tls = "OriginProtocolPolicy: https-only, OriginSSLProtocols: [TLSv1.2]";
    assert_eq!(
        written(&distribution["Origins"][0]["CustomOriginConfig"]),
        // As long as CloudFront waits without a raised quota: a local service may take its time.
        format!("{{{tls}, OriginReadTimeout: 120, OriginKeepaliveTimeout: 60}}")
    );
    assert_eq!(
        written(&distribution["Origins"][1]["CustomOriginConfig"]),
        format!("{{{tls}}}")
    );
}
