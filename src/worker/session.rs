//! A session of a worker: turns, and the sleep between them.

use std::time::{Duration, Instant};

use log::{debug, error, info, warn};

use super::control_queue::ControlQueue;
use super::naps::Naps;
use super::recording::record;
use super::replies::Replies;
use super::sleeper::{Sleeper, Woken};
use super::spoofing::SpoofingLog;
use super::{Ended, Mailbox, Ring, RingState, Session, WorkerOptions};
use crate::capture::Capture;
use crate::counters::{DirectionCounters, Drop};
use crate::guest::{
    Budget, Burst, Direction, Fault, GuestMemory, Published, Readable, Virtqueue, Writable,
};
use crate::policy::{Limiter, Limits};
use crate::port::{Finished, HostQueue, Outcome, Port, Terms};
use crate::status::PairStatus;
use crate::vnet_header::LINK_OVERHEAD;

/// What one turn takes from the tx ring: so many small frames take as long as so many bytes do, some 50 µs.
const TX_BUDGET: Budget = Budget { chains: 64, bytes: 1 << 20 };
/// What one turn takes from the rx ring: empty buffers cost nothing but the walk.
const RX_BUDGET: Budget = Budget { chains: 64, bytes: usize::MAX };
/// How long a limit is waited for at the most, since it may be changed meanwhile.
const LIMIT_CHANGES: Duration = Duration::from_millis(100);
/// How long a worker that cannot wait does nothing, so that it does not spin.
const PAUSE: Duration = Duration::from_millis(10);

/// One direction of the pair: its ring, and what was popped from it and not yet lent.
struct Side<'s, D: Direction> {
    ring: &'s Ring,
    queue: Virtqueue<'s, D>,
    burst: Burst<'s, D>,
    /// How many of these the port's limit has let pass already.
    passed: usize,
    /// Segments, beyond the first of each frame, that the limit has counted in advance.
    foreseen: u64,
    counters: &'s DirectionCounters,
    /// Whether the card's link is up.
    link: bool,
}

impl<'s, D: Direction> Side<'s, D> {
    fn start(
        name: &str,
        session: &'s Session,
        index: u16,
        ring: &'s Option<Ring>,
        counters: &'s DirectionCounters,
    ) -> Result<Option<Self>, Fault> {
        let Some(ring) = ring else { return Ok(None) };
        let notification = session.negotiated.notification();
        let mut queue = Virtqueue::start(&session.memory, ring.layout, notification)?;
        queue.note_inflight(index);
        let used = queue.next_used();
        if used != ring.base {
            // cloud-hypervisor counts by the avail index, which would skip chains in flight.
            info!(
                "{name}: ring base {} differs from the used index, resuming at {used}",
                ring.base
            );
        }
        let (burst, link) = (Burst::new(), session.link);
        Ok(Some(Side { ring, queue, burst, passed: 0, foreseen: 0, counters, link }))
    }

    /// Whether its frames move.
    fn is_enabled(&self) -> bool {
        self.ring.state == RingState::Enabled && self.link
    }

    /// Shows the driver what was retired, and calls it if it asked for that.
    fn publish(&mut self) {
        match self.queue.publish() {
            Published::Nothing => {}
            Published::Call if self.ring.call.signal() => self.counters.calls.add(1),
            Published::Call | Published::Quietly => self.counters.calls_suppressed.add(1),
        }
    }
}

/// Everything of a running session.
struct Serving<'s> {
    rx: Option<Side<'s, Writable>>,
    tx: Option<Side<'s, Readable>>,
    control: Option<ControlQueue<'s>>,
    port: Box<dyn Port<'s> + 's>,
    finished: Finished<'s>,
    memory: &'s GuestMemory,
    status: &'s PairStatus,
    /// When a kick for frames from the guest woke the worker, which are not used yet.
    kicked: Option<Instant>,
    header_length: usize,
    mtu: u16,
    limits: &'s Limits,
    capture: &'s Capture,
    pair: u16,
    /// Frames for the guest that the port was told to take each time.
    rx_allowance: usize,
    naps: Naps,
    replies: Replies,
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
    let sides = Side::start(name, session, first, &session.rx, &counters.rx)
        .and_then(|rx| Ok((rx, Side::start(name, session, first + 1, &session.tx, &counters.tx)?)));
    let sides = sides.and_then(|(rx, tx)| Ok((rx, tx, ControlQueue::start(session)?)));
    let (rx, tx, control) = match sides {
        Ok(sides) => sides,
        Err(fault) => return stopped(session, options, &fault, Ended::default()),
    };
    let terms = Terms {
        negotiated: session.negotiated,
        mtu: session.mtu,
        link: session.link,
        receives: rx.as_ref().is_some_and(Side::is_enabled),
        rx_size: session.rx.as_ref().map_or(0, |ring| ring.layout.size),
        rules: session.rules.clone(),
        tx_filter: options.tx_filter.clone(),
        tally: options.tally.clone(),
        capture: options.capture.clone(),
    };
    let port = host.session(&session.memory, &terms);
    let header_length = session.negotiated.header_length();
    let sizes = [&session.rx, &session.tx].into_iter().flatten().map(|ring| ring.layout.size);
    let smaller = sizes.min().unwrap_or(0);
    let finished = Finished::default();
    let memory = &*session.memory;
    let limits = &*options.limits;
    let mut serving = Serving {
        rx,
        tx,
        control,
        port,
        finished,
        memory,
        status,
        kicked: None,
        header_length,
        mtu: session.mtu,
        limits,
        capture: &options.capture,
        pair: options.pair,
        rx_allowance: usize::MAX,
        naps: Naps::new(smaller),
        replies: Replies::new(),
        spoofing,
    };
    let result = serving.turn_until_command(options, mailbox);
    serving.surrender();
    let ended = Ended {
        rx: serving.rx.as_ref().map(|side| side.queue.next_used()),
        tx: serving.tx.as_ref().map(|side| side.queue.next_used()),
        control: serving.control.as_ref().map(ControlQueue::next_used),
        fault: None,
    };
    match result {
        Ok(()) => ended,
        Err(fault) => stopped(session, options, &fault, ended),
    }
}

/// The guest broke its rings: says so in the log and to the frontend.
fn stopped(session: &Session, options: &WorkerOptions, fault: &Fault, ended: Ended) -> Ended {
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

impl Serving<'_> {
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
        let mut sleeper = loop {
            match Sleeper::new(rings, self.port.events(), mailbox) {
                Ok(sleeper) => break sleeper,
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
            if moved || self.look_on(options.busy_poll, mailbox)? || self.nap() || self.arm()? {
                continue;
            }
            self.status.counters.sleeps.add(1);
            self.status.set_mode(self.port.mode());
            if self.tx.as_ref().is_some_and(|tx| tx.burst.is_empty()) {
                // What the last kick was for has been seen to before.
                self.kicked = None;
            }
            let told = self.spoofing.report(&self.status.counters.tx);
            let mut readiness = self.port.readiness();
            let timeouts = readiness.timeout.into_iter().chain(self.held_back()).chain(told);
            readiness.timeout = timeouts.min();
            let woken = sleeper.sleep(&readiness, mailbox).unwrap_or_else(|error| {
                debug!("{}: waiting failed: {error}", options.name);
                std::thread::sleep(PAUSE);
                Woken::default()
            });
            self.note(woken);
        }
        Ok(())
    }

    /// One turn: lends, reaps, retires, publishes. Says whether anything moved.
    fn turn(&mut self) -> Result<bool, Fault> {
        if self.memory.is_lost() {
            return Err(Fault::MemoryLost);
        }
        let mut moved = false;
        if let Some(tx) = self.tx.as_mut().filter(|tx| tx.ring.state != RingState::Waiting) {
            if tx.burst.is_empty() {
                tx.queue.pop(&mut tx.burst, TX_BUDGET)?;
            }
            if !tx.burst.is_empty() {
                tx.queue.disarm();
                if tx.is_enabled() {
                    let mtu = usize::from(self.mtu);
                    transmit(&mut *self.port, tx, &self.limits.tx, self.header_length, mtu);
                    #[cfg(debug_assertions)]
                    crate::fault_point::panic_if("worker", |frames| {
                        tx.counters.frames.get() >= frames
                    });
                } else {
                    let reason = if tx.link { Drop::Disabled } else { Drop::LinkDown };
                    let dropped = Outcome::Dropped(reason);
                    self.finished.tx.extend(tx.burst.drain(..).map(|chain| (chain, dropped)));
                }
            }
        }
        if let Some(rx) = self.rx.as_mut().filter(|rx| rx.is_enabled()) {
            if rx.burst.is_empty() {
                moved |= rx.queue.pop(&mut rx.burst, RX_BUDGET)? > 0;
            }
            if !rx.burst.is_empty() {
                rx.queue.disarm();
                self.port.post(&mut rx.burst);
            }
        }
        let limited = self.limits.rx.is_limited();
        if limited || self.rx_allowance != usize::MAX {
            let before = self.rx_allowance;
            self.rx_allowance = if limited { self.limits.rx.allowance() } else { usize::MAX };
            if self.rx_allowance == 0 && before > 0 {
                self.status.counters.rx.limited.add(1);
            }
            self.port.limit_rx(self.rx_allowance);
        }
        self.port.reap(&mut self.finished);
        self.charge();
        moved |= self.retire();
        if moved {
            self.status.counters.turns.add(1);
            self.status.set_mode(self.port.mode());
        }
        Ok(moved)
    }

    /// Answers the guest's commands; says whether there were any.
    fn answer(&mut self) -> Result<bool, Fault> {
        self.control.as_mut().map_or(Ok(false), ControlQueue::answer)
    }

    /// Counts, towards the port's limits, what is known of frames only now: those for the guest,
    /// and the segments of those from it.
    fn charge(&mut self) {
        let Finished { rx_frames, rx_bytes, rx_surplus, tx_surplus, .. } = &mut self.finished;
        let (rx, tx) = (std::mem::take(rx_surplus), std::mem::take(tx_surplus));
        if self.limits.rx.is_limited() && *rx_frames > 0 {
            self.limits.rx.charge(*rx_frames + rx.packets, *rx_bytes + rx.bytes);
        }
        if let Some(side) = self.tx.as_mut().filter(|_| self.limits.tx.is_limited()) {
            let foreseen = side.foreseen.min(tx.packets);
            side.foreseen -= foreseen;
            if tx.packets > 0 {
                self.limits.tx.charge(tx.packets - foreseen, tx.bytes);
            }
            if side.burst.is_empty() {
                // What is left was foreseen for frames that were dropped.
                side.foreseen = 0;
            }
        }
    }

    /// How long a limit still holds back what it has held back in this turn.
    fn held_back(&self) -> Option<Duration> {
        let limits = self.limits;
        let tx = self.tx.as_ref().is_some_and(|tx| tx.burst.len() > tx.passed);
        let tx = (tx && limits.tx.is_limited()).then(|| limits.tx.wait());
        let rx = (self.rx_allowance == 0).then(|| limits.rx.wait());
        tx.into_iter().chain(rx).min().map(|wait| wait.min(LIMIT_CHANGES))
    }

    /// Writes used entries for everything that has finished, and publishes each ring once.
    fn retire(&mut self) -> bool {
        let finished = &mut self.finished;
        if let Some(recorder) = self.capture.recorder() {
            record(&recorder, self.pair, finished, self.header_length);
        } else if !finished.tx_starts.is_empty() {
            finished.tx_starts.clear();
        }
        let mut moved = false;
        // First what a guest is given: what a loopback carries is rather sent twice than lost if the
        // process is killed in between.
        if let Some(rx) = self.rx.as_mut().filter(|_| !finished.rx.is_empty()) {
            moved = true;
            let retired = finished.rx.len();
            rx.counters.bursts.observe(retired as u64);
            for (chain, written) in finished.rx.drain(..) {
                rx.queue.retire(chain, written);
            }
            self.naps.note(finished.rx_frames, retired);
            self.replies.note_given(finished.rx_frames, finished.rx_bytes);
            rx.counters.frames.add(std::mem::take(&mut finished.rx_frames));
            rx.counters.bytes.add(std::mem::take(&mut finished.rx_bytes));
            rx.publish();
        }
        if let Some(tx) = self.tx.as_mut().filter(|_| !finished.tx.is_empty()) {
            moved = true;
            let (mut frames, mut bytes) = (0, 0);
            let retired = finished.tx.len();
            tx.counters.bursts.observe(retired as u64);
            for (chain, outcome) in finished.tx.drain(..) {
                match outcome {
                    Outcome::Sent => {
                        frames += 1;
                        bytes += (chain.len() - self.header_length) as u64;
                    }
                    Outcome::Dropped(reason) => {
                        tx.counters.dropped(reason, 1);
                        self.spoofing.note(reason);
                    }
                }
                tx.queue.retire(chain, 0);
            }
            // A guest that floods lets its worker never sleep.
            self.spoofing.report(tx.counters);
            self.naps.note(frames, retired);
            self.replies.note_sent();
            tx.counters.frames.add(frames);
            tx.counters.bytes.add(bytes);
            tx.publish();
            if let Some(kicked) = self.kicked.take() {
                let waited = kicked.elapsed().as_micros() as u64;
                self.status.counters.kick_to_used.observe(waited);
            }
        }
        for (reason, frames) in finished.rx_dropped.drain(..) {
            moved = true;
            self.status.counters.rx.dropped(reason, frames);
        }
        for (copied, counters) in [
            (&mut finished.rx_copied, &self.status.counters.rx),
            (&mut finished.tx_copied, &self.status.counters.tx),
        ] {
            copied.drain(..).for_each(|reason| counters.copied(reason, 1));
        }
        moved
    }

    /// Turns for a while in which nothing may move; says whether something did.
    fn look_on(&mut self, time: Option<Duration>, mailbox: &Mailbox) -> Result<bool, Fault> {
        match time {
            None => self.look_for_reply(mailbox),
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
    fn look_for_reply(&mut self, mailbox: &Mailbox) -> Result<bool, Fault> {
        let Some(tx) = self.tx.as_mut().filter(|tx| tx.is_enabled()) else { return Ok(false) };
        let Some(end) = self.replies.begin() else { return Ok(false) };
        tx.queue.disarm();
        let mut moved = false;
        while !self.replies.have_come() && Instant::now() < end && !mailbox.has_command() {
            self.port.woken(true);
            moved |= self.turn()?;
            // Whoever waits for this processor may be the one who answers.
            std::thread::yield_now();
        }
        self.replies.end();
        let counters = &self.status.counters;
        counters.looks.add(1);
        counters.replies.add(self.replies.have_come().into());
        Ok(moved)
    }

    /// Takes a nap, if that pays; says whether it did.
    fn nap(&mut self) -> bool {
        let rested = self.naps.take();
        if rested {
            self.status.counters.naps.add(1);
            self.port.woken(true);
        }
        rested
    }

    /// Asks the driver for kicks where they are of use; says whether it has been faster.
    ///
    /// A ring whose burst waits for the port needs none: the port's readiness wakes the worker.
    /// Nor does the rx ring while the port has buffers enough.
    fn arm(&mut self) -> Result<bool, Fault> {
        let starved = self.port.readiness().starved;
        let mut more = false;
        let waiting = RingState::Waiting;
        let tx = self.tx.as_mut().filter(|tx| tx.burst.is_empty() && tx.ring.state != waiting);
        if let Some(tx) = tx {
            more |= tx.queue.arm()?;
        }
        let rx = self.rx.as_mut().filter(|rx| rx.is_enabled() && rx.burst.is_empty() && starved);
        if let Some(rx) = rx {
            self.status.counters.starved.add(1);
            more |= rx.queue.arm()?;
        }
        if let Some(control) = &mut self.control {
            more |= control.arm()?;
        }
        Ok(more)
    }

    fn note(&mut self, woken: Woken) {
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

    /// Ends the host side; what was not used goes back, what was is shown to the driver.
    fn surrender(&mut self) {
        self.port.recall(&mut self.finished);
        self.retire();
        let (unused_tx, unused_rx) = (
            std::mem::take(&mut self.finished.unused_tx),
            std::mem::take(&mut self.finished.unused_rx),
        );
        if let Some(tx) = &mut self.tx {
            for chain in unused_tx.into_iter().chain(tx.burst.drain(..)) {
                tx.queue.take_back(chain);
            }
        }
        if let Some(rx) = &mut self.rx {
            for chain in unused_rx.into_iter().chain(rx.burst.drain(..)) {
                rx.queue.take_back(chain);
            }
        }
    }
}

/// Lends the port as much of the burst as the port's limit lets pass.
fn transmit<'s>(
    port: &mut dyn Port<'s>,
    tx: &mut Side<'s, Readable>,
    limiter: &Limiter,
    header_length: usize,
    mtu: usize,
) {
    if !limiter.is_limited() {
        tx.passed = 0;
        return port.transmit(&mut tx.burst);
    }
    // Segments have the MTU, as a rule. How many there are is known when the header was checked.
    let packets = |bytes: usize| {
        if bytes <= mtu + LINK_OVERHEAD { 1 } else { bytes.div_ceil(mtu) as u64 }
    };
    let lengths = tx.burst.iter().map(|chain| chain.len().saturating_sub(header_length));
    let lengths = lengths.skip(tx.passed);
    let admitted = limiter.admit(lengths.clone().map(|bytes| (packets(bytes), bytes as u64)));
    tx.foreseen += lengths.take(admitted).map(|bytes| packets(bytes) - 1).sum::<u64>();
    tx.passed += admitted;
    if tx.passed == 0 {
        return;
    }
    let mut rest = tx.burst.split_off(tx.passed);
    port.transmit(&mut tx.burst);
    tx.passed = tx.burst.len();
    if !rest.is_empty() {
        tx.counters.limited.add(1);
        tx.burst.append(&mut rest);
    }
}
