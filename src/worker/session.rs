//! A session of a worker: turns, and the sleep between them.
//!
//! Invariant: when [`serve`] returns, completed chains are published, and the others are available again. So the
//! next session resumes at the used index.

mod idle;

use std::mem::take;
use std::time::{Duration, Instant};

use log::{debug, warn};

use super::active_ring::ActiveRing;
use super::adaptive_poll::AdaptivePoll;
use super::coalescing::Coalescer;
use super::control_queue::ControlQueue;
use super::ending::stopped;
use super::idle_wait::{IdleWait, WakeReasons};
use super::rate_limit::RateLimit;
use super::recording::record;
use super::spoofing::SpoofingLog;
use super::{Ended, Mailbox, PairStatus, RingState, Session, WorkerOptions};
use crate::capture::Capture;
use crate::counters::DropReason;
use crate::guest::{Budget, Fault, GuestMemory, Readable, Virtqueue};
use crate::port::{Completions, HostQueue, Port, SessionConfig, Virtqueues};

/// Limit on the chains that one turn pops from the tx ring: 64 small frames take about 50 µs, and so does 1 MiB.
const TX_BUDGET: Budget = Budget { chains: 64, bytes: 1 << 20 };
/// Limit on the chains that one turn pops from the rx ring. The length of an empty buffer costs no time.
const RX_BUDGET: Budget = Budget { chains: 64, bytes: usize::MAX };
/// Pause of a worker that cannot wait for descriptors, so that it does not spin.
const PAUSE: Duration = Duration::from_millis(10);

/// State of a running session.
struct ActiveSession<'s> {
    rx: Option<ActiveRing<'s>>,
    tx: Option<ActiveRing<'s>>,
    queues: Virtqueues<'s>,
    limit: RateLimit<'s>,
    /// True if the port has accepted all frames that it was given.
    port_accepted_all: bool,
    control: Option<ControlQueue<'s>>,
    port: Box<dyn Port<'s> + 's>,
    done: Completions,
    memory: &'s GuestMemory,
    status: &'s PairStatus,
    /// Time of a wake-up by a tx kick, until the first of its frames are used.
    kicked: Option<Instant>,
    header_length: usize,
    /// Reason for dropping the frames of a tx ring whose frames do not move.
    drop_reason: DropReason,
    capture: &'s Capture,
    pair: u16,
    coalescer: Coalescer,
    adaptive_poll: AdaptivePoll,
    spoofing: &'s mut SpoofingLog,
}

/// Serves a session until a command waits, or the guest breaks a ring's rules.
// Not inlined: `cargo bench -- instructions` counts its instructions.
#[inline(never)]
pub(super) fn serve(
    host: &mut HostQueue,
    session: &Session,
    options: &WorkerOptions,
    mailbox: &Mailbox,
    status: &PairStatus,
    spoofing: &mut SpoofingLog,
) -> Ended {
    let counters = &status.counters;
    counters.sessions.add(1);
    let (name, first) = (&options.name, 2 * options.pair);
    let started = ActiveRing::start(name, session, first, &session.rx, &counters.rx)
        .and_then(|rx| {
            Ok((rx, ActiveRing::start(name, session, first + 1, &session.tx, &counters.tx)?))
        })
        .and_then(|(rx, tx)| Ok((rx, tx, ControlQueue::start(session)?)));
    let ((rx, rx_queue), (tx, tx_queue), control) = match started {
        Ok(started) => started,
        Err(fault) => return stopped(session, options, &fault, Ended::default()),
    };
    let config = SessionConfig {
        negotiated: session.negotiated,
        mtu: session.mtu,
        link: session.link,
        receives: rx.as_ref().is_some_and(|rx| rx.is_enabled),
        rx_size: session.rx.as_ref().map_or(0, |ring| ring.layout.size),
        rules: session.rules.clone(),
        tx_filter: options.tx_filter.clone(),
        peers: options.peers.clone(),
    };
    let queues = Virtqueues { tx: tx_queue, rx: rx_queue };
    let port = host.session(&session.memory, &queues, &config);
    let header_length = session.negotiated.header_length();
    let sizes = [&session.rx, &session.tx].into_iter().flatten().map(|ring| ring.layout.size);
    let smaller = sizes.min().unwrap_or(0);
    let first_tx = queues.tx_next_used();
    let mut active = ActiveSession {
        rx,
        tx,
        queues,
        limit: RateLimit::new(&options.limits, header_length, session.mtu, first_tx),
        port_accepted_all: true,
        control,
        port,
        done: Completions::default(),
        memory: &session.memory,
        status,
        kicked: None,
        header_length,
        drop_reason: if session.link { DropReason::Disabled } else { DropReason::LinkDown },
        capture: &options.capture,
        pair: options.pair,
        coalescer: Coalescer::new(smaller),
        adaptive_poll: AdaptivePoll::new(),
        spoofing,
    };
    let result = active.turn_until_command(options, mailbox);
    active.stop();
    let ended = Ended {
        rx: active.queues.rx.as_ref().map(Virtqueue::next_used),
        tx: active.queues.tx.as_ref().map(Virtqueue::next_used),
        control: active.control.as_ref().map(ControlQueue::next_used),
        fault: None,
    };
    match result {
        Ok(()) => ended,
        Err(fault) => stopped(session, options, &fault, ended),
    }
}

impl ActiveSession<'_> {
    /// Runs turns while chains move. Then polls or coalesces if that pays; else enables notifications, reads the
    /// rings again, and sleeps.
    ///
    /// # Errors
    /// The guest's fault, which ends the session.
    fn turn_until_command(
        &mut self,
        options: &WorkerOptions,
        mailbox: &Mailbox,
    ) -> Result<(), Fault> {
        let rings = [
            self.rx.as_ref().map(|rx| rx.ring),
            self.tx.as_ref().map(|tx| tx.ring),
            self.control.as_ref().map(ControlQueue::ring),
        ];
        let mut has_warned = false;
        let mut idle_wait = loop {
            match IdleWait::new(rings, self.port.events(), mailbox) {
                Ok(idle_wait) => break idle_wait,
                Err(_) if mailbox.has_command() => return Ok(()),
                // The process may be out of descriptors for a time, which is no fault of the guest.
                Err(error) if !std::mem::replace(&mut has_warned, true) => warn!(
                    "{}: cannot watch its descriptors: {error}; no frames move; retried every {} ms",
                    options.name,
                    PAUSE.as_millis()
                ),
                Err(_) => std::thread::sleep(PAUSE),
            }
        };
        while !mailbox.has_command() {
            if mailbox.take_call() {
                rings.iter().flatten().for_each(|ring| {
                    ring.call.signal();
                });
            }
            // The control virtqueue is served during a flood too: a CPU of the guest may spin until the answer.
            let moved = self.turn()? | self.answer()?;
            if moved
                || self.poll(options.busy_poll, mailbox)?
                || self.coalesce()
                || self.enable_notify()?
            {
                continue;
            }
            self.status.counters.sleeps.add(1);
            self.status.set_mode(self.port.mode());
            if self.accepted_all() {
                // An earlier turn has already moved the frames of the last kick.
                self.kicked = None;
            }
            let next_line = self.spoofing.report(&self.status.counters.tx);
            let mut readiness = self.port.readiness(&self.queues);
            readiness.read &= !self.limit.blocks_rx();
            let limit = self.limit.wait(self.queues.tx.as_ref());
            readiness.timeout = readiness.timeout.into_iter().chain(limit).chain(next_line).min();
            let woken = idle_wait.sleep(&readiness, mailbox).unwrap_or_else(|error| {
                debug!("{}: cannot wait for events: {error}; retried every 10 ms", options.name);
                std::thread::sleep(PAUSE);
                WakeReasons::default()
            });
            self.note(woken);
        }
        Ok(())
    }

    /// Runs one turn. Returns true if anything moved.
    fn turn(&mut self) -> Result<bool, Fault> {
        if self.memory.is_lost() {
            return Err(Fault::MemoryLost);
        }
        self.done.captures = self.capture.is_on();
        self.transmit()?;
        let mut moved = self.post()?;
        let allowance = self.limit.rx_allowance(&self.status.counters);
        self.port.reap(&mut self.queues, allowance, &mut self.done);
        self.limit.charge(&self.done, self.accepted_all());
        moved |= self.publish();
        if moved {
            self.status.counters.turns.add(1);
            self.status.set_mode(self.port.mode());
        }
        Ok(moved)
    }

    /// Returns true if the port has accepted all popped frames.
    fn accepted_all(&self) -> bool {
        let waits = |tx: &Virtqueue<'_, Readable>| self.limit.holds_back(tx);
        self.port_accepted_all && !self.queues.tx.as_ref().is_some_and(waits)
    }

    /// Pops frames from the guest, once the port has accepted all before them, and transmits them.
    fn transmit(&mut self) -> Result<(), Fault> {
        let accepted_all = self.accepted_all();
        let (Some(tx), Some(queue)) = (&self.tx, &mut self.queues.tx) else { return Ok(()) };
        if tx.ring.state == RingState::Waiting {
            return Ok(());
        }
        if accepted_all && queue.pop(TX_BUDGET)? == 0 {
            return Ok(());
        }
        queue.disable_notify();
        if !tx.is_enabled {
            self.limit.admit_all(queue);
            self.done.drop_all(queue, self.limit.admitted(), self.drop_reason);
            return Ok(());
        }
        let before = self.limit.admitted();
        self.limit.admit(queue, &self.status.counters);
        let until = self.limit.admitted();
        if self.port_accepted_all && until == before {
            return Ok(());
        }
        self.port_accepted_all = self.port.transmit(&mut self.queues, until, &mut self.done);
        #[cfg(debug_assertions)]
        crate::fault_point::panic_if("worker", |frames| tx.counters.frames.get() >= frames);
        Ok(())
    }

    /// Pops as many rx buffers as the port requests, and posts them. Returns true if there were any.
    fn post(&mut self) -> Result<bool, Fault> {
        let Some(queue) = self.queues.rx.as_mut() else { return Ok(false) };
        let wanted = self.port.max_buffers().saturating_sub(queue.in_flight());
        if wanted == 0 || !self.rx.as_ref().is_some_and(|rx| rx.is_enabled) {
            return Ok(false);
        }
        let budget = Budget { chains: RX_BUDGET.chains.min(wanted), ..RX_BUDGET };
        if queue.pop(budget)? == 0 {
            return Ok(false);
        }
        queue.disable_notify();
        self.port.post(&mut self.queues);
        Ok(true)
    }

    /// Answers the guest's commands. Returns true if there were any.
    fn answer(&mut self) -> Result<bool, Fault> {
        self.control.as_mut().map_or(Ok(false), ControlQueue::answer)
    }

    /// Publishes completed chains, and counts their frames. Returns true if chains completed or frames were dropped.
    fn publish(&mut self) -> bool {
        if let Some(recorder) = self.capture.recorder() {
            record(&recorder, self.pair, &self.queues, &mut self.done, self.header_length);
        } else if !self.done.captured.is_empty() {
            self.done.captured.clear();
        }
        // rx first: if the process is killed in between, a loopback port sends frames twice and loses none.
        let moved = self.publish_rx() | self.publish_tx();
        for (copied, counters) in [
            (&mut self.done.rx_copied, &self.status.counters.rx),
            (&mut self.done.tx_copied, &self.status.counters.tx),
        ] {
            copied.drain(..).for_each(|reason| counters.copied(reason, 1));
        }
        moved
    }

    fn publish_rx(&mut self) -> bool {
        let (moved, counters) = (take(&mut self.done.rx), &self.status.counters.rx);
        let mut any = false;
        for (reason, frames) in self.done.rx_dropped.drain(..) {
            any = true;
            counters.dropped(reason, frames);
        }
        let (Some(rx), Some(queue)) = (&self.rx, &mut self.queues.rx) else { return any };
        let completed = queue.completed();
        if completed == 0 {
            return any;
        }
        counters.bursts.observe(completed as u64);
        self.coalescer.note(moved.frames, completed);
        self.adaptive_poll.note_rx(moved.frames, moved.bytes);
        counters.frames.add(moved.frames);
        counters.bytes.add(moved.bytes);
        rx.publish(queue);
        true
    }

    fn publish_tx(&mut self) -> bool {
        let (moved, counters) = (take(&mut self.done.tx), &self.status.counters.tx);
        let (Some(tx), Some(queue)) = (&self.tx, &mut self.queues.tx) else { return false };
        let completed = queue.completed();
        if completed == 0 {
            return false;
        }
        counters.bursts.observe(completed as u64);
        for (reason, frames) in self.done.tx_dropped.drain(..) {
            counters.dropped(reason, frames);
            self.spoofing.note(reason);
        }
        // Reported here too: under a flood the worker never sleeps.
        self.spoofing.report(counters);
        self.coalescer.note(moved.frames, completed);
        self.adaptive_poll.note_tx();
        counters.frames.add(moved.frames);
        counters.bytes.add(moved.bytes);
        tx.publish(queue);
        if let Some(kicked) = self.kicked.take() {
            let waited = kicked.elapsed().as_micros() as u64;
            self.status.counters.kick_to_used.observe(waited);
        }
        true
    }

    /// Counts kicks, and passes events of the host side to the port.
    fn note(&mut self, woken: WakeReasons) {
        if woken.rx {
            self.status.counters.rx.kicks.add(1);
        }
        if woken.tx {
            self.status.counters.tx.kicks.add(1);
            self.kicked = Some(Instant::now());
        }
        self.port.woken(woken.port);
        if woken.host {
            self.port.host_changed();
        }
    }

    /// Stops the host side, publishes completed chains, and makes the others available again.
    fn stop(&mut self) {
        self.port.stop(&mut self.queues, &mut self.done);
        self.publish();
        if let Some(tx) = &mut self.queues.tx {
            tx.unpop_all();
        }
        if let Some(rx) = &mut self.queues.rx {
            rx.unpop_all();
        }
    }
}
