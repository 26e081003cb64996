//! The console: what the agent shows on a terminal, redrawn in place, with keys.
//!
//! [`state`] is what there is to show and [`view`] how it looks. A thread of its own draws and reads keys, at most ten times a second,
//! so that neither a slow terminal nor a hundred requests a second hold up the tunnel.

mod state;
mod view;

use std::{
    env,
    future::pending,
    io::{self, IsTerminal, Write},
    panic,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    thread,
    time::{Duration, Instant},
};

use base64::{Engine, engine::general_purpose::STANDARD};
use ratatui::{
    Terminal,
    backend::CrosstermBackend,
    crossterm::{
        cursor, event as terminal_event,
        event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers},
        execute,
        terminal::{self, EnterAlternateScreen, LeaveAlternateScreen},
    },
};
use tokio::sync::Notify;

use self::{state::State, view::Theme};
use crate::{display::Lines, event::Event, lock::lock};

/// How often the console looks for keys, and so how often it draws at most.
const FRAME_INTERVAL: Duration = Duration::from_millis(100);
/// How often it draws when nothing happens: ages and rates change.
const IDLE_REDRAW_INTERVAL: Duration = Duration::from_secs(1);
/// How long the terminal may take to be restored at the end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// The terminal while the console has it. [`Console::close`] gives it back.
#[derive(Debug)]
pub(crate) struct Console {
    shared: Arc<Shared>,
    /// Disconnected once the terminal is restored.
    closed: Mutex<mpsc::Receiver<()>>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: AtomicBool,
    closing: AtomicBool,
    stop_requested: Notify,
}

impl Shared {
    /// Held for as long as it takes to note or to draw into memory, never while the terminal is written to.
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn update(&self, update: impl FnOnce(&mut State)) {
        update(&mut self.state());
        self.changed.store(true, Ordering::Relaxed);
    }
}

impl Console {
    /// Whether somebody is there to look at a console and to press keys.
    pub(crate) fn is_possible() -> bool {
        let is_dumb = env::var_os("TERM").is_some_and(|term| term == "dumb");
        io::stdin().is_terminal() && io::stderr().is_terminal() && !is_dumb && is_in_foreground()
    }

    /// Takes the terminal, for tunnels of these names.
    ///
    /// # Errors
    /// If the terminal cannot be controlled.
    pub(crate) fn open(tunnels: impl Iterator<Item = String>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State::new(tunnels)),
            changed: AtomicBool::new(true),
            closing: AtomicBool::new(false),
            stop_requested: Notify::new(),
        });
        let screen = Screen::take()?;
        let (closing, closed) = mpsc::channel();
        let drawn = shared.clone();
        thread::spawn(move || {
            // Dropped at the end, which `close` waits for.
            let _closing = closing;
            // A terminal that has gone away shows nothing more; the tunnel goes on until a signal says otherwise.
            let _ = screen.run(&drawn);
        });
        Ok(Self {
            shared,
            closed: Mutex::new(closed),
        })
    }

    /// Notes what happened to a tunnel. Never blocks on the terminal.
    pub(crate) fn show(&self, tunnel: &str, event: &Event) {
        self.shared
            .update(|state| state.apply(tunnel, event, Instant::now()));
    }

    /// Shows where the inspector is, and opens it when its key is pressed.
    pub(crate) fn show_inspector(&self, url: String) {
        self.shared.update(|state| state.set_inspector_url(url));
    }

    /// Where the log goes while the console has the terminal.
    pub(crate) fn log(&self) -> Lines {
        Lines::to(Log(self.shared.clone()))
    }

    /// Completes when the user asks a console to stop, if there is one.
    pub(crate) async fn stop_requested(console: Option<&Self>) {
        match console {
            Some(console) => console.shared.stop_requested.notified().await,
            None => pending().await,
        }
    }

    /// Gives the terminal back, and returns a summary of what was served.
    pub(crate) fn close(&self) -> String {
        self.shared.closing.store(true, Ordering::Relaxed);
        // A terminal that takes nothing must not keep the process.
        let closed = lock(&self.closed).recv_timeout(CLOSE_TIMEOUT);
        if closed == Err(RecvTimeoutError::Timeout) {
            let _ = terminal::disable_raw_mode();
        }
        self.shared.state().summary(Instant::now())
    }
}

/// The log as lines of the console.
struct Log(Arc<Shared>);

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line).trim_end().to_owned();
        self.0.update(|state| state.log(text));
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The terminal's second screen, in raw mode. Dropped, the terminal is as it was.
struct Screen(Terminal<CrosstermBackend<io::Stderr>>);

impl Screen {
    fn take() -> io::Result<Self> {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            let _ = restore();
            before(panic);
        }));
        prepare()?;
        let terminal = Terminal::new(CrosstermBackend::new(io::stderr()));
        if terminal.is_err() {
            let _ = restore();
        }
        Ok(Self(terminal?))
    }

    fn run(mut self, shared: &Shared) -> io::Result<()> {
        let theme = Theme::from_environment();
        let mut drawn = Instant::now();
        while !shared.closing.load(Ordering::Relaxed) {
            let is_due = drawn.elapsed() >= IDLE_REDRAW_INTERVAL;
            if shared.changed.swap(false, Ordering::Relaxed) || is_due {
                drawn = Instant::now();
                self.0
                    .draw(|frame| view::draw(frame, &shared.state(), theme, drawn))?;
            }
            if terminal_event::poll(FRAME_INTERVAL)? {
                // Also after a change of the window's size.
                shared.changed.store(true, Ordering::Relaxed);
                if let terminal_event::Event::Key(key) = terminal_event::read()?
                    && key.kind != KeyEventKind::Release
                {
                    self.on_key(key, shared)?;
                }
            }
        }
        Ok(())
    }

    fn on_key(&mut self, key: KeyEvent, shared: &Shared) -> io::Result<()> {
        let mut state = shared.state();
        match (key.code, key.modifiers.contains(KeyModifiers::CONTROL)) {
            (KeyCode::Char('c'), true) | (KeyCode::Char('q'), false) => {
                shared.stop_requested.notify_one();
            }
            (KeyCode::Char('z'), true) => {
                drop(state);
                self.suspend(shared)?;
            }
            (KeyCode::Char('o'), false) => open_in_browser(&mut state, State::browser_url),
            (KeyCode::Char('i'), false) => open_in_browser(&mut state, State::inspector_url),
            (KeyCode::Char('c'), false) => {
                if let Some(url) = state.public_url().map(str::to_owned) {
                    state.notify(format!("copied {url}"));
                    drop(state);
                    copy(&url)?;
                }
            }
            (KeyCode::Char('s'), false) => state.toggle_qr_code(),
            (KeyCode::Esc, _) => state.hide_qr_code(),
            (KeyCode::Down | KeyCode::Tab, _) => state.select_next(),
            (KeyCode::Up | KeyCode::BackTab, _) => state.select_previous(),
            _ => {}
        }
        Ok(())
    }

    /// Stops the process as Ctrl-Z does, and takes the terminal again once the user brings it back to the foreground: in the
    /// background the tunnel goes on without a console.
    #[cfg(unix)]
    fn suspend(&mut self, shared: &Shared) -> io::Result<()> {
        restore()?;
        // This thread, which stops all: sent to the process, the signal may reach another thread after this one has gone on.
        signal_hook::low_level::raise(signal_hook::consts::SIGTSTP)?;
        while !is_in_foreground() {
            if shared.closing.load(Ordering::Relaxed) {
                return Ok(());
            }
            thread::sleep(FRAME_INTERVAL);
        }
        prepare()?;
        // A new one draws everything. `clear` would ask the terminal where its cursor is, and not every terminal answers.
        self.0 = Terminal::new(CrosstermBackend::new(io::stderr()))?;
        Ok(())
    }

    #[cfg(not(unix))]
    fn suspend(&mut self, _: &Shared) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = restore();
    }
}

/// Whether the terminal's keys are for this process: one that a shell runs in the background is stopped if it takes the terminal.
#[cfg(unix)]
fn is_in_foreground() -> bool {
    rustix::termios::tcgetpgrp(io::stdin()).is_ok_and(|group| group == rustix::process::getpgrp())
}

#[cfg(not(unix))]
fn is_in_foreground() -> bool {
    true
}

fn prepare() -> io::Result<()> {
    terminal::enable_raw_mode()?;
    execute!(io::stderr(), EnterAlternateScreen, cursor::Hide)
}

fn restore() -> io::Result<()> {
    execute!(io::stderr(), LeaveAlternateScreen, cursor::Show)?;
    terminal::disable_raw_mode()
}

fn open_in_browser(state: &mut State, url: impl FnOnce(&State) -> Option<&str>) {
    let Some(url) = url(state).map(str::to_owned) else {
        return;
    };
    let notice = match open::that_detached(&url) {
        Ok(()) => format!("opened {url}"),
        Err(_) => format!("no browser could be started: open {url} yourself"),
    };
    state.notify(notice);
}

/// Puts a text on the clipboard through the terminal (OSC 52), which works over SSH, too. A terminal that does not know it ignores it.
fn copy(text: &str) -> io::Result<()> {
    let mut stderr = io::stderr();
    write!(stderr, "\x1b]52;c;{}\x07", STANDARD.encode(text))?;
    stderr.flush()
}
