//! An operator's options for AF_XDP sockets. `config` converts them from and to text.

use serde::{Deserialize, Serialize};

/// AF_XDP sockets on a network device's queues, as `NAME[,queue=N][,mode=…][,attach=…][,steer=mac]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AfXdp {
    /// Name of the network device.
    pub name: String,
    /// Device queue of the first queue pair. Further queue pairs use the following queues.
    pub queue: u16,
    /// Copy or zero-copy mode.
    pub mode: Mode,
    /// Hook of the XDP program.
    pub attach: Attach,
    /// Insert a flow rule with which the NIC steers frames for the guest's MAC address to the queue.
    pub steer: bool,
}

/// The mover of frames between the device and guest memory: the kernel, or the device itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// Zero copy if the driver supports it, else copy mode.
    Auto,
    /// The kernel copies each frame.
    Copy,
    /// The device reads and writes guest memory.
    ZeroCopy,
}

/// Hook at which the XDP program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Attach {
    /// The driver if it supports XDP, else the kernel's generic code.
    Auto,
    /// The driver.
    Native,
    /// The kernel's generic code.
    Generic,
}
