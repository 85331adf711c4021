//! The network devices of this network namespace, read once.

use std::io;

use crate::sys::ethtool::Ethtool;
use crate::sys::link::{self, Link};

/// All network devices, and the ethtool socket for details.
#[derive(Debug, Default)]
pub(super) struct Network {
    pub(super) links: Vec<Link>,
    /// None if the kernel does not report offloads, rings and queues.
    pub(super) ethtool: Option<Ethtool>,
}

impl Network {
    /// Reads all devices.
    ///
    /// # Errors
    /// Netlink fails.
    pub(super) fn read() -> io::Result<Self> {
        Ok(Network { links: link::all()?, ethtool: Ethtool::open().ok() })
    }

    /// Finds a device by its name or an alternative name.
    pub(super) fn find(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.is_called(name))
    }

    /// Finds a device by its index.
    pub(super) fn at(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }

    /// Returns the bridge that a device is a port of.
    pub(super) fn bridge_of(&self, link: &Link) -> Option<&Link> {
        self.at(link.master?).filter(|master| master.kind == "bridge")
    }
}
