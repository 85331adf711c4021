//! Sleep between turns: what a worker waits for, and what woke it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use super::{Mailbox, Ring};
use crate::event::{Interest, Poller};
use crate::port::Readiness;

/// How often a ring without a kick descriptor is looked at while its worker is idle.
const POLL: Duration = Duration::from_millis(1);

/// What wakes a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wake {
    Command,
    RxKick,
    TxKick,
    ControlKick,
    Host,
    Port,
}

/// What a sleep was ended by.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct WakeReasons {
    pub(super) rx: bool,
    pub(super) tx: bool,
    pub(super) port: bool,
    pub(super) host: bool,
}

/// The descriptors that a session waits on, but for the port's.
pub(super) struct IdleWait {
    poller: Poller<Wake>,
    /// How long to sleep at the most, where a driver was given no way to kick.
    polling: Option<Duration>,
    /// What the port's descriptor is watched for by the poller, if it is.
    watched: Option<Interest>,
}

impl IdleWait {
    /// Waits for the kicks of the rx, the tx and the control ring, for the port's `events`, and for commands.
    ///
    /// # Errors
    /// A descriptor can't be waited on.
    pub(super) fn new(
        rings: [Option<&Ring>; 3],
        events: Option<BorrowedFd<'_>>,
        mailbox: &Mailbox,
    ) -> io::Result<Self> {
        let mut poller = Poller::new()?;
        poller.add(&mailbox.wake, Interest::Read, Wake::Command)?;
        let mut polling = None;
        let wakes = [Wake::RxKick, Wake::TxKick, Wake::ControlKick];
        for (ring, wake) in rings.into_iter().zip(wakes) {
            let Some(ring) = ring else { continue };
            let Some(kick) = &ring.kick else {
                polling = Some(POLL);
                continue;
            };
            match poller.add(kick.as_fd(), Interest::Edge, wake) {
                // One eventfd for both rings wakes the worker just the same.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
                other => other?,
            }
        }
        if let Some(events) = events {
            poller.add(events, Interest::Read, Wake::Host)?;
        }
        Ok(IdleWait { poller, polling, watched: None })
    }

    /// Has the poller watch the port's descriptor for frames, or not: no call while that stays as it is.
    fn watch(&mut self, fd: BorrowedFd<'_>, frames: bool) -> io::Result<()> {
        let interest = if frames { Interest::Edge } else { Interest::Nothing };
        match self.watched.replace(interest) {
            Some(before) if before == interest => Ok(()),
            Some(_) => self.poller.modify(Wake::Port, interest),
            None => self.poller.add(fd, interest, Wake::Port),
        }
    }

    /// Sleeps until something of `readiness` or of the session's descriptors happens.
    pub(super) fn sleep(
        &mut self,
        readiness: &Readiness<'_>,
        mailbox: &Mailbox,
    ) -> io::Result<WakeReasons> {
        let mut woken = WakeReasons::default();
        if let Some(fd) = readiness.fd.filter(|_| readiness.watched) {
            self.watch(fd, readiness.read)?;
        }
        let timeout = readiness.timeout.into_iter().chain(self.polling).min();
        let note = |wake| match wake {
            // Cleared here and nowhere else: it may be rung after its command was taken.
            Wake::Command => mailbox.wake.clear(),
            Wake::RxKick => woken.rx = true,
            Wake::TxKick => woken.tx = true,
            // Commands are looked for after each sleep.
            Wake::ControlKick => {}
            Wake::Host => woken.host = true,
            Wake::Port => woken.port = true,
        };
        // The poller's own times are milliseconds.
        let is_told = readiness.watched && timeout.is_none();
        let interest = match (readiness.read && !is_told, readiness.write) {
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
