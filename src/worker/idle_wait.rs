//! Sleep between turns: the events that a worker waits for, and those that woke it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::{Mailbox, Ring};
use crate::event::{Interest, Poller};
use crate::port::Readiness;

/// Longest sleep of a worker while one of its rings has no kick descriptor.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Source of a wake-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wake {
    Command,
    RxKick,
    TxKick,
    ControlKick,
    Host,
    Port,
}

/// Events that ended a sleep. All are false after a timeout, a command or a kick of the control virtqueue.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct WakeReasons {
    /// Kick for the rx ring.
    pub(super) rx: bool,
    /// Kick for the tx ring.
    pub(super) tx: bool,
    /// Event of the port's readiness.
    pub(super) port: bool,
    /// Change of the host's device.
    pub(super) host: bool,
}

/// The descriptors that a session waits for.
pub(super) struct IdleWait {
    poller: Poller<Wake>,
    /// Longest sleep, if a ring has no kick descriptor.
    max_sleep: Option<Duration>,
    /// Interest in the port's descriptor, once the poller watches it.
    watched: Option<Interest>,
}

impl IdleWait {
    /// Watches the kicks of the rx ring, the tx ring and the control virtqueue, the port's `events`, and commands.
    ///
    /// # Errors
    /// The process is out of descriptors or epoll watches.
    pub(super) fn new(
        rings: [Option<&Ring>; 3],
        events: Option<BorrowedFd<'_>>,
        mailbox: &Mailbox,
    ) -> io::Result<Self> {
        let mut poller = Poller::new()?;
        poller.add(&mailbox.wake, Interest::Read, Wake::Command)?;
        let mut max_sleep = None;
        let wakes = [Wake::RxKick, Wake::TxKick, Wake::ControlKick];
        for (ring, wake) in rings.into_iter().zip(wakes) {
            let Some(ring) = ring else { continue };
            let Some(kick) = &ring.kick else {
                max_sleep = Some(POLL_INTERVAL);
                continue;
            };
            match poller.add(kick.as_fd(), Interest::Edge, wake) {
                // A frontend may use one eventfd for several rings; it wakes the worker once for all.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
                other => other?,
            }
        }
        if let Some(events) = events {
            poller.add(events, Interest::Read, Wake::Host)?;
        }
        Ok(IdleWait { poller, max_sleep, watched: None })
    }

    /// Starts or stops watching the port's descriptor for frames. Makes no system call if nothing changes.
    fn watch(&mut self, fd: BorrowedFd<'_>, frames: bool) -> io::Result<()> {
        let interest = if frames { Interest::Edge } else { Interest::Nothing };
        match self.watched.replace(interest) {
            Some(before) if before == interest => Ok(()),
            Some(_) => self.poller.modify(Wake::Port, interest),
            None => self.poller.add(fd, interest, Wake::Port),
        }
    }

    /// Sleeps until an event of `readiness` or of the session's descriptors, or until the timeout.
    ///
    /// # Errors
    /// epoll_wait(2), epoll_ctl(2) or ppoll(2) failed.
    pub(super) fn sleep(
        &mut self,
        readiness: &Readiness<'_>,
        mailbox: &Mailbox,
    ) -> io::Result<WakeReasons> {
        let mut woken = WakeReasons::default();
        if let Some(fd) = readiness.fd.filter(|_| readiness.watched) {
            self.watch(fd, readiness.read)?;
        }
        let timeout = readiness.timeout.into_iter().chain(self.max_sleep).min();
        let note = |wake| match wake {
            // Only cleared here: the sender may wake the worker after the worker has taken the command.
            Wake::Command => mailbox.wake.clear(),
            Wake::RxKick => woken.rx = true,
            Wake::TxKick => woken.tx = true,
            // The worker reads the control virtqueue after each sleep.
            Wake::ControlKick => {}
            Wake::Host => woken.host = true,
            Wake::Port => woken.port = true,
        };
        // epoll's timeouts are whole milliseconds, so a sleep with a timeout waits by `wait_also`.
        let poller_reports = readiness.watched && timeout.is_none();
        let interest = match (readiness.read && !poller_reports, readiness.write) {
            (true, true) => Some(Interest::ReadWrite),
            (true, false) => Some(Interest::Read),
            (false, true) => Some(Interest::Write),
            (false, false) => None,
        };
        let port = match readiness.fd.zip(interest) {
            Some((fd, interest)) => self.poller.wait_also(fd, interest, timeout, note)?,
            None => self.poller.wait(timeout, note).map(|()| false)?,
        };
        Ok(WakeReasons { port: port || woken.port, ..woken })
    }
}
