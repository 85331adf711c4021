//! Counts of a guest's frames by peer and protocol, while an operator asks for them.
//!
//! The worker counts frames from the guest, by its copy of their headers. Frames to the guest are counted by the
//! worker on a TAP, and by the XDP program on AF_XDP. Otherwise no frame is inspected for counts.
//!
//! Invariant: a table has at most [`MAX_ROWS`] rows, whatever frames arrive.

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::frame::FrameDirection;
use crate::policy::filter::{Protocol, carried};

/// Maximum number of rows of a table. Further peers are counted together, in one row for each direction.
pub const MAX_ROWS: usize = 1024;

/// The key of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Direction of the frames.
    pub direction: FrameDirection,
    /// Protocol of the frames; `None` if the headers do not show it, and in the row of further peers.
    pub protocol: Option<Protocol>,
    /// IP address of the peer: the destination on tx, the source on rx. `None` if the frames are no IP packets, and
    /// in the row of further peers.
    pub peer: Option<IpAddr>,
}

/// Numbers of frames and bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Volume {
    /// Frames. A GSO frame counts as one.
    pub frames: u64,
    /// Bytes, virtio-net headers excluded.
    pub bytes: u64,
}

/// A row of a table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Direction, protocol and peer.
    pub key: Key,
    /// Frames and bytes since counting began.
    pub volume: Volume,
}

/// The counts of a port's workers.
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
        // Counting starts from an empty table.
        self.lock().clear();
        self.on.store(on, Ordering::Relaxed);
    }

    /// Returns true if frames are counted.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }
}

/// The frames of a burst, before a worker adds them to the [`PeerTable`].
#[derive(Debug)]
pub struct PeerNotes {
    peers: Arc<PeerTable>,
    seen: Vec<(Key, u64)>,
}

impl PeerNotes {
    /// Creates an empty list for a table.
    pub fn new(peers: Arc<PeerTable>) -> Self {
        PeerNotes { peers, seen: Vec::new() }
    }

    /// Returns true if frames are counted. Workers ask once for each burst.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.peers.is_on()
    }

    /// Notes a frame of `length` bytes by the headers in `start`.
    pub fn note(&mut self, direction: FrameDirection, start: &[u8], length: usize) {
        let (protocol, addresses) = carried(start);
        let peer =
            addresses.map(|[from, to]| if direction == FrameDirection::Tx { to } else { from });
        self.seen.push((Key { direction, protocol, peer }, length as u64));
    }

    /// Adds the burst to the table.
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

/// A counter of frames that no worker inspects: frames to the guest on AF_XDP.
pub trait PeerCounter: fmt::Debug + Send + Sync {
    /// Starts counting frames by sender, from zero, or stops counting.
    ///
    /// # Errors
    /// The kernel refuses to load the XDP program. Counting stays as it was.
    fn count_peers(&self, on: bool) -> io::Result<()>;

    /// Returns the counts since counting started; none if it is off.
    ///
    /// # Errors
    /// The kernel refuses to read the XDP program's map.
    fn peers(&self) -> io::Result<Vec<(Key, Volume)>>;
}

/// All counts of a port by peer.
#[derive(Debug, Clone)]
pub struct Traffic {
    peers: Arc<PeerTable>,
    /// Counter of the frames that no worker inspects. The port's queues own the counter.
    counter: Option<Weak<dyn PeerCounter>>,
}

impl Traffic {
    /// Creates the counts of a port whose workers count in `peers`.
    pub fn new(peers: Arc<PeerTable>, counter: Option<Weak<dyn PeerCounter>>) -> Self {
        Traffic { peers, counter }
    }

    fn counter(&self) -> Option<Arc<dyn PeerCounter>> {
        self.counter.as_ref().and_then(Weak::upgrade)
    }

    /// Starts counting, from zero, or stops counting. Called by the port's control thread.
    ///
    /// # Errors
    /// The kernel refuses to load the XDP program. Counting stays as it was.
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

    /// Returns the counts since counting started, most bytes first. Called by the port's control thread.
    ///
    /// # Errors
    /// The kernel refuses to read the XDP program's map.
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

    fn traffic() -> (Traffic, PeerNotes) {
        let peers = Arc::new(PeerTable::default());
        (Traffic::new(peers.clone(), None), PeerNotes::new(peers))
    }

    #[test]
    fn frames_are_counted_by_protocol_and_peer_while_on() {
        let (traffic, mut notes) = traffic();
        assert!(!notes.is_on());
        traffic.enable(true).unwrap();
        assert!(notes.is_on());
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
                format!("{:?} {protocol} {:?} {volume:?}", key.direction, key.peer)
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
    fn table_has_at_most_max_rows() {
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
