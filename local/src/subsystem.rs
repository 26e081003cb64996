//! Tasks that are stopped together.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{
    task::{self, AbortHandle},
    time::{Instant, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::warn;

/// Tasks that are stopped together. Clones share them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Subsystem {
    tasks: TaskTracker,
    stop: CancellationToken,
    running: Running,
}

/// The tasks that are aborted if they do not stop in time. A token in each would have to be looked at whenever one is polled.
#[derive(Clone, Debug, Default)]
struct Running(Arc<Mutex<HashMap<task::Id, AbortHandle>>>);

impl Running {
    /// Held between awaits only.
    fn lock(&self) -> MutexGuard<'_, HashMap<task::Id, AbortHandle>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes its task out of those that run when it is dropped with it.
struct Registration(Running);

impl Drop for Registration {
    fn drop(&mut self) {
        if let Some(id) = task::try_id() {
            self.0.lock().remove(&id);
        }
    }
}

impl Subsystem {
    /// Runs a task until it ends, or is aborted because it did not stop in time.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let registration = Registration(self.running.clone());
        // Locked until it is there, because the task may end at once.
        let mut running = self.running.lock();
        let task = self.tasks.spawn(async move {
            let _registration = registration;
            task.await;
        });
        running.insert(task.id(), task.abort_handle());
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
            for task in self.running.lock().values() {
                task.abort();
            }
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

    #[tokio::test]
    async fn nothing_is_kept_of_a_task_that_has_ended() {
        let subsystem = Subsystem::default();
        for _ in 0..3 {
            subsystem.spawn(async {});
        }
        subsystem.spawn(async { panic!("on purpose") });
        subsystem
            .stop("test", Instant::now() + Duration::from_secs(10))
            .await;
        assert!(subsystem.running.lock().is_empty());
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
