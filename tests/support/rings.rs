//! The rings of another process's AF_XDP socket, read from its memory.

use std::fs::{self, File};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;

use nix::sys::stat::fstat;

/// Offset of the entries of an rx or tx ring (`struct xdp_rxtx_ring` in net/xdp/xsk_queue.h, with cache
/// lines of 64 bytes).
const ENTRIES: usize = 320;
/// Mask of the base address. The higher bits hold an offset to add.
const PLACE: u64 = (1 << 48) - 1;

/// A line of /proc/PID/maps.
#[derive(Debug, Clone)]
struct Mapping {
    range: Range<u64>,
    offset: u64,
    inode: u64,
    name: String,
}

/// The rings' entries, as offsets into the UMEM.
#[derive(Debug)]
pub(crate) struct SocketRings {
    pub(crate) rx: Vec<u64>,
    pub(crate) tx: Vec<u64>,
    mappings: Vec<Mapping>,
}

impl SocketRings {
    pub(super) fn of(process: u32) -> Self {
        let text = fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
        let mappings: Vec<_> = text
            .lines()
            .map(|line| {
                let words: Vec<&str> = line.split_whitespace().collect();
                let (start, end) = words[0].split_once('-').unwrap();
                let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
                Mapping {
                    range: number(start)..number(end),
                    offset: number(words[2]),
                    inode: words[4].parse().unwrap(),
                    name: words.get(5).copied().unwrap_or_default().to_owned(),
                }
            })
            .collect();
        let memory = File::open(format!("/proc/{process}/mem")).unwrap();
        let entries = |offset: u64| {
            let ring = mappings
                .iter()
                .find(|mapping| mapping.name.starts_with("socket:") && mapping.offset == offset)
                .expect("the daemon has an AF_XDP socket");
            let mut bytes = vec![0; (ring.range.end - ring.range.start) as usize];
            memory.read_exact_at(&mut bytes, ring.range.start).unwrap();
            let word = |bytes: &[u8]| u64::from_ne_bytes(bytes.try_into().unwrap());
            bytes[ENTRIES..]
                .chunks_exact(16)
                .filter(|entry| word(&entry[8..]) != 0)
                .map(|entry| word(&entry[..8]))
                .map(|address| (address & PLACE) + (address >> 48))
                .collect::<Vec<_>>()
        };
        // XDP_PGOFF_RX_RING and XDP_PGOFF_TX_RING of linux/if_xdp.h.
        SocketRings { rx: entries(0), tx: entries(0x8000_0000), mappings }
    }

    /// Returns the range of guest memory in the UMEM. The bounce area comes first: the anonymous mapping
    /// right before a mapping of the guest's file.
    pub(crate) fn guest_memory(&self, file: BorrowedFd<'_>) -> Range<u64> {
        let inode = fstat(file).unwrap().st_ino;
        let pairs = self.mappings.windows(2);
        let (bounce, guest) = pairs
            .map(|pair| (&pair[0], &pair[1]))
            .find(|(before, this)| {
                this.inode == inode
                    && before.range.end == this.range.start
                    && before.inode == 0
                    && before.name.is_empty()
            })
            .expect("the file is mapped after a bounce area");
        guest.range.start - bounce.range.start..guest.range.end - bounce.range.start
    }
}
