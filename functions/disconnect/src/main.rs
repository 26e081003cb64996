//! The executable of the `$disconnect` route: starts the Lambda runtime around [`tunnel_disconnect`].

// The futures of the SDK's calls are nested deeply.
#![recursion_limit = "256"]

use tunnel_disconnect::Disconnect;
use tunnel_service::aws::lambda;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda::Error> {
    let function = lambda::start(Disconnect::load)?;
    lambda::serve(async |event| function.handle(event).await).await
}
