//! Attacks by tenants, frontends, the network and operators, numbered as in docs/threat-model.md. After each
//! the daemon runs, the neighbour has lost no frame, and nothing leaks (`support::hostile::Scene`).
//!
//! Outcomes: R, the request is refused or the connection closed; B, the queue pair is broken until the guest
//! resets or the VMM reconnects; D, the frame is dropped and counted, and its chain used; C, only this
//! tenant's port suffers.

mod calls;
mod control;
mod descriptors;
mod frames;
mod handover;
mod hold;
mod life;
mod panics;
mod reload;
mod rings;

use std::os::fd::{AsRawFd, BorrowedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use vmm_sys_util::eventfd::EventFd;

/// Sets the flags of an eventfd's open file, which all processes share.
#[allow(unsafe_code)]
fn set_flags(event: &EventFd, flags: OFlag) {
    // SAFETY: the eventfd stays open for the whole function.
    let event = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    fcntl(event, FcntlArg::F_SETFL(flags)).unwrap();
}
