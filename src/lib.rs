//! A vhost-user back-end for virtio-net.
//!
//! QEMU or cloud-hypervisor presents the device to the guest; this daemon moves its frames. The daemon maps
//! guest memory and pops descriptor chains from the virtqueues. The kernel then reads and writes the guest's
//! buffers, through a TAP device, or through an AF_XDP socket whose UMEM is guest memory. User space copies
//! small frames to a TAP, because that costs less, and some frames on AF_XDP, which are counted by reason.
//!
//! # Terms
//!
//! - **tx** is the transmitq, from the guest to the host; **rx** is the receiveq, from the host to the guest.
//! - A **kick** is an available buffer notification, from the driver. A **call** is a used buffer
//!   notification, to the driver. Both are eventfds.
//! - A **burst** is at most 64 chains. A **turn** moves at most one burst in each direction.
//! - A **session** is one memory table, one feature set and running rings. A change of one of these ends the
//!   session, and a new session begins.
//!
//! # The way of a frame
//!
//! From the guest:
//!
//! 1. The guest kicks, which wakes the [`worker`].
//! 2. The worker *pops* a burst of chains from the tx [virtqueue](guest::virtqueue). A rate limit, if any,
//!    admits them in the order of the ring.
//! 3. The [`port`] checks each frame's [header](vnet_header) and [`policy`], and *transmits* the frame.
//! 4. The port *reaps*: it completes the chains that the host has finished with.
//! 5. The worker *publishes* the completed chains with one store of the used index, and *calls* the guest if
//!    the driver asked for it.
//!
//! To the guest:
//!
//! 1. The worker pops empty chains from the rx virtqueue, and the port *posts* them for frames to come.
//! 2. The host's kernel or its device writes a frame into the guest's buffers.
//! 3. The port reaps the frame; the worker publishes and calls, as above.
//!
//! After a turn that moves nothing, the worker *enables notifications* of both rings, reads both available
//! indexes again, and sleeps.
//!
//! # Where to read on
//!
//! [`worker`] runs the turns, [`device`] decides which sessions run, and [`port::loopback`] is a whole port
//! in 150 lines. `docs/architecture.md` lists all modules in layers, and explains threads, sessions and
//! errors. Unsafe code is in [`guest`] and [`sys`] only, except for the first statement of `main`.
//!
//! This crate is a program. Its modules are public for its tests and benchmarks, and are no interface for other
//! crates: they change without notice, and the crate is not published.

pub mod api;
pub mod capture;
pub mod cli;
pub mod config;
pub mod counters;
pub mod ctl;
pub mod daemon;
pub mod descriptors;
pub mod device;
pub mod doctor;
pub mod endpoint;
pub mod error;
pub mod event;
#[cfg(debug_assertions)]
mod fault_point;
pub mod features;
pub mod frame;
pub mod guest;
pub mod logging;
pub mod net_config;
pub mod policy;
pub mod port;
pub mod ports;
pub mod protocol;
pub mod sandbox;
pub mod sys;
pub mod traffic;
pub mod vnet_header;
pub mod worker;
