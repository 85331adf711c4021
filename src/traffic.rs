//! Whom a port's guest speaks to, and by what protocol: counted while somebody asks.
//!
//! Frames are counted where their headers are seen: those from the guest by the worker, on its copy
//! of their headers; those for it by the worker too on a TAP, and in the XDP program on AF_XDP. While
//! nobody asks, nothing is looked at.
//!
//! Invariant: a table has a fixed number of rows at the most, whatever comes over the wire.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::frame::FrameDirection;
use crate::policy::filter::{Protocol, carried};

/// Rows of a table at the most. What belongs to none of them is counted together.
pub const MAX_ROWS: usize = 1024;

/// What rows differ by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Which way.
    pub way: FrameDirection,
    /// By what protocol; nothing, if the frames do not show it, or for all frames that found no row.
    pub protocol: Option<Protocol>,
    /// The address that is not the guest's: where frames from it go to, and where those for it come
    /// from. Nothing, if it is no IP.
    pub peer: Option<IpAddr>,
}

/// Frames, and their bytes without the virtio header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Volume {
    /// Frames. One that is to be segmented is one.
    pub frames: u64,
    /// Bytes.
    pub bytes: u64,
}

/// A row of what was counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// What is counted.
    pub key: Key,
    /// How much, since counting began.
    pub volume: Volume,
}

/// What a worker has counted.
#[derive(Debug, Default)]
pub struct PeerTable {
    on: AtomicBool,
    rows: Mutex<HashMap<Key, Volume>>,
}

impl PeerTable {
    fn lock(&self) -> MutexGuard<'_, HashMap<Key, Volume>> {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enable(&self, on: bool) {
        // Before it is on, and after it is off: it holds what is counted meanwhile.
        self.lock().clear();
        self.on.store(on, Ordering::Relaxed);
    }

    /// Whether frames are to be looked at.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }
}

/// Frames of a burst that a worker has looked at.
#[derive(Debug)]
pub struct Notes {
    peers: Arc<PeerTable>,
    seen: Vec<(Key, u64)>,
}

impl Notes {
    /// For this table.
    pub fn new(peers: Arc<PeerTable>) -> Self {
        Notes { peers, seen: Vec::new() }
    }

    /// Whether frames are to be looked at: asked once a burst.
    #[inline]
    pub fn wanted(&self) -> bool {
        self.peers.is_on()
    }

    /// Notes a frame of `length` bytes by its start.
    pub fn note(&mut self, way: FrameDirection, start: &[u8], length: usize) {
        let (protocol, addresses) = carried(start);
        let peer = addresses.map(|[from, to]| if way == FrameDirection::Tx { to } else { from });
        self.seen.push((Key { way, protocol, peer }, length as u64));
    }

    /// Puts what was noted into the table.
    #[inline]
    pub fn publish(&mut self) {
        if !self.seen.is_empty() {
            let mut rows = self.peers.lock();
            for (key, bytes) in self.seen.drain(..) {
                add(&mut rows, key, Volume { frames: 1, bytes });
            }
        }
    }
}

fn add(rows: &mut HashMap<Key, Volume>, key: Key, more: Volume) {
    let has_room = rows.len() < MAX_ROWS - 2 || rows.contains_key(&key);
    let key = if has_room { key } else { Key { protocol: None, peer: None, ..key } };
    let volume = rows.entry(key).or_default();
    volume.frames += more.frames;
    volume.bytes += more.bytes;
}

/// A counter of frames that workers do not see: those for the guest that an XDP program brings.
pub trait PeerCounter: fmt::Debug + Send + Sync {
    /// Counts frames by their sender from now on, starting at zero, or no longer.
    ///
    /// # Errors
    /// Those of loading an XDP program; nothing has changed then.
    fn count_peers(&self, on: bool) -> io::Result<()>;

    /// The counts since they were switched on; none if they are off.
    ///
    /// # Errors
    /// Those of reading the XDP program's map.
    fn peers(&self) -> io::Result<Vec<(Key, Volume)>>;
}

/// What is counted of a port.
#[derive(Debug, Clone)]
pub struct Traffic {
    peers: Arc<PeerTable>,
    /// Counter of the frames that the workers do not see. It is dropped with the port's queues.
    counter: Option<Weak<dyn PeerCounter>>,
}

impl Traffic {
    /// Of a port whose workers count in `peers`.
    pub fn new(peers: Arc<PeerTable>, counter: Option<Weak<dyn PeerCounter>>) -> Self {
        Traffic { peers, counter }
    }

    fn counter(&self) -> Option<Arc<dyn PeerCounter>> {
        self.counter.as_ref().and_then(Weak::upgrade)
    }

    /// Has frames counted from now on, from nothing, or not any more. For the port's control thread.
    ///
    /// # Errors
    /// Those of loading an XDP program; nothing has changed then.
    pub fn enable(&self, on: bool) -> io::Result<()> {
        if on == self.peers.is_on() {
            return Ok(());
        }
        if let Some(counter) = self.counter() {
            counter.count_peers(on)?;
        }
        self.peers.enable(on);
        Ok(())
    }

    /// What was counted since it was switched on: most bytes first. For the port's control thread.
    ///
    /// # Errors
    /// Those of reading the XDP program's map.
    pub fn snapshot(&self) -> io::Result<Vec<Row>> {
        let mut rows = self.peers.lock().clone();
        if let Some(counter) = self.counter() {
            for (key, volume) in counter.peers()? {
                add(&mut rows, key, volume);
            }
        }
        let mut rows: Vec<Row> =
            rows.into_iter().map(|(key, volume)| Row { key, volume }).collect();
        rows.sort_unstable_by_key(|row| std::cmp::Reverse(row.volume.bytes));
        Ok(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn datagram(to: [u8; 4]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend([8, 0, 0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1]);
        frame.extend(to);
        frame.extend([0; 8]);
        frame
    }

    fn traffic() -> (Traffic, Notes) {
        let peers = Arc::new(PeerTable::default());
        (Traffic::new(peers.clone(), None), Notes::new(peers))
    }

    #[test]
    fn frames_are_counted_by_protocol_and_peer_while_somebody_asks() {
        let (traffic, mut notes) = traffic();
        assert!(!notes.wanted());
        traffic.enable(true).unwrap();
        assert!(notes.wanted());
        let frame = datagram([198, 51, 100, 1]);
        notes.note(FrameDirection::Tx, &frame, 100);
        notes.note(FrameDirection::Tx, &frame, 50);
        notes.note(FrameDirection::Rx, &frame, 60);
        notes.note(FrameDirection::Tx, &[0; 20], 20);
        assert_eq!(traffic.snapshot().unwrap(), []);
        notes.publish();
        let rows = traffic.snapshot().unwrap();
        let shown: Vec<String> = rows
            .iter()
            .map(|Row { key, volume }| {
                let protocol = key.protocol.map_or("other".into(), |it| it.to_string());
                format!("{:?} {protocol} {:?} {volume:?}", key.way, key.peer)
            })
            .collect();
        assert_eq!(
            shown,
            [
                "Tx udp Some(198.51.100.1) Volume { frames: 2, bytes: 150 }",
                "Rx udp Some(192.0.2.1) Volume { frames: 1, bytes: 60 }",
                "Tx ethertype 0x0000 None Volume { frames: 1, bytes: 20 }",
            ]
        );
        traffic.enable(false).unwrap();
        traffic.enable(true).unwrap();
        assert_eq!(traffic.snapshot().unwrap(), []);
    }

    #[test]
    fn a_table_is_never_longer_than_it_may() {
        let (traffic, mut notes) = traffic();
        traffic.enable(true).unwrap();
        for number in 0..5000_u16 {
            let [high, low] = number.to_be_bytes();
            notes.note(FrameDirection::Tx, &datagram([198, 51, high, low]), 1);
            notes.note(FrameDirection::Rx, &[], 1);
            notes.publish();
        }
        let rows = traffic.snapshot().unwrap();
        assert!(rows.len() <= MAX_ROWS, "{}", rows.len());
        assert_eq!(rows.iter().map(|row| row.volume.frames).sum::<u64>(), 10_000);
        assert!(rows[..2].iter().all(|row| row.key.peer.is_none()));
    }
}
