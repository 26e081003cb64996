//! Visitors' connections that have changed their protocol, for those who count them.

use std::{fmt, sync::Arc};

use crate::{Observer, event::Event, settings::Settings};

/// Tells the observer of a tunnel's sockets.
#[derive(Clone)]
pub(crate) struct SocketObserver {
    observer: Observer,
    settings: Arc<Settings>,
}

impl fmt::Debug for SocketObserver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("SocketObserver");
        debug.field("tunnel", &self.settings.name);
        debug.finish_non_exhaustive()
    }
}

impl SocketObserver {
    pub(crate) fn new(observer: Observer, settings: Arc<Settings>) -> Self {
        Self { observer, settings }
    }

    /// Says that a socket is open, until what is returned is dropped.
    pub(crate) fn opened(&self) -> OpenSocket<'_> {
        self.observe(Event::SocketOpened);
        OpenSocket(self)
    }

    fn observe(&self, event: Event) {
        (self.observer)(&self.settings.name, event);
    }
}

/// A socket that is open. However its exchange ends, this is dropped with it.
pub(crate) struct OpenSocket<'a>(&'a SocketObserver);

impl Drop for OpenSocket<'_> {
    fn drop(&mut self) {
        self.0.observe(Event::SocketClosed);
    }
}
