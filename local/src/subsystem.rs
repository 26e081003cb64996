//! Tasks that are stopped together.

use std::{
    collections::HashMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::{
    task::AbortHandle,
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
struct Running(Arc<Mutex<Handles>>);

#[derive(Debug, Default)]
struct Handles {
    /// Of each task by its number; `None` while it is being spawned.
    by_number: HashMap<u64, Option<AbortHandle>>,
    next_number: u64,
    /// Whoever comes now is aborted at once.
    is_aborted: bool,
}

/// A task among those that run, until this is dropped with the task's future.
struct Registration {
    running: Running,
    number: u64,
}

impl Running {
    fn register(&self) -> Registration {
        let mut handles = self.lock();
        let number = handles.next_number;
        handles.next_number += 1;
        handles.by_number.insert(number, None);
        Registration {
            running: self.clone(),
            number,
        }
    }

    /// Notes the handle of a task, unless it has ended already.
    fn spawned(&self, number: u64, handle: AbortHandle) {
        let mut handles = self.lock();
        if handles.is_aborted {
            handle.abort();
        } else if let Some(place) = handles.by_number.get_mut(&number) {
            *place = Some(handle);
        }
    }

    fn abort(&self) {
        let mut handles = self.lock();
        handles.is_aborted = true;
        for handle in handles.by_number.values().flatten() {
            handle.abort();
        }
    }

    /// Held between awaits only, and not while a task is spawned: a runtime that shuts down drops it there and then.
    fn lock(&self) -> MutexGuard<'_, Handles> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.running.lock().by_number.remove(&self.number);
    }
}

impl Subsystem {
    /// Runs a task until it ends, or is aborted because it did not stop in time.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let registration = self.running.register();
        let number = registration.number;
        let task = self.tasks.spawn(async move {
            let _registration = registration;
            task.await;
        });
        self.running.spawned(number, task.abort_handle());
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
            self.running.abort();
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
    async fn a_task_that_comes_when_the_others_were_aborted_is_aborted_too() {
        let subsystem = Subsystem::default();
        subsystem.spawn(std::future::pending());
        subsystem.stop("test", Instant::now()).await;
        let (ended, aborted) = tokio::sync::oneshot::channel::<()>();
        subsystem.spawn(async move {
            std::future::pending::<()>().await;
            drop(ended);
        });
        let aborted = timeout_at(Instant::now() + Duration::from_secs(1), aborted);
        assert!(aborted.await.is_ok(), "the task was dropped");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nothing_is_kept_of_a_task_that_has_ended() {
        let subsystem = Subsystem::default();
        for _ in 0..1000 {
            subsystem.spawn(async {});
        }
        subsystem.spawn(async { panic!("on purpose") });
        let deadline = Instant::now() + Duration::from_secs(10);
        subsystem.stop("test", deadline).await;
        let handles = subsystem.running.lock();
        assert!(handles.by_number.is_empty() && !handles.is_aborted);
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
