//! The executable behind the visitor fronts: starts the Lambda runtime around [`tunnel_forward`].

use std::time::SystemTime;

use lambda_http::request::LambdaRequest;
use lambda_runtime::{Error, LambdaEvent, service_fn};
use tunnel_forward::Forward;
use tunnel_service::{aws::sdk, settings::Variables, telemetry};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    telemetry::init();
    let function = &Forward::load(
        Variables::of_process(),
        &sdk::from_environment(Variables::of_process())?,
        None,
    )?;
    lambda_runtime::run(service_fn(async |event: LambdaEvent<LambdaRequest>| {
        let time = event
            .context
            .deadline()
            .duration_since(SystemTime::now())
            .unwrap_or_default();
        function
            .handle(event.payload, time)
            .await
            .map_err(Error::from)
    }))
    .await
}
