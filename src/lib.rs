//! A vhost-user backend for virtio network cards.
//!
//! A VMM (QEMU, cloud-hypervisor) keeps the card's face; this daemon is its data plane. It maps
//! the guest's memory, takes descriptor chains from the virtqueues, and hands those very buffers
//! to the host's network. User space copies a frame only where that costs less (small ones to a TAP),
//! or where an AF_XDP socket or a check of headers takes it, which is counted by reason.
//!
//! # The story
//!
//! The guest **kicks**. The [`worker`] **pops a burst** of descriptor chains from the tx
//! [virtqueue](guest::virtqueue) and has the [`port`] **transmit** it. It pops the rx virtqueue's empty
//! chains, which the port **posts** for frames to come. The port **reaps** whatever the host has finished
//! with, and completes those chains in the used rings; the worker **publishes** each ring once, and
//! **calls** the guest if it asked. When a turn moves nothing, it **enables notifications** of both rings,
//! looks once more, and sleeps.
//!
//! tx and rx are always the guest's: tx is from the guest to the host. A *burst* is at most 64
//! chains. A *session* is one memory table, one feature set and running rings; it ends with
//! whatever changes one of these, and a new one begins.
//!
//! # The rooms
//!
//! [`cli`] parses the command line; [`config`] checks what it says, or a file. The [`daemon`] starts the
//! [`ports`] that they name. Each port serves frontends from an [`endpoint`], one after the other.
//! [`protocol`] frames their messages and knows no device; [`device`] turns requests into sessions and knows no packets. A [`worker`] per queue pair runs
//! them, waiting by [`event`]. [`guest`] is memory and rings; a [`port`] is the host's network;
//! [`vnet_header`] is what stands before each frame and is checked there. [`features`] and
//! [`net_config`] are what the card offers, [`policy`] is what its guest may do with it, and
//! [`counters`] what it did. What ports are
//! doing is in their [status](ports::PortStatus), which the [`api`] shows to operators and [`ctl`] asks for; a [`capture`] is a copy of what
//! they move. [`descriptors`] is how many may be open. [`error`] is why something does not start. [`logging`] writes lines that nobody waits for, and the [`sandbox`] is what all of
//! this runs in. The [`doctor`] looks at a host before any of it does. Unsafe code is in [`guest`]
//! and [`sys`] only, but for the first statement of `main`.

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
