//! Frames of our own to a port's network: where a card is that has moved here.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{MsgFlags, send};

use crate::policy::{Limits, LiveFilter};
use crate::sys::tap::Queue;

/// What frames are sent by.
#[derive(Debug)]
enum FrameDirection {
    /// A queue of a TAP device.
    Tap(Queue),
    /// A packet socket that is bound to a device.
    Socket(OwnedFd),
}

/// Tells switches where a card is.
#[derive(Debug)]
pub struct Announcer {
    way: FrameDirection,
    limits: Arc<Limits>,
    tx_filter: Arc<LiveFilter>,
}

impl Announcer {
    /// By a TAP's queue, within the port's limits and tx filter.
    pub fn on_tap(queue: Queue, limits: Arc<Limits>, tx_filter: Arc<LiveFilter>) -> Self {
        Announcer { way: FrameDirection::Tap(queue), limits, tx_filter }
    }

    /// By a packet socket that is bound to a device, within the port's limits and tx filter.
    pub fn on_socket(socket: OwnedFd, limits: Arc<Limits>, tx_filter: Arc<LiveFilter>) -> Self {
        Announcer { way: FrameDirection::Socket(socket), limits, tx_filter }
    }

    /// Sends one frame from the card's address to all.
    ///
    /// # Errors
    /// The port's tx filter denies the frame, the port may not send that much, or the host refuses it.
    pub fn announce(&self, address: [u8; 6]) -> io::Result<()> {
        let frame = reverse_arp(address);
        if self.tx_filter.get().check(&frame).is_err() {
            let why = "the port's tx filter denies the frame (ethertype 0x8035, RARP)";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        }
        let limit = &self.limits.tx;
        if limit.is_limited() && limit.admit([(1, frame.len() as u64)].into_iter()) == 0 {
            return Err(io::Error::new(io::ErrorKind::QuotaExceeded, "the port's tx limit"));
        }
        match &self.way {
            FrameDirection::Tap(queue) => queue.write_plain(&frame),
            FrameDirection::Socket(socket) => {
                send(socket.as_raw_fd(), &frame, MsgFlags::MSG_DONTWAIT)?;
                Ok(())
            }
        }
    }
}

/// A request for the sender's own IP address (RFC 903), as QEMU and Linux announce a card: switches
/// learn its place by it, and nobody answers.
fn reverse_arp(address: [u8; 6]) -> [u8; 60] {
    let mut frame = [0; 60];
    frame[..6].fill(0xff);
    frame[6..12].copy_from_slice(&address);
    // Ethertype; Ethernet and IPv4, with their lengths; the operation.
    frame[12..22].copy_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    frame[22..28].copy_from_slice(&address);
    frame[32..38].copy_from_slice(&address);
    frame
}
