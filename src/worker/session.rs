//! A session of a worker: turns, and the sleep between them.
//!
//! Invariant: when [`serve`] returns, the chains that have completed are published, and the others are
//! available again. So the next session resumes at the used index.

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

/// What one turn takes from the tx ring: so many small frames take as long as so many bytes do, some 50 µs.
const TX_BUDGET: Budget = Budget { chains: 64, bytes: 1 << 20 };
/// What one turn takes from the rx ring: empty buffers cost nothing but the walk.
const RX_BUDGET: Budget = Budget { chains: 64, bytes: usize::MAX };
/// How long a worker that cannot wait does nothing, so that it does not spin.
const PAUSE: Duration = Duration::from_millis(10);

/// Everything of a running session.
struct ActiveSession<'s> {
    rx: Option<ActiveRing<'s>>,
    tx: Option<ActiveRing<'s>>,
    queues: Virtqueues<'s>,
    limit: RateLimit<'s>,
    /// Whether the port has taken all frames that it was given.
    port_has_taken: bool,
    control: Option<ControlQueue<'s>>,
    port: Box<dyn Port<'s> + 's>,
    done: Completions,
    memory: &'s GuestMemory,
    status: &'s PairStatus,
    /// When a kick for frames from the guest woke the worker, which are not used yet.
    kicked: Option<Instant>,
    header_length: usize,
    /// Why frames from the guest are dropped where they do not move.
    not_moved: DropReason,
    capture: &'s Capture,
    pair: u16,
    coalescer: Coalescer,
    adaptive_poll: AdaptivePoll,
    spoofing: &'s mut SpoofingLog,
}

/// Serves a session until a command waits.
// By itself: its instructions are counted (`cargo bench -- instructions`).
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
    let first_tx = queues.tx.as_ref().map_or(0, Virtqueue::next_used);
    let mut active = ActiveSession {
        rx,
        tx,
        queues,
        limit: RateLimit::new(&options.limits, header_length, session.mtu, first_tx),
        port_has_taken: true,
        control,
        port,
        done: Completions::default(),
        memory: &session.memory,
        status,
        kicked: None,
        header_length,
        not_moved: if session.link { DropReason::Disabled } else { DropReason::LinkDown },
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
    /// Turns while something moves; else takes a nap where that pays, or arms the rings, looks once more,
    /// and sleeps.
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
        let mut complained = false;
        let mut idle_wait = loop {
            match IdleWait::new(rings, self.port.events(), mailbox) {
                Ok(idle_wait) => break idle_wait,
                Err(_) if mailbox.has_command() => return Ok(()),
                // The process may be out of descriptors for a while: no fault of the guest's.
                Err(error) if !std::mem::replace(&mut complained, true) => warn!(
                    "{}: cannot wait for its descriptors: {error}; tried every {} ms",
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
            // The control virtqueue is served beside a flood: a guest's CPU waits for the answer.
            let moved = self.turn()? | self.answer()?;
            if moved || self.poll(options.busy_poll, mailbox)? || self.coalesce() || self.arm()? {
                continue;
            }
            self.status.counters.sleeps.add(1);
            self.status.set_mode(self.port.mode());
            if self.has_taken_all() {
                // What the last kick was for has been seen to before.
                self.kicked = None;
            }
            let told = self.spoofing.report(&self.status.counters.tx);
            let mut readiness = self.port.readiness(&self.queues);
            readiness.read &= !self.limit.blocks_rx();
            let limit = self.limit.wait(self.queues.tx.as_ref());
            readiness.timeout = readiness.timeout.into_iter().chain(limit).chain(told).min();
            let woken = idle_wait.sleep(&readiness, mailbox).unwrap_or_else(|error| {
                debug!("{}: waiting failed: {error}", options.name);
                std::thread::sleep(PAUSE);
                WakeReasons::default()
            });
            self.note(woken);
        }
        Ok(())
    }

    /// One turn. Says whether anything moved.
    fn turn(&mut self) -> Result<bool, Fault> {
        if self.memory.is_lost() {
            return Err(Fault::MemoryLost);
        }
        self.done.captures = self.capture.is_on();
        self.transmit()?;
        let mut moved = self.post()?;
        let allowance = self.limit.rx_allowance(&self.status.counters);
        self.port.reap(&mut self.queues, allowance, &mut self.done);
        self.limit.charge(&self.done, self.has_taken_all());
        moved |= self.publish();
        if moved {
            self.status.counters.turns.add(1);
            self.status.set_mode(self.port.mode());
        }
        Ok(moved)
    }

    /// Whether the port has taken every frame that was popped.
    fn has_taken_all(&self) -> bool {
        let waits = |tx: &Virtqueue<'_, Readable>| self.limit.holds_back(tx);
        self.port_has_taken && !self.queues.tx.as_ref().is_some_and(waits)
    }

    /// Pops frames from the guest, once the port has taken all before them, and has it send them.
    fn transmit(&mut self) -> Result<(), Fault> {
        let has_taken_all = self.has_taken_all();
        let (Some(tx), Some(queue)) = (&self.tx, &mut self.queues.tx) else { return Ok(()) };
        if tx.ring.state == RingState::Waiting {
            return Ok(());
        }
        if has_taken_all && queue.pop(TX_BUDGET)? == 0 {
            return Ok(());
        }
        queue.disable_notify();
        if !tx.is_enabled {
            self.limit.admit_all(queue);
            self.done.drop_all(queue, self.limit.admitted(), self.not_moved);
            return Ok(());
        }
        let before = self.limit.admitted();
        self.limit.admit(queue, &self.status.counters);
        let until = self.limit.admitted();
        if self.port_has_taken && until == before {
            return Ok(());
        }
        self.port_has_taken = self.port.transmit(&mut self.queues, until, &mut self.done);
        #[cfg(debug_assertions)]
        crate::fault_point::panic_if("worker", |frames| tx.counters.frames.get() >= frames);
        Ok(())
    }

    /// Pops rx buffers, as many as the port has use for; says whether there were any.
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

    /// Answers the guest's commands; says whether there were any.
    fn answer(&mut self) -> Result<bool, Fault> {
        self.control.as_mut().map_or(Ok(false), ControlQueue::answer)
    }

    /// Publishes the chains that have completed, and counts their frames; says whether there were any.
    fn publish(&mut self) -> bool {
        if let Some(recorder) = self.capture.recorder() {
            record(&recorder, self.pair, &self.queues, &mut self.done, self.header_length);
        } else if !self.done.captured.is_empty() {
            self.done.captured.clear();
        }
        // First what a guest is given: what a loopback carries is rather sent twice than lost if the
        // process is killed in between.
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
        self.adaptive_poll.note_given(moved.frames, moved.bytes);
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
        // A guest that floods lets its worker never sleep.
        self.spoofing.report(counters);
        self.coalescer.note(moved.frames, completed);
        self.adaptive_poll.note_sent();
        counters.frames.add(moved.frames);
        counters.bytes.add(moved.bytes);
        tx.publish(queue);
        if let Some(kicked) = self.kicked.take() {
            let waited = kicked.elapsed().as_micros() as u64;
            self.status.counters.kick_to_used.observe(waited);
        }
        true
    }

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

    /// Stops the host side; what has completed is shown to the driver, and the rest is as it was.
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
