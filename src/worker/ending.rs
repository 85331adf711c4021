//! Endings of a session that no command asked for: the guest broke its rings, or the worker panicked.
//!
//! Invariant: of each, the log has a line, the frontend's error descriptors are signalled, and
//! [`Ended::fault`] says why.

use log::{error, warn};

use super::{Ended, Ring, Session, WorkerOptions};
use crate::guest::Fault;

/// The guest broke its rings: says so in the log and to the frontend.
pub(super) fn stopped(
    session: &Session,
    options: &WorkerOptions,
    fault: &Fault,
    ended: Ended,
) -> Ended {
    // Zeros where memory was may look like any fault.
    let fault = if session.memory.is_lost() { &Fault::MemoryLost } else { fault };
    warn!("{}: stopped until the guest resets: {fault}", options.name);
    tell_frontend(session);
    Ended { fault: Some(fault.to_string()), ..ended }
}

/// Tells the log and the frontend that the session has panicked, which dropped all of it. Chains that
/// were in flight are not used: the rings resume at the used index in guest memory.
pub(super) fn panicked(session: &Session, options: &WorkerOptions) -> Ended {
    const FAULT: &str = "worker thread panicked (bug); the log has its message";
    error!(
        "{}: worker thread panicked (bug); queue pair stopped until the guest resets or the VMM reconnects",
        options.name
    );
    tell_frontend(session);
    let used = |ring: &Option<Ring>| ring.as_ref()?.layout.used_index(&session.memory).ok();
    Ended {
        rx: used(&session.rx),
        tx: used(&session.tx),
        control: used(&session.control),
        fault: Some(FAULT.into()),
    }
}

/// Signals the error descriptors of the session's rings.
fn tell_frontend(session: &Session) {
    for ring in [&session.rx, &session.tx, &session.control].into_iter().flatten() {
        ring.error.signal();
    }
}
