//! A function's life in Lambda.

pub use lambda_runtime::Error;
use lambda_runtime::{LambdaEvent, service_fn};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    aws::sdk::{self, SdkConfig},
    settings::{SettingsError, Variables},
    telemetry,
};

/// Starts logging, and makes the function from the process's environment.
///
/// # Errors
/// All variables that are missing or faulty.
pub fn start<F>(
    load: impl FnOnce(Variables<'_>, &SdkConfig) -> Result<F, SettingsError>,
) -> Result<F, SettingsError> {
    telemetry::init();
    let sdk = sdk::from_environment(Variables::of_process())?;
    load(Variables::of_process(), &sdk)
}

/// Has `handle` answer events for as long as Lambda sends them.
///
/// # Errors
/// If Lambda's runtime API does not answer.
pub async fn serve<Event, Answer, Failure>(
    handle: impl AsyncFn(Event) -> Result<Answer, Failure>,
) -> Result<(), Error>
where
    Event: DeserializeOwned,
    Answer: Serialize,
    Error: From<Failure>,
{
    let handle = &handle;
    lambda_runtime::run(service_fn(async |event: LambdaEvent<Event>| {
        handle(event.payload).await.map_err(Error::from)
    }))
    .await
}
