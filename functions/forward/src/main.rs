//! The executable behind the visitor fronts: starts the Lambda runtime around [`tunnel_forward`].

use std::time::{Duration, SystemTime};

use lambda_http::request::LambdaRequest;
use lambda_runtime::{Error, LambdaEvent, service_fn};
use tunnel_forward::Forward;
use tunnel_service::aws::lambda;

/// How long the bytes of an answer that broke off may take to leave the process.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Error> {
    let function = &lambda::start(Forward::load)?;
    let serving = Box::pin(lambda_runtime::run(service_fn(
        async |event: LambdaEvent<LambdaRequest>| {
            let time = event
                .context
                .deadline()
                .duration_since(SystemTime::now())
                .unwrap_or_default();
            function
                .handle(event.payload, time)
                .await
                .map_err(Error::from)
        },
    )));
    let broken_off = async {
        function.broken_off().await;
        // What came before the break still reaches the visitor.
        tokio::time::sleep(FLUSH_TIMEOUT).await;
    };
    tokio::select! {
        ended = serving => ended,
        () = broken_off => {
            Err("a streamed answer broke off: the process ends so that it does not look complete".into())
        }
    }
}
