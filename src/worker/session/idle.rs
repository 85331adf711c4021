//! What a session does when nothing has moved, before it sleeps: it polls, takes a nap, or asks for kicks.
//!
//! Invariant: a session sleeps only when it has asked for kicks, and then has found nothing new in the rings
//! that it can serve. So whatever comes later wakes the worker.

use std::time::{Duration, Instant};

use super::ActiveSession;
use crate::guest::Fault;
use crate::worker::active_ring::ActiveRing;
use crate::worker::{Mailbox, RingState};

impl ActiveSession<'_> {
    /// Turns for a while in which nothing may move; says whether something did.
    pub(super) fn poll(
        &mut self,
        time: Option<Duration>,
        mailbox: &Mailbox,
    ) -> Result<bool, Fault> {
        match time {
            None => self.poll_for_reply(mailbox),
            Some(Duration::ZERO) => Ok(false),
            Some(time) => self.busy_poll(time, mailbox),
        }
    }

    fn busy_poll(&mut self, time: Duration, mailbox: &Mailbox) -> Result<bool, Fault> {
        let end = Instant::now() + time;
        while Instant::now() < end && !mailbox.has_command() {
            self.port.woken(true);
            if self.turn()? {
                return Ok(true);
            }
            std::hint::spin_loop();
        }
        self.port.woken(false);
        Ok(false)
    }

    /// Turns where the guest is about to answer what it was given, until it has.
    fn poll_for_reply(&mut self, mailbox: &Mailbox) -> Result<bool, Fault> {
        let Some(tx) = self.queues.tx.as_mut() else { return Ok(false) };
        if !self.tx.as_ref().is_some_and(|tx| tx.is_enabled) {
            return Ok(false);
        }
        let Some(end) = self.adaptive_poll.begin() else { return Ok(false) };
        tx.disable_notify();
        let mut moved = false;
        while !self.adaptive_poll.have_come() && Instant::now() < end && !mailbox.has_command() {
            self.port.woken(true);
            moved |= self.turn()?;
            // Whoever waits for this processor may be the one who answers.
            std::thread::yield_now();
        }
        self.adaptive_poll.end();
        let counters = &self.status.counters;
        counters.poll_attempts.add(1);
        counters.poll_successes.add(self.adaptive_poll.have_come().into());
        Ok(moved)
    }

    /// Takes a nap, if that pays; says whether it did.
    pub(super) fn coalesce(&mut self) -> bool {
        let rested = self.coalescer.take();
        if rested {
            self.status.counters.coalesced_sleeps.add(1);
            self.port.woken(true);
        }
        rested
    }

    /// Asks the driver for kicks where they are of use; says whether it has been faster.
    ///
    /// A ring whose chains wait for the port needs none: the port's readiness wakes the worker.
    /// Nor does the rx ring while the port has buffers enough.
    pub(super) fn arm(&mut self) -> Result<bool, Fault> {
        let starved = self.port.readiness(&self.queues).starved;
        let mut more = false;
        let has_taken_all = self.has_taken_all();
        let serves = |tx: &ActiveRing<'_>| tx.ring.state != RingState::Waiting;
        if let Some(queue) = &mut self.queues.tx
            && has_taken_all
            && self.tx.as_ref().is_some_and(serves)
        {
            more |= queue.enable_notify()?;
        }
        if let Some(queue) = &mut self.queues.rx
            && starved
            && self.rx.as_ref().is_some_and(|rx| rx.is_enabled)
        {
            self.status.counters.starved.add(1);
            more |= queue.enable_notify()?;
        }
        if let Some(control) = &mut self.control {
            more |= control.arm()?;
        }
        Ok(more)
    }
}
