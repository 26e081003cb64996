//! Between the AWS SDK and what stands in for AWS: calls are late, and answers are lost.

use std::{
    pin::pin,
    task::{Context, Poll, Waker},
    time::Duration,
};

use aws_smithy_runtime_api::{
    client::{
        http::{
            HttpClient, HttpConnector, HttpConnectorFuture, HttpConnectorSettings,
            SharedHttpConnector,
        },
        orchestrator::{HttpRequest, HttpResponse},
        result::ConnectorError,
        runtime_components::RuntimeComponents,
    },
    http::StatusCode,
};
use aws_smithy_types::body::SdkBody;
use axum::{Router, body::Body};
use http::{Request, Response};
use tokio::{sync::oneshot, task::coop::unconstrained, time::sleep};
use tokio_util::task::TaskTracker;
use tower::ServiceExt;

use crate::weather::Weather;

/// The HTTP client of the SDK.
#[derive(Clone, Debug)]
pub(crate) struct Wire {
    pub(crate) weather: Weather,
    pub(crate) dynamodb: Router,
    pub(crate) management: Router,
    /// What goes on although its caller has given it up.
    pub(crate) tasks: TaskTracker,
}

impl HttpClient for Wire {
    fn http_connector(
        &self,
        _: &HttpConnectorSettings,
        _: &RuntimeComponents,
    ) -> SharedHttpConnector {
        SharedHttpConnector::new(self.clone())
    }
}

impl HttpConnector for Wire {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let wire = self.clone();
        HttpConnectorFuture::new(async move { wire.pass_on(request).await })
    }
}

impl Wire {
    async fn pass_on(self, request: HttpRequest) -> Result<HttpResponse, ConnectorError> {
        let weather = self.weather.clone();
        let is_dynamodb = request.headers().get("x-amz-target").is_some();
        // Only what asks DynamoDB is refused out of nowhere; a wrong 410 is @connections' own fault.
        if weather.strikes() && weather.one_in(3) {
            return Ok(refusal(if is_dynamodb { 500 } else { 410 }));
        }
        let router = if is_dynamodb {
            self.dynamodb
        } else {
            self.management
        };
        let request = request
            .try_into_http1x()
            .map_err(|error| ConnectorError::other(error.into(), None))?;
        let body = request.body().bytes().unwrap_or_default().to_vec();
        let request = request.map(|_| Body::from(body));
        let delay = weather.delay();
        let (answered, answer) = oneshot::channel();
        // A call that has left is carried out, whatever becomes of its caller.
        self.tasks.spawn(async move {
            sleep(delay).await;
            // The caller may be gone.
            let _ = answered.send(carry_out(router, request));
        });
        let answer = answer
            .await
            .map_err(|error| ConnectorError::other(error.into(), None))?;
        if weather.strikes() {
            std::future::pending::<()>().await;
        }
        sleep(weather.time(Duration::from_millis(20))).await;
        Ok(answer)
    }
}

/// Carries a call out while everything else stands still: what is done at once by threads is done in any order.
fn carry_out(router: Router, request: Request<Body>) -> HttpResponse {
    let response: Response<Body> = match at_once(router.oneshot(request)) {
        Ok(response) => response,
        Err(never) => match never {},
    };
    let (head, body) = response.into_parts();
    let body = at_once(axum::body::to_bytes(body, usize::MAX)).expect("a body that is in memory");
    let status = StatusCode::try_from(head.status.as_u16()).expect("a status");
    let mut answer = HttpResponse::new(status, SdkBody::from(body));
    for (name, value) in &head.headers {
        let value = value.to_str().expect("a field of text").to_owned();
        answer.headers_mut().insert(name.as_str().to_owned(), value);
    }
    answer
}

fn at_once<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(unconstrained(future));
    loop {
        if let Poll::Ready(done) = future
            .as_mut()
            .poll(&mut Context::from_waker(Waker::noop()))
        {
            return done;
        }
        std::thread::yield_now();
    }
}

fn refusal(status: u16) -> HttpResponse {
    HttpResponse::new(
        StatusCode::try_from(status).expect("a status"),
        SdkBody::from("{}"),
    )
}
