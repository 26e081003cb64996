//! What reads from the socket of a connection to the local service, and writes to it.
//!
//! Whoever waits for something that comes over a connection drives it, so that no other task has to be woken for that. While a
//! connection has more to do, a task drives it. Nobody drives one that waits for a request: what has happened to it in the meantime
//! is noticed with the next request.

use std::{
    fmt,
    future::poll_fn,
    mem,
    pin::{Pin, pin},
    task::{Context, Poll, Waker},
    time::Duration,
};

use tokio::{
    runtime::Handle,
    sync::oneshot,
    task::{JoinHandle, unconstrained},
    time::timeout,
};
use tokio_util::task::TaskTracker;

/// Completes once the connection has ended.
type Driving = Pin<Box<dyn Future<Output = ()> + Send>>;

/// How long it may take to close a connection.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Drives a connection. Dropped, it has a task drive the connection until it is closed.
pub(crate) struct Driver {
    state: State,
    tasks: TaskTracker,
}

enum State {
    /// Whoever waits for something on the connection drives it.
    Attached(Driving),
    /// A task drives it, and gives it back if it is told to stop.
    Detached {
        stop: oneshot::Sender<()>,
        task: JoinHandle<Option<Driving>>,
    },
    /// The connection has ended.
    Ended,
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").finish_non_exhaustive()
    }
}

impl Driver {
    /// Drives `connection`, in tasks of `tasks` where it needs one.
    pub(crate) fn new(
        connection: impl Future<Output = ()> + Send + 'static,
        tasks: TaskTracker,
    ) -> Self {
        Self {
            state: State::Attached(Box::pin(connection)),
            tasks,
        }
    }

    /// Drives the connection, and then polls what comes over it.
    pub(crate) fn poll_beside<T>(
        &mut self,
        cx: &mut Context<'_>,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<T> {
        self.drive(cx);
        if !matches!(self.state, State::Attached(_)) {
            return poll(cx);
        }
        // Only driving brings what is polled here, so nobody else has to wake this task. A task that has spent its budget would be
        // told to come again, and not be woken for it.
        let polled = pin!(unconstrained(poll_fn(poll)));
        polled.poll(&mut Context::from_waker(Waker::noop()))
    }

    /// Drives the connection as far as it can be, unless a task does.
    pub(crate) fn drive(&mut self, cx: &mut Context<'_>) {
        if let State::Attached(driving) = &mut self.state
            && driving.as_mut().poll(cx).is_ready()
        {
            self.state = State::Ended;
        }
    }

    /// Has a task drive the connection, so that it is read and written whatever else is waited for.
    pub(crate) fn detach(&mut self) {
        self.state = match self.take() {
            State::Attached(mut driving) => {
                let (stop, stopped) = oneshot::channel();
                let task = self.tasks.spawn(async move {
                    tokio::select! {
                        () = &mut driving => None,
                        Ok(()) = stopped => Some(driving),
                    }
                });
                State::Detached { stop, task }
            }
            other => other,
        };
    }

    /// Leaves the connection to whoever waits for something on it, again. If this is cancelled, the connection is lost.
    pub(crate) async fn attach(&mut self) {
        self.state = match self.take() {
            State::Detached { stop, task } => {
                // The task may have ended by itself.
                let _ = stop.send(());
                let driving = task.await.ok().flatten();
                driving.map_or(State::Ended, State::Attached)
            }
            other => other,
        };
    }

    /// Whether no task drives it.
    pub(crate) fn is_attached(&self) -> bool {
        !matches!(self.state, State::Detached { .. })
    }

    fn take(&mut self) -> State {
        mem::replace(&mut self.state, State::Ended)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // With TLS, the end of a connection has to be said. Where the agent ends, too, it is not.
        if let State::Attached(driving) = self.take()
            && Handle::try_current().is_ok()
            && !std::thread::panicking()
        {
            self.tasks.spawn(timeout(CLOSE_TIMEOUT, driving));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::{
        sync::mpsc,
        task::coop::{consume_budget, has_budget_remaining},
    };

    use super::*;
    use crate::scripted::within;

    #[tokio::test]
    async fn what_comes_is_seen_although_driving_has_spent_the_budget_of_the_task() {
        let (came, mut coming) = oneshot::channel();
        let connection = async move {
            while has_budget_remaining() {
                consume_budget().await;
            }
            let _ = came.send("it");
            pending::<()>().await;
        };
        let mut driver = Driver::new(connection, TaskTracker::new());
        let polled =
            poll_fn(|cx| Poll::Ready(driver.poll_beside(cx, |cx| Pin::new(&mut coming).poll(cx))));
        assert_eq!(polled.await, Poll::Ready(Ok("it")));
    }

    #[tokio::test]
    async fn a_connection_is_driven_by_a_task_while_it_is_detached_and_only_then() {
        let (say, mut said) = mpsc::unbounded_channel();
        let (answer, mut answers) = mpsc::unbounded_channel();
        let connection = async move {
            while let Some(number) = said.recv().await {
                let _ = answer.send(number);
            }
        };
        let mut driver = Driver::new(connection, TaskTracker::new());
        for number in 0..3 {
            driver.detach();
            driver.detach();
            say.send(number).expect("driven");
            assert_eq!(within("an answer", answers.recv()).await, Some(number));
            driver.attach().await;
            say.send(number + 10).expect("kept");
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            answers.try_recv().expect_err("nobody drives it");
            let next = poll_fn(|cx| driver.poll_beside(cx, |cx| answers.poll_recv(cx)));
            assert_eq!(within("an answer", next).await, Some(number + 10));
        }
        drop(say);
        driver.detach();
        driver.attach().await;
        let end = poll_fn(|cx| driver.poll_beside(cx, |cx| answers.poll_recv(cx)));
        assert_eq!(within("the end", end).await, None);
    }
}
