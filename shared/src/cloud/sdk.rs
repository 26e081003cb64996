//! The AWS SDK's configuration: which HTTP client, which time limits.

use std::time::Duration;

use aws_config::{BehaviorVersion, Region, SdkConfig, timeout::TimeoutConfig};
use aws_sdk_dynamodb::config::{Credentials, SharedCredentialsProvider};
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, rustls_provider::CryptoMode},
};

/// Longest one try of an AWS call may take. Both services answer within tens of milliseconds or not at all.
const ATTEMPT: Duration = Duration::from_secs(5);

fn time_limits() -> TimeoutConfig {
    TimeoutConfig::builder().operation_attempt_timeout(ATTEMPT).build()
}

/// The configuration from a function's environment.
pub async fn from_environment() -> SdkConfig {
    let https = Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https();
    aws_config::defaults(BehaviorVersion::latest()).http_client(https).timeout_config(time_limits()).load().await
}

/// The configuration for stand-ins on this machine: DynamoDB at `dynamodb`, requests signed with a key that only they know.
pub fn for_loopback(dynamodb: &str, access_key: &str) -> SdkConfig {
    SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .region(Region::from_static("local"))
        .credentials_provider(SharedCredentialsProvider::new(Credentials::new(access_key, access_key, None, None, "loopback")))
        .http_client(Builder::new().build_http())
        .timeout_config(time_limits())
        .endpoint_url(dynamodb)
        .build()
}
