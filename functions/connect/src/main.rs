//! The executable of the `$connect` route: starts the Lambda runtime around [`tunnel_connect`].

// The futures of the SDK's calls are nested deeply.
#![recursion_limit = "256"]

use aws_lambda_events::apigw::ApiGatewayWebsocketProxyRequest;
use lambda_runtime::{Error, LambdaEvent, service_fn};
use tunnel_connect::Connect;
use tunnel_service::{aws::sdk, settings::Variables, telemetry};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    telemetry::init();
    let function = &Connect::load(
        Variables::of_process(),
        &sdk::from_environment(Variables::of_process())?,
    )?;
    lambda_runtime::run(service_fn(
        async |event: LambdaEvent<ApiGatewayWebsocketProxyRequest>| {
            function.handle(event.payload).await.map_err(Error::from)
        },
    ))
    .await
}
