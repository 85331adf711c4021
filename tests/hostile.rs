//! What tenants, frontends, the network and operators can throw at the daemon, and what must
//! happen then, numbered as in docs/threat-model.md. Each leaves the daemon alive, its
//! neighbour's traffic whole, and nothing behind (`support::hostile::Scene`).
//!
//! Outcomes: R, the request is refused or the connection closed; B, the queue pair is broken until
//! the guest resets or reconnects; D, the frame is dropped and counted, and its chain used; C,
//! only this tenant's port suffers.

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

/// Changes the flags of an eventfd for everybody who has it.
#[allow(unsafe_code)]
fn set_flags(event: &EventFd, flags: OFlag) {
    // SAFETY: it is open as long as it is borrowed.
    let event = unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) };
    fcntl(event, FcntlArg::F_SETFL(flags)).unwrap();
}
