//! Guest memory and virtqueues: one of the two modules with `unsafe` code; the other is [`sys`](crate::sys).
//!
//! Invariant: the segments of a [`Chain`] lie inside mapped regions, its head is in flight once, and it
//! cannot outlive its memory table. The guest may write all of this memory at any moment. This module
//! therefore reads each field once, and checks and uses that copy; there is never a `&[u8]` to guest memory.

#![allow(unsafe_code)]

pub mod chain;
mod chain_table;
mod descriptors;
pub mod dirty;
pub mod fault;
pub mod inflight;
pub mod layout;
pub mod memory;
mod notify;
pub mod quota;
pub mod sigbus;
pub mod umem;
pub mod unmapped;
pub mod virtqueue;

pub use chain::{Chain, Command, Direction, Readable, Writable};
pub use descriptors::MAX_SEGMENTS;
pub use dirty::DirtyLog;
pub use fault::Fault;
pub use inflight::Inflight;
pub use layout::RingLayout;
pub use memory::{GuestMemory, MemoryError, RegionRequest};
pub use quota::{Allowance, MemoryQuota, Pinned, Reservation};
pub use sigbus::{contain_sigbus, contained};
pub use umem::Umem;
pub use unmapped::Unmapped;
pub use virtqueue::{Budget, Notification, Published, Virtqueue};

pub use crate::sys::segment::{ReadSegment, Segment};
