//! What moves with a guest beside its memory and rings: counters, and how far limits are used up
//! (vhost-user specification, "Device state transfer"). Nothing that the guest could not do without.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use log::info;
use serde::{Deserialize, Serialize};

use super::{Device, Refusal, refused};
use crate::counters::PairCounters;
use crate::policy::limiter::Debt;
use crate::protocol::Reply;
use crate::sys::poll_two;
use crate::sys::socket::set_nonblocking;

/// Changes when a state is not understood any more that was.
const VERSION: u32 = 1;
/// Longest state in bytes.
const MAX_LENGTH: usize = 4 << 20;
/// How long the frontend may take to send or to take it.
const PATIENCE: Duration = Duration::from_secs(2);
/// A reply's flag that the frontend's own descriptor is used.
const NO_DESCRIPTOR: u64 = 0x100;

/// A device's state.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    version: u32,
    #[serde(default)]
    pairs: Vec<PairCounters>,
    #[serde(default)]
    rx_debt: Debt,
    #[serde(default)]
    tx_debt: Debt,
}

/// A transfer under way.
#[derive(Debug)]
pub(super) enum Transfer {
    /// The state comes by this.
    Load(File),
    /// It has been sent, or not.
    Saved(Result<(), String>),
}

impl Device {
    /// Sends the state by the frontend's descriptor, or has it come by that (SET_DEVICE_STATE_FD).
    pub(super) fn transfer_state(&mut self, load: bool, file: File) -> Result<Reply, Refusal> {
        if self.told.rings.iter().any(super::ToldRing::is_running) {
            return refused("the device's state was asked for while rings run");
        }
        set_nonblocking(file.as_fd()).map_err(|error| Refusal::Refused(error.to_string()))?;
        self.told.transfer = Some(if load {
            Transfer::Load(file)
        } else {
            Transfer::Saved(self.save(file).map_err(|error| format!("save: {error}")))
        });
        Ok(Reply::U64(NO_DESCRIPTOR))
    }

    /// Says whether the transfer has succeeded (CHECK_DEVICE_STATE).
    pub(super) fn check_state(&mut self) -> Result<Reply, Refusal> {
        let result = match self.told.transfer.take() {
            None => Err("no transfer has begun".to_owned()),
            Some(Transfer::Saved(result)) => result,
            Some(Transfer::Load(file)) => self.load(file),
        };
        match result {
            Ok(()) => info!("{}: its counters and limits have moved", self.name),
            Err(why) => {
                log::warn!("{}: the device's state does not move: {why}", self.name);
                return Ok(Reply::U64(1));
            }
        }
        Ok(Reply::U64(0))
    }

    fn save(&self, mut file: File) -> io::Result<()> {
        let pairs = self.workers.iter().map(|worker| &worker.status().counters);
        let (rx_debt, tx_debt) =
            self.limits.as_ref().map_or_else(Default::default, |it| (it.rx.debt(), it.tx.debt()));
        let state = serde_json::json!({
            "version": VERSION,
            "pairs": pairs.collect::<Vec<_>>(),
            "rx_debt": rx_debt,
            "tx_debt": tx_debt,
        });
        let text = state.to_string();
        let (mut rest, end) = (text.as_bytes(), Instant::now() + PATIENCE);
        while !rest.is_empty() {
            match file.write(rest) {
                Ok(written) => rest = &rest[written..],
                Err(error) => wait(&file, libc::POLLOUT, error, end)?,
            }
        }
        Ok(())
    }

    fn load(&self, mut file: File) -> Result<(), String> {
        let (mut text, end) = (Vec::new(), Instant::now() + PATIENCE);
        let mut bytes = [0; 4096];
        loop {
            match file.read(&mut bytes) {
                Ok(0) => break,
                Ok(length) if text.len() + length > MAX_LENGTH => {
                    return Err(format!("it has more than {MAX_LENGTH} bytes"));
                }
                Ok(length) => text.extend(&bytes[..length]),
                Err(error) => {
                    wait(&file, libc::POLLIN, error, end).map_err(|it| format!("load: {it}"))?;
                }
            }
        }
        let state: State = serde_json::from_slice(&text).map_err(|error| error.to_string())?;
        if state.version != VERSION {
            return Err(format!("version {} is not understood here, but {VERSION}", state.version));
        }
        for (worker, counters) in self.workers.iter().zip(&state.pairs) {
            // No session runs: its worker counts nothing meanwhile.
            worker.status().counters.add(counters);
        }
        if let Some(limits) = &self.limits {
            limits.rx.owe(&state.rx_debt);
            limits.tx.owe(&state.tx_debt);
        }
        Ok(())
    }
}

/// Waits until a descriptor that would block may not any more.
fn wait(file: &File, events: libc::c_short, error: io::Error, end: Instant) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::Interrupted => return Ok(()),
        io::ErrorKind::WouldBlock => {}
        _ => return Err(error),
    }
    let time = end.saturating_duration_since(Instant::now());
    if time.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    poll_two([(file.as_fd(), events), (file.as_fd(), events)], Some(time)).map(drop)
}
