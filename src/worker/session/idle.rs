//! Steps of a session after a turn that moved nothing: it polls, coalesces wake-ups, or enables notifications.
//!
//! Invariant: before a session sleeps, it enables notifications, and then finds the available indexes of all rings
//! that it can serve unchanged. So a later change of these rings wakes the worker.

use std::time::{Duration, Instant};

use super::ActiveSession;
use crate::guest::Fault;
use crate::worker::active_ring::ActiveRing;
use crate::worker::{Mailbox, RingState};

impl ActiveSession<'_> {
    /// Polls for `time`, or for a guest's reply if `time` is `None`. Returns true if anything moved.
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

    /// Polls for the guest's reply to the last frames to the guest, if that pays. Returns true if anything moved.
    fn poll_for_reply(&mut self, mailbox: &Mailbox) -> Result<bool, Fault> {
        let Some(tx) = self.queues.tx.as_mut() else { return Ok(false) };
        if !self.tx.as_ref().is_some_and(|tx| tx.is_enabled) {
            return Ok(false);
        }
        let Some(end) = self.adaptive_poll.begin() else { return Ok(false) };
        tx.disable_notify();
        let mut moved = false;
        while !self.adaptive_poll.has_reply() && Instant::now() < end && !mailbox.has_command() {
            self.port.woken(true);
            moved |= self.turn()?;
            // The guest's CPU that replies may be waiting for this CPU.
            std::thread::yield_now();
        }
        self.adaptive_poll.end();
        let counters = &self.status.counters;
        counters.poll_attempts.add(1);
        counters.poll_successes.add(self.adaptive_poll.has_reply().into());
        Ok(moved)
    }

    /// Sleeps with notifications disabled, if that pays. Returns true if it does.
    pub(super) fn coalesce(&mut self) -> bool {
        let slept = self.coalescer.sleep_if_busy();
        if slept {
            self.status.counters.coalesced_sleeps.add(1);
            self.port.woken(true);
        }
        slept
    }

    /// Enables notifications of the rings that need a kick. Returns true if their drivers have made chains
    /// available in the meantime.
    ///
    /// The tx ring needs no kick while its chains wait for the port or the rate limit: the port's readiness or a
    /// timeout wakes the worker. The rx ring needs none while the port has enough buffers.
    pub(super) fn enable_notify(&mut self) -> Result<bool, Fault> {
        let starved = self.port.readiness(&self.queues).starved;
        let mut more = false;
        let accepted_all = self.accepted_all();
        let serves = |tx: &ActiveRing<'_>| tx.ring.state != RingState::Waiting;
        if let Some(queue) = &mut self.queues.tx
            && accepted_all
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
            more |= control.enable_notify()?;
        }
        Ok(more)
    }
}
