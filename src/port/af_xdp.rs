//! AF_XDP sockets as port: the guest's own memory is what the kernel, or the device, sends from
//! and receives into.
//!
//! The pieces: `umem` says which addresses the kernel may be given, `program` brings frames to
//! the sockets, `interface` opens and closes these, the `transmitter` and the `receiver` keep
//! what the kernel holds, and a `session` is what a worker runs. A socket lives for a session at
//! the most: it opens when the guest first has something for it, since that pins all of the
//! guest's memory, and is closed before a single buffer goes back unfinished.

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
/// How long a queue whose last socket was just closed is left alone between attempts.
const BUSY_RETRY: Duration = Duration::from_millis(2);
/// For how long a queue may be busy with a socket of our own that was closed.
const BUSY_LIMIT: Duration = Duration::from_secs(1);

/// Why a device can't be used: one line that names it and the way out.
#[derive(Debug)]
pub struct OpenError(pub(crate) String);

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One queue of a network device, for the daemon's life. A session on it is an [`XdpPort`].
#[derive(Debug)]
pub struct XdpQueue {
    interface: Arc<Interface>,
    /// Which of the port's queue pairs it is for.
    pair: u16,
    watch: Watch,
    /// It was said that the device does not work.
    reported: bool,
}

impl XdpQueue {
    /// The device, which all queues of a port share.
    pub fn interface(&self) -> &Arc<Interface> {
        &self.interface
    }

    /// What the port can do for the guest. Frames from the wire come as they are: whole, and with
    /// their checksums.
    pub fn offloads(&self) -> PortOffloads {
        PortOffloads { both_ways: false, ..PortOffloads::ALL }
    }

    /// A socket for frames beside those of a session.
    pub(super) fn packet_socket(&self) -> io::Result<OwnedFd> {
        self.interface.packet_socket()
    }
}
