//! The network devices of this namespace, looked at once.

use std::io;

use crate::sys::ethtool::Ethtool;
use crate::sys::link::{self, Link};

/// The devices, and whom to ask for more.
#[derive(Debug, Default)]
pub(super) struct Network {
    pub(super) links: Vec<Link>,
    /// Without it the kernel does not tell of offloads, rings and queues.
    pub(super) ethtool: Option<Ethtool>,
}

impl Network {
    /// Looks at all devices.
    ///
    /// # Errors
    /// Those of netlink.
    pub(super) fn look() -> io::Result<Self> {
        Ok(Network { links: link::all()?, ethtool: Ethtool::open().ok() })
    }

    /// The device of that name, primary or alternative.
    pub(super) fn find(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.is_called(name))
    }

    /// The device of that index.
    pub(super) fn at(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }

    /// The bridge that a device belongs to.
    pub(super) fn bridge_of(&self, link: &Link) -> Option<&Link> {
        self.at(link.master?).filter(|master| master.kind == "bridge")
    }
}
