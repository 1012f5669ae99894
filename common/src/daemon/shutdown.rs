//! Signals. The first SIGTERM, SIGINT or SIGQUIT asks the daemon to stop, a second one insists. SIGHUP has files read and
//! opened again. No other signal that a terminal, a log or a mistaken `kill` sends may end a process that holds others.

use std::io;

use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
use tokio::signal::unix::{signal, SignalKind};
use tokio_util::sync::CancellationToken;

use crate::{log, reload};

/// Exit code of a daemon that had to drop sessions to stop.
pub const EXIT_SESSIONS_ABORTED: u8 = 3;

/// The two levels of "stop".
#[derive(Clone, Default)]
pub struct Shutdown {
    /// No new sessions; running ones may finish within the grace period.
    pub requested: CancellationToken,
    /// Now.
    pub forced: CancellationToken,
}

/// From the first moment of a daemon until it watches for signals, and for some of them to its end.
pub(crate) fn ignore_signals() -> io::Result<()> {
    let ignored = [
        // Until they are watched for: what they ask for is done at the start anyhow.
        Signal::SIGHUP,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        // A log on a terminal whose foreground is another job (`stty tostop`) must not stop us.
        Signal::SIGTTOU,
        Signal::SIGTTIN,
        // A log that reaches a limit for files: the write fails then, and the line is lost.
        Signal::SIGXFSZ,
        // Rust's runtime ignores it already; nothing here relies on that.
        Signal::SIGPIPE,
    ];
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    for signal in ignored {
        // SAFETY: no handler is installed or replaced that anything relies on; ignoring a signal runs no code of ours.
        unsafe { sigaction(signal, &ignore) }?;
    }
    // Signals that the parent process had blocked stay blocked here otherwise.
    let mut watched = SigSet::empty();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGHUP,
    ] {
        watched.add(signal);
    }
    Ok(watched.thread_unblock()?)
}

impl Shutdown {
    /// Starts to listen for the signals. `rereads`: SIGHUP has something else read again, which logs that.
    pub fn on_signals(rereads: bool) -> io::Result<Self> {
        let shutdown = Self::default();
        let mut term = signal(SignalKind::terminate())?;
        let mut int = signal(SignalKind::interrupt())?;
        let mut quit = signal(SignalKind::quit())?;
        let levels = shutdown.clone();
        tokio::spawn(async move {
            for level in [&levels.requested, &levels.forced] {
                tokio::select! {
                    _ = term.recv() => tracing::info!("SIGTERM"),
                    _ = int.recv() => tracing::info!("SIGINT"),
                    _ = quit.recv() => tracing::info!("SIGQUIT"),
                }
                level.cancel();
            }
        });
        let mut hangup = signal(SignalKind::hangup())?;
        let mut user1 = signal(SignalKind::user_defined1())?;
        let mut user2 = signal(SignalKind::user_defined2())?;
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = hangup.recv() => hung_up(rereads),
                    _ = user1.recv() => tracing::info!("SIGUSR1: ignored"),
                    _ = user2.recv() => tracing::info!("SIGUSR2: ignored"),
                }
            }
        });
        Ok(shutdown)
    }
}

fn hung_up(rereads: bool) {
    reload::ask();
    match (log::reopen(), rereads) {
        (true, _) => tracing::info!("SIGHUP: the log was opened again"),
        (false, true) => tracing::info!("SIGHUP"),
        (false, false) => {
            tracing::info!("SIGHUP: there is nothing to read again (no --tls, no -o)")
        }
    }
}
