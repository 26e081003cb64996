//! The AWS SDK's configuration: who asks, with which HTTP client, within which time.
//!
//! Lambda gives a function its region and credentials in the environment. Reading them there, and not through the SDK's chain of
//! providers, keeps the chain's own clients out of the functions and its files out of their start.

use std::{fmt, str::FromStr, time::Duration};

use aws_sdk_dynamodb::config::{
    BehaviorVersion, Credentials, Region, SharedCredentialsProvider, timeout::TimeoutConfig,
};
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, rustls_provider::CryptoMode},
};
pub use aws_types::SdkConfig;

use crate::settings::{SettingsError, Variables};

/// Longest one try of an AWS call may take. Both services answer within tens of milliseconds or not at all.
const ATTEMPT: Duration = Duration::from_secs(5);

/// A value that is never shown.
struct Secret(String);

impl FromStr for Secret {
    type Err = fmt::Error;

    fn from_str(text: &str) -> Result<Self, fmt::Error> {
        Ok(Self(text.to_owned()))
    }
}

fn common() -> aws_types::sdk_config::Builder {
    SdkConfig::builder()
        .behavior_version(BehaviorVersion::latest())
        .timeout_config(
            TimeoutConfig::builder()
                .operation_attempt_timeout(ATTEMPT)
                .build(),
        )
}

/// The configuration from `AWS_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and, where they are set,
/// `AWS_SESSION_TOKEN` and `AWS_ENDPOINT_URL_DYNAMODB`.
///
/// # Errors
/// All of them that are missing.
pub fn from_environment(variables: Variables<'_>) -> Result<SdkConfig, SettingsError> {
    let region = variables.required::<String>("AWS_REGION");
    let key = variables.required::<String>("AWS_ACCESS_KEY_ID");
    let secret = variables.required::<Secret>("AWS_SECRET_ACCESS_KEY");
    let session = variables.raw("AWS_SESSION_TOKEN");
    let dynamodb = variables
        .raw("AWS_ENDPOINT_URL_DYNAMODB")
        .filter(|url| !url.is_empty());
    variables.finish(|| {
        let credentials = Credentials::new(key?, secret?.0, session, None, "environment");
        let https = Builder::new()
            .tls_provider(Provider::Rustls(CryptoMode::Ring))
            .build_https();
        let config = common()
            .region(Region::new(region?))
            .credentials_provider(SharedCredentialsProvider::new(credentials))
            .http_client(https);
        Some(
            dynamodb
                .into_iter()
                .fold(config, aws_types::sdk_config::Builder::endpoint_url)
                .build(),
        )
    })
}

/// The configuration for stand-ins on this machine: DynamoDB at `dynamodb`, requests signed with a key that only they know.
pub fn for_loopback(dynamodb: &str, access_key: &str) -> SdkConfig {
    common()
        .region(Region::from_static("local"))
        .credentials_provider(SharedCredentialsProvider::new(Credentials::new(
            access_key, access_key, None, None, "loopback",
        )))
        .http_client(Builder::new().build_http())
        .endpoint_url(dynamodb)
        .build()
}
