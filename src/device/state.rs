//! The device state that migrates with a guest: counters, and the debt of rate limits (vhost-user specification,
//! "Device state transfer"). The guest runs without it too.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use log::{info, warn};
use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::{Device, Refusal, refused};
use crate::counters::PairCounters;
use crate::net_config::MAX_QUEUE_PAIRS;
use crate::policy::limiter::Debt;
use crate::protocol::Reply;
use crate::sys::poll_two;
use crate::sys::stream::ForeignStream;

/// Version of the format; it changes when older daemons' states cannot be read any more.
const VERSION: u32 = 1;
/// Longest state of a queue pair in bytes. About 2 KiB is usual; 5 KiB if each number has 20 digits.
const MAX_PAIR_LENGTH: usize = 8 << 10;
/// Longest state in bytes, of a port with the most queue pairs.
const MAX_LENGTH: usize = MAX_PAIR_LENGTH * (1 + MAX_QUEUE_PAIRS as usize);
/// Time in which the frontend must send or read the state; the control thread waits meanwhile. A pipe holds a
/// whole state, so a frontend that follows the protocol causes no wait.
const TRANSFER_TIMEOUT: Duration = Duration::from_millis(500);
/// Flag of the reply: the daemon uses the frontend's descriptor, and sends none.
const NO_DESCRIPTOR: u64 = 0x100;

/// State of a device.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    version: u32,
    #[serde(default)]
    pairs: Pairs,
    #[serde(default)]
    rx_debt: Debt,
    #[serde(default)]
    tx_debt: Debt,
}

/// Counters of queue pairs, at most [`MAX_QUEUE_PAIRS`].
#[derive(Debug, Default, Serialize)]
#[serde(transparent)]
struct Pairs(Vec<PairCounters>);

impl<'de> Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Reader;

        impl<'de> Visitor<'de> for Reader {
            type Value = Pairs;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {MAX_QUEUE_PAIRS} queue pairs")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = list.next_element()? {
                    if pairs.len() >= usize::from(MAX_QUEUE_PAIRS) {
                        return Err(A::Error::invalid_length(pairs.len() + 1, &self));
                    }
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }

        deserializer.deserialize_seq(Reader)
    }
}

/// Reads the state of a port with `pairs` queue pairs.
///
/// # Errors
/// The text is no device state, has another version, or is of a port with more queue pairs.
fn parse(text: &[u8], pairs: usize) -> Result<State, String> {
    let most = MAX_PAIR_LENGTH * (1 + pairs);
    if text.len() > most {
        return Err(format!(
            "cannot read a state of {} bytes: a port with {pairs} queue pairs has at most {most}",
            text.len()
        ));
    }
    let state: State = serde_json::from_slice(text).map_err(|error| error.to_string())?;
    if state.version != VERSION {
        return Err(format!(
            "unsupported state version {}; this daemon reads {VERSION}",
            state.version
        ));
    }
    let sent = state.pairs.0.len();
    if sent > pairs {
        return Err(format!(
            "cannot take the state of {sent} queue pairs: the port has {pairs}; start it with a larger \
             --queue-pairs"
        ));
    }
    Ok(state)
}

/// Transfer of the device state between SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE.
#[derive(Debug)]
pub(super) enum Transfer {
    /// The frontend sends the state over this stream.
    Load(ForeignStream),
    /// Result of sending the state to the frontend.
    Saved(Result<(), String>),
}

impl Device {
    /// Sends the state over the frontend's descriptor, or keeps the descriptor to load it from
    /// (SET_DEVICE_STATE_FD).
    pub(super) fn transfer_state(&mut self, load: bool, file: File) -> Result<Reply, Refusal> {
        if self.frontend.rings.iter().any(super::VringState::is_running) {
            return refused("the device state was requested while rings run");
        }
        let stream = ForeignStream::new(file, MAX_LENGTH)
            .map_err(|error| Refusal::Refused(error.to_string()))?;
        self.frontend.transfer = Some(if load {
            Transfer::Load(stream)
        } else {
            Transfer::Saved(self.save(stream).map_err(|error| format!("cannot send it: {error}")))
        });
        Ok(Reply::U64(NO_DESCRIPTOR))
    }

    /// Loads the state if the frontend sends it, and replies whether the transfer succeeded
    /// (CHECK_DEVICE_STATE).
    pub(super) fn check_state(&mut self) -> Result<Reply, Refusal> {
        let result = match self.frontend.transfer.take() {
            None => Err("no SET_DEVICE_STATE_FD came before".to_owned()),
            Some(Transfer::Saved(result)) => result,
            Some(Transfer::Load(stream)) => self.load(stream),
        };
        match result {
            Ok(()) => {
                info!("{}: device state transferred; counters and limits continue", self.name)
            }
            Err(why) => {
                warn!(
                    "{}: device state not transferred: {why}; counters and limits restart",
                    self.name
                );
                return Ok(Reply::U64(1));
            }
        }
        Ok(Reply::U64(0))
    }

    fn save(&self, mut stream: ForeignStream) -> io::Result<()> {
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
        let (mut rest, end) = (text.as_bytes(), Instant::now() + TRANSFER_TIMEOUT);
        while !rest.is_empty() || stream.has_unsent() {
            match stream.write(rest) {
                Ok(written) => rest = &rest[written..],
                Err(error) => wait(&stream, libc::POLLOUT, error, end)?,
            }
        }
        Ok(())
    }

    fn load(&self, mut stream: ForeignStream) -> Result<(), String> {
        let (mut text, end) = (Vec::new(), Instant::now() + TRANSFER_TIMEOUT);
        let mut bytes = [0; 4096];
        loop {
            match stream.read(&mut bytes) {
                Ok(0) => break,
                Ok(length) if text.len() + length > MAX_LENGTH => {
                    return Err(format!("it exceeds {MAX_LENGTH} bytes"));
                }
                Ok(length) => text.extend(&bytes[..length]),
                Err(error) => {
                    wait(&stream, libc::POLLIN, error, end)
                        .map_err(|error| format!("cannot read it: {error}"))?;
                }
            }
        }
        let state = parse(&text, self.workers.len())?;
        for (worker, counters) in self.workers.iter().zip(&state.pairs.0) {
            // No session runs, so no worker counts meanwhile.
            worker.status().counters.restore(counters);
        }
        if let Some(limits) = &self.limits {
            limits.rx.owe(&state.rx_debt);
            limits.tx.owe(&state.tx_debt);
        }
        Ok(())
    }
}

/// Waits until a stream that would have blocked is ready.
///
/// # Errors
/// `TimedOut` at `end`; `error` itself if it is neither `WouldBlock` nor `Interrupted`.
fn wait(
    stream: &ForeignStream,
    events: libc::c_short,
    error: io::Error,
    end: Instant,
) -> io::Result<()> {
    match error.kind() {
        io::ErrorKind::Interrupted => return Ok(()),
        io::ErrorKind::WouldBlock => {}
        _ => return Err(error),
    }
    let time = end.saturating_duration_since(Instant::now());
    if time.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    poll_two([(stream.as_fd(), events), (stream.as_fd(), events)], Some(time)).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_is_bounded_by_the_ports_queue_pairs() {
        let state = |pairs: usize| {
            let pairs: Vec<PairCounters> = (0..pairs).map(|_| PairCounters::default()).collect();
            serde_json::json!({"version": VERSION, "pairs": pairs}).to_string()
        };
        for pairs in [1, 2, 128] {
            assert_eq!(parse(state(pairs).as_bytes(), pairs).unwrap().pairs.0.len(), pairs);
        }
        assert!(parse(state(3).as_bytes(), 2).unwrap_err().contains("the port has 2"));
        let empty =
            |count: usize| format!("{{\"version\":1,\"pairs\":[{}{{}}]}}", "{},".repeat(count));
        assert!(parse(empty(4000).as_bytes(), 2).unwrap_err().contains("at most 128 queue pairs"));
        assert!(parse(empty(400_000).as_bytes(), 2).unwrap_err().contains("1200"));
        let unknown = format!("{{\"version\":1,\"x\":\"{}\"}}", "y".repeat(1000));
        assert!(parse(unknown.as_bytes(), 1).is_ok());
        assert!(parse(&b"[".repeat(10_000), 1).is_err());
    }

    #[test]
    fn longest_state_of_a_queue_pair_fits() {
        let text = serde_json::json!(PairCounters::default()).to_string();
        let numbers = text.matches(['0']).count();
        assert!(text.len() + 20 * numbers < MAX_PAIR_LENGTH, "{} bytes", text.len() + 20 * numbers);
    }
}
