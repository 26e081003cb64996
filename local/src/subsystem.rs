//! Tasks that are stopped together.

use std::future::Future;

use tokio::time::{Instant, timeout_at};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;

/// Tasks that are stopped together. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Subsystem {
    tasks: TaskTracker,
    stop: CancellationToken,
    abort: CancellationToken,
}

impl Subsystem {
    /// Runs a task until it ends, or is aborted because it did not stop in time.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        // Each poll locks it, and tasks do not wait for each other's locks.
        let abort = self.abort.child_token();
        self.tasks.spawn(async move {
            abort.run_until_cancelled_owned(task).await;
        });
    }

    /// Cancelled when the tasks are to end.
    pub(crate) fn stopping(&self) -> &CancellationToken {
        &self.stop
    }

    /// The tracker, for those who spawn for themselves. Their tasks are waited for, but not aborted.
    pub(crate) fn tracker(&self) -> &TaskTracker {
        &self.tasks
    }

    /// Asks the tasks to end and waits for them. Those that have not ended at `deadline` are aborted.
    pub(crate) async fn stop(&self, name: &str, deadline: Instant) {
        self.stop.cancel();
        self.tasks.close();
        if timeout_at(deadline, self.tasks.wait()).await.is_err() {
            warn!(name, left = self.tasks.len(), "not stopped in time");
            self.abort.cancel();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_task_that_does_not_stop_is_aborted_at_the_deadline() {
        let subsystem = Subsystem::default();
        let (ended, aborted) = tokio::sync::oneshot::channel::<()>();
        subsystem.spawn(async move {
            std::future::pending::<()>().await;
            drop(ended);
        });
        let begin = Instant::now();
        subsystem
            .stop("test", begin + Duration::from_secs(10))
            .await;
        assert_eq!(begin.elapsed(), Duration::from_secs(10));
        assert!(aborted.await.is_err(), "the task was dropped");
    }

    #[tokio::test(start_paused = true)]
    async fn tasks_that_stop_are_not_waited_for_any_longer() {
        let subsystem = Subsystem::default();
        let stopping = subsystem.stopping().clone();
        subsystem.spawn(async move { stopping.cancelled().await });
        let begin = Instant::now();
        subsystem
            .stop("test", begin + Duration::from_secs(10))
            .await;
        assert_eq!(begin.elapsed(), Duration::ZERO);
    }
}
