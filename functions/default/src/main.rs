//! The executable of the `$default` route: starts the Lambda runtime around [`tunnel_default`].

// The futures of the SDK's calls are nested deeply.
#![recursion_limit = "256"]

use tunnel_default::DefaultRoute;
use tunnel_service::aws::lambda;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), lambda::Error> {
    let function = lambda::start(DefaultRoute::load)?;
    lambda::serve(async |event| function.handle(event).await).await
}
