//! The executable of the `$connect` route: starts the Lambda runtime around [`tunnel_connect`].

// The futures of the SDK's calls are nested deeply.
#![recursion_limit = "256"]

use tunnel_connect::Connect;
use tunnel_service::aws::lambda;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda::Error> {
    let function = lambda::start(Connect::load)?;
    lambda::serve(async |event| function.handle(event).await).await
}
