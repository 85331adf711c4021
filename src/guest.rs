//! Guest memory and virtqueues: the first of the two rooms where `unsafe` is allowed.
//!
//! Everything that comes out of here has been checked: a [`Chain`]'s segments lie inside mapped
//! regions, its head is not in flight twice, and it cannot outlive the memory table it points into.
//! The guest may write all of this memory at any moment, so each field is read once, checked as
//! a copy, and used as that copy; nobody ever holds a `&[u8]` onto it.

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
