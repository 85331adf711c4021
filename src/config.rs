//! What the daemon is told at its start, checked: by the command line, or by a file for several
//! ports.

mod arguments;
mod file;
mod options;

use std::fmt;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use log::LevelFilter;
use serde::Deserialize;

use crate::api::client::Question;
use crate::net_config::MacAddress;
use crate::policy::{Filter, Identity, Limit};

pub use arguments::parse;
use options::PortOptions;

/// Queue pairs of a port at the most: virtio allows 32768, a frontend names rings with 8 bits.
pub const MAX_QUEUE_PAIRS: u16 = 128;

/// What the daemon is asked for.
#[derive(Debug)]
pub enum Invocation {
    /// Run with this configuration.
    Run(Config),
    /// Ask a running daemon.
    Ask(Question),
    /// Print this to standard output and exit with success.
    Print(String),
}

/// Everything that the daemon is told at its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What is logged.
    pub log_level: LevelFilter,
    /// Where operators ask and tell it things.
    pub control: Option<PathBuf>,
    /// What the daemon gives up once it has opened everything.
    pub confinement: Confinement,
    /// The cards that it serves; there is at least one.
    pub ports: Vec<PortConfig>,
}

/// What the daemon gives up once it has opened everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Confinement {
    /// What happens at a system call that no thread of ours makes.
    pub seccomp: Seccomp,
    /// The user to become, by name or number.
    pub user: Option<String>,
    /// The group to become; without one, the user's.
    pub group: Option<String>,
}

/// What happens at a system call that no thread of ours makes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Seccomp {
    /// The process is killed.
    #[default]
    Kill,
    /// The kernel logs it.
    Log,
    /// System calls are not looked at.
    None,
}

/// One card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortConfig {
    /// Its name, if it is not to be called after its host side.
    pub name: Option<String>,
    /// Where the frontend comes from.
    pub frontend: Frontend,
    /// Where frames go.
    pub host: Host,
    /// Pairs of rings.
    pub queue_pairs: u16,
    /// The card's address, if it is ours to set.
    pub mac: Option<MacAddress>,
    /// The card's MTU in bytes.
    pub mtu: u16,
    /// Who the guest is, if it may only speak for itself.
    pub identity: Option<Identity>,
    /// What of it is denied.
    pub tx_filter: Filter,
    /// What is denied of what it is given.
    pub rx_filter: Filter,
    /// How much it may be given.
    pub rx_limit: Limit,
    /// How much it may send.
    pub tx_limit: Limit,
    /// Whether the guest may be given unsegmented frames.
    pub guest_tso: bool,
    /// Whether the guest may reset single rings.
    pub ring_reset: bool,
    /// Whether the guest's memory must not be truncatable.
    pub require_sealed_memory: bool,
    /// How long to look for work before going to sleep.
    pub busy_poll: Duration,
    /// How bursts of frames are written to a TAP.
    pub tx_method: TxMethod,
    /// Processors for the workers; none: all that the process may use.
    pub cpu_affinity: Vec<usize>,
}

/// Where the frontend comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frontend {
    /// Listen at a path.
    Listen(PathBuf),
    /// An inherited descriptor.
    Inherited(RawFd),
    /// Connect to a path.
    Connect(PathBuf),
}

/// Where frames go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A TAP device by name.
    Tap(String),
    /// Inherited queues of a TAP device.
    TapDescriptors(Vec<RawFd>),
    /// AF_XDP sockets on a network device's queues.
    AfXdp(AfXdp),
    /// Back to the guest.
    Loopback,
}

/// AF_XDP sockets on a network device's queues, as `NAME[,queue=N][,mode=…][,attach=…][,steer=mac]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
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

/// How bursts of frames are written to a TAP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TxMethod {
    /// Whichever is found cheaper at the start.
    Auto,
    /// One io_uring submission for a burst; an error where it is not permitted.
    IoUring,
    /// One system call for each frame.
    Writev,
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Host::Tap(name) => write!(f, "tap {name}"),
            Host::TapDescriptors(_) => f.write_str("tap"),
            Host::AfXdp(af_xdp) => write!(f, "af_xdp {} queue {}", af_xdp.name, af_xdp.queue),
            Host::Loopback => f.write_str("loopback"),
        }
    }
}

impl PortConfig {
    /// What only one port can have: each socket, descriptor, name and host queue, as text.
    fn claims(&self) -> Vec<String> {
        let mut claims: Vec<String> = self.name.iter().map(|name| format!("name {name}")).collect();
        let descriptor = |number: &RawFd| format!("descriptor {number}");
        match &self.frontend {
            Frontend::Listen(path) | Frontend::Connect(path) => {
                claims.push(format!("socket {}", path.display()));
            }
            Frontend::Inherited(number) => claims.push(descriptor(number)),
        }
        match &self.host {
            Host::Tap(name) => claims.push(format!("tap {name}")),
            Host::TapDescriptors(numbers) => claims.extend(numbers.iter().map(descriptor)),
            Host::AfXdp(AfXdp { name, queue, .. }) => claims.extend(
                (0..self.queue_pairs).map(|pair| format!("queue {} of {name}", queue + pair)),
            ),
            Host::Loopback => {}
        }
        claims
    }
}

/// Checks that no two ports, nor the control socket, lay claim to one thing.
///
/// # Errors
/// With what is named twice.
fn check_claims(ports: &[PortConfig], control: Option<&Path>) -> Result<(), String> {
    let mut claims: Vec<String> = ports.iter().flat_map(PortConfig::claims).collect();
    claims.extend(control.map(|path| format!("socket {}", path.display())));
    claims.sort_unstable();
    match claims.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(format!("{} is named twice", pair[0])),
        None => Ok(()),
    }
}
