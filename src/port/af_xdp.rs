//! AF_XDP sockets as port. The kernel or the device sends from the guest's own memory and receives into it.
//!
//! `umem` decides which addresses the kernel may get. `program` redirects frames to the sockets, and
//! `interface` opens and closes the sockets. The `transmitter` and the `receiver` keep account of the
//! kernel's buffers. A worker runs a `session`.
//!
//! A socket lives at most for one session. It opens when the guest first has something for it, since
//! opening pins all guest memory. It is closed before any unfinished buffer is reused.

mod checksum;
mod device_caps;
mod interface;
pub mod joining;
mod options;
pub mod program;
mod receiver;
pub mod segmentation;
mod session;
mod steering;
pub mod tags;
mod transmitter;
mod umem;

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crate::features::{HEADER_LENGTH, PortOffloads};
use crate::frame::LINK_OVERHEAD;
use crate::sys::link::Watch;

pub use interface::Interface;
pub use options::{AfXdp, Attach, Mode};
pub use session::XdpPort;
use umem::LONGEST_FRAME;

/// Largest MTU in bytes of a device that AF_XDP sockets can serve.
pub const MAX_MTU: u32 = (LONGEST_FRAME - HEADER_LENGTH - LINK_OVERHEAD) as u32;
/// Pause between attempts to bind to a queue whose last socket was just closed.
const BUSY_RETRY: Duration = Duration::from_millis(2);
/// Longest time for which the kernel is expected to keep a queue busy after its socket was closed.
const BUSY_LIMIT: Duration = Duration::from_secs(1);

/// Reason why a device cannot be used: one line that names the device and the fix.
#[derive(Debug)]
pub struct OpenError(pub(crate) String);

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One queue of a network device, for the port's life. A session on it is an [`XdpPort`].
#[derive(Debug)]
pub struct XdpQueue {
    interface: Arc<Interface>,
    /// Index of the queue pair within the port.
    pair: u16,
    /// Notices of changed network devices.
    watch: Watch,
    /// The log has said that the device does not work, and not yet that it works again.
    reported: bool,
}

impl XdpQueue {
    /// Returns the device, which all queues of a port share.
    pub fn interface(&self) -> &Arc<Interface> {
        &self.interface
    }

    /// Returns the offloads that the port offers: all of them from the guest, none towards the guest.
    /// Frames from the wire arrive segmented and with complete checksums.
    pub fn offloads(&self) -> PortOffloads {
        PortOffloads { both_ways: false, ..PortOffloads::ALL }
    }

    /// Opens a packet socket on the device, for frames beside those of a session.
    pub(super) fn packet_socket(&self) -> io::Result<OwnedFd> {
        self.interface.packet_socket()
    }
}
