//! What a guest can do to its rings that stops them.

use std::fmt;

/// The guest (or its frontend) broke a rule of the ring: the queue pair stops.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Size or alignment of the ring is not allowed.
    Layout(String),
    /// The guest's memory has gone: its file was truncated, or a page of it broke.
    MemoryLost,
    /// A part of the ring lies outside guest memory.
    RingUnmapped(&'static str),
    /// The avail index is further ahead than the ring is long, or went back.
    AvailIndex {
        /// The index in guest memory.
        index: u16,
        /// The chain that we would have popped next.
        expected: u16,
    },
    /// An entry of the avail ring is no descriptor.
    HeadOutOfRange(u16),
    /// A head was made available again before it was used.
    HeadOfferedTwice(u16),
    /// A chain's next descriptor is none.
    NextOutOfRange(u16),
    /// The chain has more descriptors than the ring, or more than [`MAX_SEGMENTS`](super::MAX_SEGMENTS) pieces.
    ChainTooLong {
        /// Head of the chain.
        head: u16,
    },
    /// The chain is longer than 4 GiB.
    ChainTooLarge {
        /// Head of the chain.
        head: u16,
    },
    /// A buffer lies outside guest memory.
    BufferUnmapped {
        /// Guest-physical address of the buffer.
        address: u64,
        /// Its length in bytes.
        length: u32,
    },
    /// A device-writable descriptor on the tx ring, or a device-readable one on the rx ring.
    WrongDirection {
        /// Head of the chain.
        head: u16,
    },
    /// A descriptor is indirect though that was not negotiated, or inside an indirect table, or
    /// has the `NEXT` flag as well.
    IndirectNotAllowed {
        /// Head of the chain.
        head: u16,
    },
    /// An indirect table is empty, no multiple of 16 bytes, or longer than the ring.
    IndirectLength(u32),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Layout(reason) => write!(f, "{reason}"),
            Fault::MemoryLost => {
                write!(f, "the guest's memory has gone; was its file truncated?")
            }
            Fault::RingUnmapped(part) => write!(f, "its {part} lies outside guest memory"),
            Fault::AvailIndex { index, expected } => {
                write!(f, "avail index {index} is not within the ring's size of {expected}")
            }
            Fault::HeadOutOfRange(head) => write!(f, "head {head} is no descriptor"),
            Fault::HeadOfferedTwice(head) => write!(f, "head {head} was offered twice"),
            Fault::NextOutOfRange(next) => write!(f, "next descriptor {next} is none"),
            Fault::ChainTooLong { head } => {
                write!(f, "the chain at head {head} has too many descriptors")
            }
            Fault::ChainTooLarge { head } => write!(f, "the chain at head {head} is over 4 GiB"),
            Fault::BufferUnmapped { address, length } => {
                write!(f, "a buffer of {length} bytes at {address:#x} lies outside guest memory")
            }
            Fault::WrongDirection { head } => {
                write!(f, "the chain at head {head} has a descriptor of the wrong direction")
            }
            Fault::IndirectNotAllowed { head } => {
                write!(f, "the chain at head {head} has an indirect descriptor where none may be")
            }
            Fault::IndirectLength(length) => {
                write!(f, "an indirect table of {length} bytes is not allowed")
            }
        }
    }
}

impl std::error::Error for Fault {}
