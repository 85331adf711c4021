//! The budget of open descriptors, which all ports of the process share (RLIMIT_NOFILE).
//!
//! A VMM decides what its port keeps: a descriptor for each memory region, for kick, call and error of
//! each ring, and few others. Invariant, as far as the limit permits: whatever VMMs send, each port can
//! keep its share, and the daemon has what it needs itself. What a port keeps beyond its share comes from
//! what no port's share needs. A request beyond that is refused, so only its sender pays.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Descriptors for the daemon itself: 9, its 32 operators and 8 scrapes, and some to spare.
const RESERVE: usize = 64;
/// Descriptors that a port needs beside those that it keeps for its frontend: its listener twice, two for
/// its thread to wait by and one to announce the card by; the connection, 8 that come with a message
/// (SET_MEM_TABLE), an inflight buffer that is sent, a capture; 6 while it is handed over.
const PORT: usize = 22;
/// The same for a queue pair: its device twice, and once more while it is handed over; io_uring, and two
/// for its thread to wait by. On AF_XDP, a socket and what opening one takes.
const PAIR: usize = 6;
/// The same for a port on AF_XDP: maps, links and sockets of its program and device.
const AF_XDP: usize = 12;
/// A port's share: 8 memory regions, the dirty log, the inflight buffer, the backend's channel, and a
/// device state that comes by a pipe.
const SHARE: usize = 8 + 1 + 1 + 1 + STATE;
/// Descriptors of a device state: the frontend's, and a pipe of ours.
pub const STATE: usize = 3;
/// A queue pair's share: kick, call and error of two rings.
const PAIR_SHARE: usize = 6;
/// What a port may keep in any case, and a queue pair: all that an ordinary guest needs.
const LEAST: usize = 8;
const PAIR_LEAST: usize = 6;

static PROCESS: Budget = Budget::new();

/// The limit, and the ports that share it.
#[derive(Debug)]
struct Budget(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Descriptors that may be open.
    limit: usize,
    /// What the ports needed that the daemon was started with: one that is removed and added again finds
    /// its part, whatever the others have asked for meanwhile.
    started: usize,
    ports: BTreeMap<u64, Needs>,
    next: u64,
}

/// What one port needs, and keeps for its frontend.
#[derive(Debug, Clone, Copy)]
struct Needs {
    own: usize,
    share: usize,
    least: usize,
    kept: usize,
}

impl Needs {
    fn of(pairs: usize, af_xdp: bool) -> Self {
        let own = PORT + pairs * PAIR + if af_xdp { AF_XDP } else { 0 };
        let share = SHARE + pairs * PAIR_SHARE;
        Needs { own, share, least: LEAST + pairs * PAIR_LEAST, kept: 0 }
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
    /// What is left for frontends.
    fn room(&self) -> usize {
        let own: usize = self.ports.values().map(|port| port.own).sum();
        self.limit.saturating_sub(RESERVE + own)
    }

    /// What all shares need.
    fn shares(&self) -> usize {
        self.ports.values().map(|port| port.share).sum()
    }

    /// A port's share of the room: less if there is not enough for all.
    fn share(&self, port: &Needs) -> usize {
        let (room, shares) = (self.room(), self.shares());
        if shares <= room {
            return port.share;
        }
        (port.share * room / shares).max(port.least)
    }

    /// What ports keep or may keep by their shares, but for one, and what removed ports will need.
    fn promised_to_others(&self, port: u64) -> usize {
        let others = self.ports.iter().filter(|(number, _)| **number != port);
        let removed = self.started.saturating_sub(self.need());
        others.map(|(_, port)| port.kept.max(self.share(port))).sum::<usize>() + removed
    }

    fn need(&self) -> usize {
        let own: usize = self.ports.values().map(|port| port.own).sum();
        RESERVE + own + self.shares()
    }
}

/// Sets the number of descriptors that the process may open.
pub fn set_limit(limit: u64) {
    PROCESS.lock().limit = usize::try_from(limit).unwrap_or(usize::MAX);
}

/// The number of descriptors that the process may open.
pub fn limit() -> usize {
    PROCESS.lock().limit
}

/// Notes that all ports are there that the daemon was started with. Returns the number of descriptors that
/// they and the daemon need, if that is more than may be open.
pub fn started() -> Option<usize> {
    let mut state = PROCESS.lock();
    state.started = state.need();
    Some(state.started).filter(|need| *need > state.limit)
}

/// The number of descriptors that the daemon needs for ports with their shares, each with so many queue
/// pairs, and on AF_XDP or not.
pub fn need(ports: impl Iterator<Item = (usize, bool)>) -> usize {
    let each = ports.map(|(pairs, af_xdp)| Needs::of(pairs, af_xdp));
    RESERVE + each.map(|needs| needs.own + needs.share).sum::<usize>()
}

/// Says whether there is room for another port and its share.
///
/// # Errors
/// [`TooMany`].
pub fn check_room(pairs: usize, af_xdp: bool) -> Result<(), TooMany> {
    PROCESS.lock().check_room(Needs::of(pairs, af_xdp), None)
}

impl State {
    /// As [`check_room`], for a port that takes the place of `replaced`, if that is given.
    fn check_room(&self, port: Needs, replaced: Option<u64>) -> Result<(), TooMany> {
        let others = || {
            let others = self.ports.iter().filter(|(number, _)| Some(**number) != replaced);
            others.map(|(_, port)| port)
        };
        let kept: usize = others().map(|it| it.kept.max(it.share)).sum();
        let own: usize = others().map(|it| it.own).sum();
        let need = RESERVE + own + kept + port.own + port.share;
        let most = self.limit.max(self.started);
        if need <= most { Ok(()) } else { Err(TooMany { limit: self.limit, need }) }
    }
}

/// More descriptors are needed than may be open.
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

/// A port's part of the budget, for as long as it lives.
#[derive(Debug)]
pub struct DescriptorQuota {
    budget: &'static Budget,
    number: u64,
    refused: AtomicU64,
}

impl DescriptorQuota {
    /// That of a port with `pairs` queue pairs.
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

    /// As [`check_room`], for a port that takes this one's place.
    ///
    /// # Errors
    /// [`TooMany`].
    pub fn check_replacement(&self, pairs: usize, af_xdp: bool) -> Result<(), TooMany> {
        self.budget.lock().check_room(Needs::of(pairs, af_xdp), Some(self.number))
    }

    /// Has the port keep so many descriptors for its frontend.
    ///
    /// # Errors
    /// These are more than it may keep, and more than it keeps now. Nothing changes.
    pub fn keep(&self, descriptors: usize) -> Result<(), String> {
        let mut state = self.budget.lock();
        let port = state.ports[&self.number];
        let share = state.share(&port);
        if descriptors > port.kept.max(share)
            && state.promised_to_others(self.number).saturating_add(descriptors) > state.room()
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

    /// Descriptors that the port keeps for its frontend.
    pub fn kept(&self) -> usize {
        self.budget.lock().ports[&self.number].kept
    }

    /// Requests that were refused so far.
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
        let room = 1024 - RESERVE - 2 * (PORT + PAIR);
        let share = SHARE + PAIR_SHARE;
        greedy.keep(room - share).unwrap();
        assert!(greedy.keep(room - share + 1).unwrap_err().contains("its share is"));
        assert_eq!((greedy.kept(), greedy.refused()), (room - share, 1));
        quiet.keep(share).unwrap();
        assert!(quiet.keep(share + 1).is_err());
        greedy.keep(room - share - 1).unwrap();
        quiet.keep(share + 1).unwrap();
        drop(quiet);
        greedy.keep(room + PORT + PAIR).unwrap();
    }

    #[test]
    fn without_room_for_all_shares_each_port_has_less() {
        let budget = budget(RESERVE + 10 * (PORT + PAIR) + 100);
        let ports: Vec<_> = (0..10).map(|_| port(budget)).collect();
        assert!(ports.iter().all(|port| port.keep(LEAST + PAIR_LEAST).is_ok()));
        assert!(ports.iter().all(|port| port.keep(LEAST + PAIR_LEAST + 1).is_err()));
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
