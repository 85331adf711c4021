//! What an operator chooses about AF_XDP sockets. The configuration reads it, and writes it as text.

use serde::{Deserialize, Serialize};

/// AF_XDP sockets on a network device's queues, as `NAME[,queue=N][,mode=…][,attach=…][,steer=mac]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AfXdp {
    /// The device's name.
    pub name: String,
    /// Queue of the first queue pair; the others follow it.
    pub queue: u16,
    /// Who moves frames between the device and the guest's memory.
    pub mode: Mode,
    /// Where the XDP program runs.
    pub attach: Attach,
    /// Whether the card is to bring frames for the guest's address to the queue.
    pub steer: bool,
}

/// Who moves frames between the device and the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Mode {
    /// The device if its driver can, else the kernel.
    Auto,
    /// The kernel, by copying.
    Copy,
    /// The device.
    ZeroCopy,
}

/// Where the XDP program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Attach {
    /// In the driver if it can, else in the kernel's generic code.
    Auto,
    /// In the driver.
    Native,
    /// In the kernel's generic code.
    Generic,
}
