//! Faults: rules of a ring that the guest or its frontend can break. A fault stops the queue pair.

use std::fmt;

/// A broken rule of a virtqueue, which stops the queue pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Size or alignment of the ring is not allowed; the text says which.
    Layout(String),
    /// The file of the guest's memory was truncated, or a page of it failed.
    MemoryLost,
    /// The named part of the ring lies outside guest memory.
    RingUnmapped(&'static str),
    /// The available index is further ahead than the ring has entries, or went back.
    AvailIndex {
        /// The index in guest memory.
        index: u16,
        /// Position of the chain to pop next.
        expected: u16,
    },
    /// An entry of the available ring is no descriptor's index.
    HeadOutOfRange(u16),
    /// The driver made a head available that is still in flight.
    HeadInFlight(u16),
    /// A descriptor's `next` field is no descriptor's index.
    NextOutOfRange(u16),
    /// The chain has more descriptors than the ring, or more than [`MAX_SEGMENTS`](super::MAX_SEGMENTS) segments.
    ChainTooLong {
        /// Head of the chain.
        head: u16,
    },
    /// The chain's descriptors have 4 GiB or more together.
    ChainTooLarge {
        /// Head of the chain.
        head: u16,
    },
    /// A buffer lies outside guest memory.
    BufferUnmapped {
        /// Guest-physical address of the buffer.
        address: u64,
        /// Length of the buffer in bytes.
        length: u32,
    },
    /// A descriptor is device-writable where the ring requires device-readable, or the reverse.
    WrongDirection {
        /// Head of the chain.
        head: u16,
    },
    /// A descriptor is indirect although the feature was not negotiated, or inside an indirect table, or
    /// together with `VIRTQ_DESC_F_NEXT`.
    IndirectNotAllowed {
        /// Head of the chain.
        head: u16,
    },
    /// The length of an indirect table is 0, no multiple of 16 bytes, or larger than the ring's table.
    IndirectLength(u32),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Layout(reason) => write!(f, "{reason}"),
            Fault::MemoryLost => write!(
                f,
                "guest memory is gone: its file was truncated, or a page failed; restart the guest"
            ),
            Fault::RingUnmapped(part) => write!(f, "the {part} lies outside guest memory"),
            Fault::AvailIndex { index, expected } => {
                write!(f, "available index {index} out of range; next chain expected at {expected}")
            }
            Fault::HeadOutOfRange(head) => write!(f, "descriptor head {head} out of range"),
            Fault::HeadInFlight(head) => write!(f, "descriptor head {head} is already in flight"),
            Fault::NextOutOfRange(next) => write!(f, "next descriptor {next} out of range"),
            Fault::ChainTooLong { head } => {
                write!(f, "the chain at head {head} has too many descriptors, or a loop")
            }
            Fault::ChainTooLarge { head } => {
                write!(f, "the chain at head {head} is longer than 4 GiB")
            }
            Fault::BufferUnmapped { address, length } => {
                write!(f, "a buffer of {length} bytes at {address:#x} lies outside guest memory")
            }
            Fault::WrongDirection { head } => {
                write!(f, "the chain at head {head} has a wrong VIRTQ_DESC_F_WRITE flag")
            }
            Fault::IndirectNotAllowed { head } => {
                write!(f, "the chain at head {head} has an indirect descriptor that is not allowed")
            }
            Fault::IndirectLength(length) => {
                write!(f, "an indirect table of {length} bytes is not allowed")
            }
        }
    }
}

impl std::error::Error for Fault {}
