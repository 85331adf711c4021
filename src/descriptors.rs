//! The budget of open descriptors, which all ports of the process share (RLIMIT_NOFILE).
//!
//! A VMM determines the descriptors that its port keeps: one for each memory region, three for each ring (kick, call,
//! error), and few others.
//!
//! Invariant, as far as the limit permits: whatever VMMs send, each port can keep its share, and the daemon has the
//! descriptors that it needs itself. Beyond its share, a port gets descriptors that no port's share needs. The daemon
//! refuses a request beyond these, so only the VMM that sent it is affected.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Descriptors of the daemon itself: 9 that are always open, 32 operators, 8 scrapes, and a reserve of 15.
const RESERVE: usize = 64;
/// Descriptors that a port needs beside those that it keeps for its frontend. These are the listener twice, two for
/// the control thread's wait, one for announcements of the guest, the connection, 8 of one message (SET_MEM_TABLE),
/// an inflight buffer to send, a capture, and 6 during a take-over.
const PORT: usize = 22;
/// Descriptors that a queue pair needs beside those that the port keeps for its frontend. These are the device twice,
/// and once more during a take-over, io_uring, and two for the worker's wait. On AF_XDP, they are a socket and those
/// that opening it takes.
const PAIR: usize = 6;
/// Further descriptors of a port on AF_XDP: maps, links and sockets of its program and device.
const AF_XDP: usize = 12;
/// Share of a port: 8 memory regions, the dirty log, the inflight buffer, the backend channel, and a device state
/// that comes by a pipe.
const SHARE: usize = 8 + 1 + 1 + 1 + STATE;
/// Descriptors of a device state: the frontend's, and both ends of the daemon's own pipe.
pub const STATE: usize = 3;
/// Share of a queue pair: kick, call and error of two rings.
const PAIR_SHARE: usize = 6;
/// Descriptors that a port may always keep. With those of its queue pairs they suffice for an ordinary guest.
const MIN_SHARE: usize = 8;
/// Descriptors that a port may always keep for each queue pair.
const MIN_PAIR_SHARE: usize = 6;

static PROCESS: Budget = Budget::new();

/// The limit, and the ports that share it.
#[derive(Debug)]
struct Budget(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Highest number of open descriptors.
    limit: usize,
    /// Needs of the daemon and of the ports that it was started with. A port of these that is removed finds its part
    /// when it is added again, whatever the other ports have requested meanwhile.
    started: usize,
    ports: BTreeMap<u64, Needs>,
    next: u64,
}

/// Numbers of descriptors of one port.
#[derive(Debug, Clone, Copy)]
struct Needs {
    /// Descriptors that the port needs beside those that it keeps for its frontend.
    own: usize,
    /// Descriptors that the port may keep for its frontend if the limit suffices for all shares.
    share: usize,
    /// Descriptors that the port may always keep for its frontend.
    min_share: usize,
    /// Descriptors that the port keeps for its frontend now.
    kept: usize,
}

impl Needs {
    fn of(pairs: usize, af_xdp: bool) -> Self {
        let own = PORT + pairs * PAIR + if af_xdp { AF_XDP } else { 0 };
        let share = SHARE + pairs * PAIR_SHARE;
        Needs { own, share, min_share: MIN_SHARE + pairs * MIN_PAIR_SHARE, kept: 0 }
    }
}

impl Budget {
    const fn new() -> Self {
        let ports = BTreeMap::new();
        Budget(Mutex::new(State { limit: usize::MAX, started: 0, ports, next: 0 }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Returns the number of descriptors for all frontends together.
    fn available(&self) -> usize {
        let own: usize = self.ports.values().map(|port| port.own).sum();
        self.limit.saturating_sub(RESERVE + own)
    }

    /// Returns the sum of all shares.
    fn shares(&self) -> usize {
        self.ports.values().map(|port| port.share).sum()
    }

    /// Returns a port's share, in proportion if there are not enough descriptors for all shares.
    fn share(&self, port: &Needs) -> usize {
        let (available, shares) = (self.available(), self.shares());
        if shares <= available {
            return port.share;
        }
        (port.share * available / shares).max(port.min_share)
    }

    /// Returns the number of descriptors that the other ports keep or may keep by their shares, and that removed ports
    /// of the start will need.
    fn reserved_for_others(&self, port: u64) -> usize {
        let others = self.ports.iter().filter(|(number, _)| **number != port);
        let removed = self.started.saturating_sub(self.need());
        others.map(|(_, port)| port.kept.max(self.share(port))).sum::<usize>() + removed
    }

    /// Returns the number of descriptors that the daemon and all ports with their shares need.
    fn need(&self) -> usize {
        let own: usize = self.ports.values().map(|port| port.own).sum();
        RESERVE + own + self.shares()
    }
}

/// Sets the number of descriptors that the process may open.
pub fn set_limit(limit: u64) {
    PROCESS.lock().limit = usize::try_from(limit).unwrap_or(usize::MAX);
}

/// Returns the number of descriptors that the process may open.
pub fn limit() -> usize {
    PROCESS.lock().limit
}

/// Notes that all ports of the daemon's start have been added. Returns the number of descriptors that the daemon and
/// these ports need, if the limit is lower.
pub fn started() -> Option<usize> {
    let mut state = PROCESS.lock();
    state.started = state.need();
    Some(state.started).filter(|need| *need > state.limit)
}

/// Returns the number of descriptors that the daemon needs for ports with their shares. Each item is a port's number of
/// queue pairs, and true for AF_XDP.
pub fn need(ports: impl Iterator<Item = (usize, bool)>) -> usize {
    let each = ports.map(|(pairs, af_xdp)| Needs::of(pairs, af_xdp));
    RESERVE + each.map(|needs| needs.own + needs.share).sum::<usize>()
}

/// Checks that the limit suffices for another port and its share.
///
/// # Errors
/// [`TooMany`], if the limit is too low.
pub fn check_room(pairs: usize, af_xdp: bool) -> Result<(), TooMany> {
    PROCESS.lock().check_room(Needs::of(pairs, af_xdp), None)
}

impl State {
    /// Checks as [`check_room`] does, for a port that replaces port `replaced`, if given.
    fn check_room(&self, port: Needs, replaced: Option<u64>) -> Result<(), TooMany> {
        let others = || {
            let others = self.ports.iter().filter(|(number, _)| Some(**number) != replaced);
            others.map(|(_, port)| port)
        };
        let kept: usize = others().map(|it| it.kept.max(it.share)).sum();
        let own: usize = others().map(|it| it.own).sum();
        let need = RESERVE + own + kept + port.own + port.share;
        let limit = self.limit.max(self.started);
        if need <= limit { Ok(()) } else { Err(TooMany { limit: self.limit, need }) }
    }
}

/// Error: the limit of open descriptors is lower than the need.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooMany {
    limit: usize,
    need: usize,
}

impl fmt::Display for TooMany {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TooMany { limit, need } = self;
        write!(
            f,
            "{limit} descriptors may be open, and the ports need {need} with this one; restart the \
             daemon with LimitNOFILE={need} (ulimit -n), or remove another port"
        )
    }
}

/// A port's part of the budget, which is freed on drop.
#[derive(Debug)]
pub struct DescriptorQuota {
    budget: &'static Budget,
    number: u64,
    refused: AtomicU64,
}

impl DescriptorQuota {
    /// Adds a port with `pairs` queue pairs to the budget.
    pub fn new(pairs: usize, af_xdp: bool) -> Self {
        Self::within(&PROCESS, Needs::of(pairs, af_xdp))
    }

    fn within(budget: &'static Budget, needs: Needs) -> Self {
        let mut state = budget.lock();
        let number = state.next;
        state.next += 1;
        state.ports.insert(number, needs);
        DescriptorQuota { budget, number, refused: AtomicU64::new(0) }
    }

    /// Checks as [`check_room`] does, for a port that replaces this one.
    ///
    /// # Errors
    /// [`TooMany`], if the limit is too low.
    pub fn check_replacement(&self, pairs: usize, af_xdp: bool) -> Result<(), TooMany> {
        self.budget.lock().check_room(Needs::of(pairs, af_xdp), Some(self.number))
    }

    /// Sets the number of descriptors that the port keeps for its frontend.
    ///
    /// # Errors
    /// The number is higher than the present one, than the port's share, and than the other ports' shares permit. The
    /// present number stays.
    pub fn keep(&self, descriptors: usize) -> Result<(), String> {
        let mut state = self.budget.lock();
        let port = state.ports[&self.number];
        let share = state.share(&port);
        if descriptors > port.kept.max(share)
            && state.reserved_for_others(self.number).saturating_add(descriptors)
                > state.available()
        {
            self.refused.fetch_add(1, Ordering::Relaxed);
            return Err(format!(
                "the port would keep {descriptors} descriptors for its VMM, its share is {share}, and \
                 the rest is other ports'; restart the daemon with a larger LimitNOFILE= (ulimit -n)"
            ));
        }
        state.ports.insert(self.number, Needs { kept: descriptors, ..port });
        Ok(())
    }

    /// Returns the number of descriptors that the port keeps for its frontend.
    pub fn kept(&self) -> usize {
        self.budget.lock().ports[&self.number].kept
    }

    /// Returns the number of requests that [`keep`](Self::keep) has refused.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

impl Drop for DescriptorQuota {
    fn drop(&mut self) {
        self.budget.lock().ports.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(limit: usize) -> &'static Budget {
        let budget = Box::leak(Box::new(Budget::new()));
        budget.lock().limit = limit;
        budget
    }

    fn port(budget: &'static Budget) -> DescriptorQuota {
        DescriptorQuota::within(budget, Needs::of(1, false))
    }

    #[test]
    fn no_port_takes_anothers_share() {
        let budget = budget(1024);
        let (greedy, quiet) = (port(budget), port(budget));
        let available = 1024 - RESERVE - 2 * (PORT + PAIR);
        let share = SHARE + PAIR_SHARE;
        greedy.keep(available - share).unwrap();
        assert!(greedy.keep(available - share + 1).unwrap_err().contains("its share is"));
        assert_eq!((greedy.kept(), greedy.refused()), (available - share, 1));
        quiet.keep(share).unwrap();
        assert!(quiet.keep(share + 1).is_err());
        greedy.keep(available - share - 1).unwrap();
        quiet.keep(share + 1).unwrap();
        drop(quiet);
        greedy.keep(available + PORT + PAIR).unwrap();
    }

    #[test]
    fn a_low_limit_reduces_all_shares() {
        let budget = budget(RESERVE + 10 * (PORT + PAIR) + 100);
        let ports: Vec<_> = (0..10).map(|_| port(budget)).collect();
        assert!(ports.iter().all(|port| port.keep(MIN_SHARE + MIN_PAIR_SHARE).is_ok()));
        assert!(ports.iter().all(|port| port.keep(MIN_SHARE + MIN_PAIR_SHARE + 1).is_err()));
        let state = budget.lock();
        assert!(state.need() > state.limit);
        assert!(state.check_room(Needs::of(1, false), None).is_err());
    }

    #[test]
    fn a_port_that_is_added_again_finds_its_part() {
        for limit in [300, 1024] {
            let budget = budget(limit);
            let (greedy, quiet, _third) = (port(budget), port(budget), port(budget));
            let started = budget.lock().need();
            budget.lock().started = started;
            drop(quiet);
            (0..limit).for_each(|descriptors| drop(greedy.keep(descriptors)));
            assert_eq!(budget.lock().check_room(Needs::of(1, false), None), Ok(()));
            let _quiet = port(budget);
            assert!(budget.lock().check_room(Needs::of(1, false), None).is_err());
        }
    }
}
