//! Ends of a session without a command: the guest broke a ring's rules, or the worker panicked.
//!
//! Invariant: for each such end, the worker logs one line, signals the rings' error descriptors, and puts the cause
//! into [`Ended::fault`].

use log::{error, warn};

use super::{Ended, Ring, Session, WorkerOptions};
use crate::guest::Fault;

/// Reports a fault of the guest to the log and to the frontend.
pub(super) fn stopped(
    session: &Session,
    options: &WorkerOptions,
    fault: &Fault,
    ended: Ended,
) -> Ended {
    // Zeros replace lost memory, and can look like any fault.
    let fault = if session.memory.is_lost() { &Fault::MemoryLost } else { fault };
    warn!("{}: queue pair stopped: {fault}; resumes on guest reset or VMM reconnect", options.name);
    signal_errors(session);
    Ended { fault: Some(fault.to_string()), ..ended }
}

/// Reports a panic, which has dropped the whole session, to the log and to the frontend. The chains that were in
/// flight stay unused: the rings resume at the used index in guest memory.
pub(super) fn panicked(session: &Session, options: &WorkerOptions) -> Ended {
    const FAULT: &str = "worker thread panicked (bug); the log has its message";
    error!(
        "{}: worker thread panicked (bug); queue pair stopped until the guest resets or the VMM reconnects",
        options.name
    );
    signal_errors(session);
    let used = |ring: &Option<Ring>| ring.as_ref()?.layout.used_index(&session.memory).ok();
    Ended {
        rx: used(&session.rx),
        tx: used(&session.tx),
        control: used(&session.control),
        fault: Some(FAULT.into()),
    }
}

/// Signals the error descriptors of the session's rings.
fn signal_errors(session: &Session) {
    for ring in [&session.rx, &session.tx, &session.control].into_iter().flatten() {
        ring.error.signal();
    }
}
