//! The sessions that follow from the frontend's state. Sessions end before the state changes, and begin from the
//! new state.

use log::warn;

use super::ring::VringState;
use super::{Answer, Device};
use crate::worker::{self, Ended, Session};

impl Device {
    /// Stops all rings.
    pub(super) fn stop_all(&mut self) {
        self.end_all();
        self.frontend.rings.iter_mut().for_each(VringState::stop);
    }

    /// Stops all rings, and disables them.
    pub(super) fn disable_all(&mut self) -> Answer {
        self.stop_all();
        for ring in &mut self.frontend.rings {
            ring.enabled = Some(false);
        }
        Ok(None)
    }

    /// Ends all sessions, and records the next index of their rings.
    pub(super) fn end_all(&mut self) {
        let ended = worker::end_all(&mut self.workers);
        ended.into_iter().enumerate().for_each(|(pair, ended)| self.record_end(pair, ended));
    }

    /// Ends all sessions, and begins those that the frontend's state requires.
    pub(super) fn restart_all(&mut self) {
        self.end_all();
        (0..self.workers.len()).for_each(|pair| self.begin(pair));
    }

    /// Ends the session of a ring's queue pair, and begins the one that the frontend's state requires.
    pub(super) fn restart(&mut self, index: u32) {
        let pair = self.pair_of(index as usize);
        self.end(pair);
        self.begin(pair);
    }

    /// Ends the session of a queue pair, and records the next index of its rings.
    pub(super) fn end(&mut self, pair: usize) {
        let ended = self.workers[pair].end();
        self.record_end(pair, ended);
    }

    fn record_end(&mut self, pair: usize, ended: Ended) {
        let control = self.control_ring();
        let data = [(2 * pair, ended.rx), (2 * pair + 1, ended.tx)];
        let data = data.into_iter().filter(|(index, _)| Some(*index) != control);
        let control = control.filter(|_| pair == 0).map(|index| (index, ended.control));
        for (index, next) in data.chain(control) {
            let ring = &mut self.frontend.rings[index];
            ring.base = next.unwrap_or(ring.base);
            if ended.fault.is_some() {
                ring.fault.clone_from(&ended.fault);
            }
        }
    }

    /// Begins the session that the frontend's state requires, if a ring of the pair runs.
    pub(super) fn begin(&mut self, pair: usize) {
        let Some(negotiated) = self.frontend.features.filter(|_| !self.suspended) else { return };
        let control = self.control_ring();
        let mut ring = |index: usize| {
            self.frontend.rings[index].session(&self.frontend.memory, &negotiated, |why| {
                warn!("{}: ring {index} cannot start: {why}", self.name);
            })
        };
        let [rx, tx] = [2 * pair, 2 * pair + 1]
            .map(|index| if Some(index) == control { None } else { ring(index) });
        let control = control.filter(|_| pair == 0).and_then(ring);
        if rx.is_none() && tx.is_none() && control.is_none() {
            return;
        }
        let session = Session {
            pairs: self.workers.len() as u16,
            memory: self.frontend.memory.clone(),
            negotiated,
            mtu: self.mtu(),
            link: self.config.link,
            rules: self.anti_spoofing.clone(),
            rx,
            tx,
            control,
        };
        self.workers[pair].begin(session);
    }
}
