//! Frames of the daemon's own to a port's network: they announce a virtio-net device that has moved to this host.
//!
//! Invariant: an announcement passes the port's tx filter and rate limit, as the guest's frames do.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{MsgFlags, send};

use crate::policy::{Limits, LiveFilter};
use crate::sys::tap::Queue;

/// The output of the frames.
#[derive(Debug)]
enum Output {
    /// A queue of a TAP device.
    Tap(Queue),
    /// A packet socket bound to a device.
    Socket(OwnedFd),
}

/// A sender of frames that tell switches the location of a virtio-net device.
#[derive(Debug)]
pub struct Announcer {
    output: Output,
    limits: Arc<Limits>,
    tx_filter: Arc<LiveFilter>,
}

impl Announcer {
    /// Creates an announcer on a TAP's queue, which keeps to the port's limits and tx filter.
    pub fn on_tap(queue: Queue, limits: Arc<Limits>, tx_filter: Arc<LiveFilter>) -> Self {
        Announcer { output: Output::Tap(queue), limits, tx_filter }
    }

    /// Creates an announcer on a packet socket bound to a device, which keeps to the port's limits and tx filter.
    pub fn on_socket(socket: OwnedFd, limits: Arc<Limits>, tx_filter: Arc<LiveFilter>) -> Self {
        Announcer { output: Output::Socket(socket), limits, tx_filter }
    }

    /// Broadcasts one frame from the virtio-net device's address.
    ///
    /// # Errors
    /// The port's tx filter denies the frame, the tx limit is reached, or the host refuses the frame.
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
        match &self.output {
            Output::Tap(queue) => queue.write_plain(&frame),
            Output::Socket(socket) => {
                send(socket.as_raw_fd(), &frame, MsgFlags::MSG_DONTWAIT)?;
                Ok(())
            }
        }
    }
}

/// A reverse ARP request for the sender's own IP address (RFC 903), as QEMU and Linux send to announce a device.
/// Switches learn the device's location from the source address, and no host answers.
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
