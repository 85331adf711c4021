//! Validated configuration: the options of ports and of the daemon, from the command line or from a file that
//! describes several ports.

mod command_line;
mod file;
mod host;
mod keys;
mod net_backend;
mod options;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use log::LevelFilter;
use serde::Deserialize;

use crate::endpoint::Frontend;
use crate::net_config::MacAddress;
use crate::policy::{AllowedSources, Filter, Limit};
use crate::port::af_xdp::AfXdp;
use crate::port::tap::TxMethod;
use crate::sandbox::{Confinement, Needs};
use crate::sys::process::host_memory;

pub(crate) use command_line::level;
pub use command_line::{CheckOptions, DaemonOptions, RunOptions};
pub use file::read as read_file;
pub use keys::{Key, Place, keys};
use options::socket_path;
pub(crate) use options::{OPERATION, device_name};
pub use options::{PortChanges, PortOptions};

/// Configuration of the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Lowest level of logged lines.
    pub log_level: LevelFilter,
    /// File that the configuration was read from.
    pub file: Option<PathBuf>,
    /// Take-over of the ports of the daemon that listens on `control`.
    pub take_over: bool,
    /// Path of the control socket.
    pub control: Option<PathBuf>,
    /// Address at which metrics are served.
    pub metrics: Option<MetricsAddress>,
    /// Settings of the sandbox that the daemon enters once everything is open.
    pub confinement: Confinement,
    /// Ports that the daemon serves from its start: at least one, unless there is a control socket.
    pub ports: Vec<PortConfig>,
}

/// Address at which metrics are served: a unix socket, or a loopback address of this host.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum MetricsAddress {
    /// Path of a unix socket.
    Unix(PathBuf),
    /// A loopback address and a TCP port.
    Tcp(SocketAddr),
}

impl FromStr for MetricsAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with('/') {
            return socket_path(text.into()).map(MetricsAddress::Unix);
        }
        match text.parse::<SocketAddr>() {
            Ok(address) if address.ip().is_loopback() => Ok(MetricsAddress::Tcp(address)),
            Ok(address) => Err(format!(
                "{address} is not a loopback address: every client could read all ports' metrics; write \
                 127.0.0.1:{}, behind a proxy that requires a password",
                address.port()
            )),
            Err(_) => Err(format!(
                "'{text}' is not an address for metrics; write 127.0.0.1:9560 or /PATH"
            )),
        }
    }
}

impl TryFrom<String> for MetricsAddress {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for MetricsAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MetricsAddress::Unix(path) => path.display().fmt(f),
            MetricsAddress::Tcp(address) => address.fmt(f),
        }
    }
}

/// Configuration of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortConfig {
    /// Options that the configuration was made of.
    pub options: PortOptions,
    /// Name, unless the port is called after its host side.
    pub name: Option<String>,
    /// Origin of the frontend's connections.
    pub frontend: Frontend,
    /// Group that may connect to the port's socket.
    pub socket_group: Option<String>,
    /// Host side.
    pub host: Host,
    /// Number of queue pairs, 1 to 128.
    pub queue_pairs: u16,
    /// MAC address of the device, unless the VMM sets it.
    pub mac: Option<MacAddress>,
    /// MTU of the device in bytes.
    pub mtu: u16,
    /// Allowed source addresses, if anti-spoofing is on.
    pub allowed_sources: Option<AllowedSources>,
    /// Packet filter for frames of the guest.
    pub tx_filter: Filter,
    /// Packet filter for frames to the guest.
    pub rx_filter: Filter,
    /// Rate limit for frames to the guest.
    pub rx_limit: Limit,
    /// Rate limit for frames of the guest.
    pub tx_limit: Limit,
    /// Link state; frames move only while it is up.
    pub link: bool,
    /// Offer of GSO frames to the guest.
    pub guest_tso: bool,
    /// Offer of the reset of single rings.
    pub ring_reset: bool,
    /// Refusal of guest memory that can be truncated.
    pub require_sealed_memory: bool,
    /// Limit on the mapped bytes of the VMM's files; see [`memory_limit`](Self::memory_limit) for its default.
    pub max_memory: Option<u64>,
    /// Time to poll before each sleep; `None` polls for replies of the guest only.
    pub busy_poll: Option<Duration>,
    /// Method of writing bursts of frames to a TAP.
    pub tx_method: TxMethod,
    /// CPUs of the workers, in turn; empty permits all CPUs of the process.
    pub cpu_affinity: Vec<usize>,
}

/// Host side of a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// A TAP device by name.
    Tap(String),
    /// Inherited queues of a TAP device.
    TapDescriptors(Vec<RawFd>),
    /// AF_XDP sockets on a network device's queues.
    AfXdp(AfXdp),
    /// None: each frame returns to the guest.
    Loopback,
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

impl Host {
    /// Returns the option that selects this host side.
    fn key(&self) -> &'static str {
        match self {
            Host::Tap(_) => "tap",
            Host::TapDescriptors(_) => "tap-fd",
            Host::AfXdp(_) => "af-xdp",
            Host::Loopback => "loopback",
        }
    }
}

impl Config {
    /// Returns the rights that the sandboxed daemon needs for its ports, its control socket and its metrics.
    pub fn needs(&self) -> Needs<'_> {
        let listening = self.ports.iter().filter_map(|port| match &port.frontend {
            Frontend::Listen(path) => Some(path.as_path()),
            Frontend::Inherited(_) | Frontend::Connect(_) => None,
        });
        let metrics = match &self.metrics {
            Some(MetricsAddress::Unix(path)) => Some(path.as_path()),
            Some(MetricsAddress::Tcp(_)) | None => None,
        };
        Needs {
            af_xdp: self.ports.iter().any(|port| matches!(port.host, Host::AfXdp(_))),
            sockets: listening.chain(self.control.as_deref()).chain(metrics).collect(),
        }
    }

    /// Returns the daemon's own settings, which are fixed while the daemon runs, as keys and values.
    pub fn settings(&self) -> BTreeMap<&'static str, String> {
        let Config { log_level, control, metrics, confinement, .. } = self;
        let Confinement { seccomp, user, group } = confinement;
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let control = control.as_ref().map(|path| path.display().to_string());
        BTreeMap::from([
            ("log-level", log_level.to_string()),
            ("control", text(&control)),
            ("metrics", text(&metrics.as_ref().map(ToString::to_string))),
            ("seccomp", format!("{seccomp:?}")),
            ("user", text(user)),
            ("group", text(group)),
        ])
    }
}

impl PortConfig {
    /// Returns the port's name; `None` if the port is called after the device of inherited descriptors.
    pub fn known_name(&self) -> Option<&str> {
        self.name.as_deref().or(match &self.host {
            Host::Tap(name) => Some(name),
            Host::AfXdp(af_xdp) => Some(&af_xdp.name),
            Host::Loopback => Some("loopback"),
            Host::TapDescriptors(_) => None,
        })
    }

    /// Returns the keys that differ and are fixed while the port runs. A value equal to the default does not
    /// differ from an omitted one, nor does the order of a set.
    pub fn fixed_differences(&self, other: &Self) -> Vec<&'static str> {
        let mut keys = Vec::new();
        let mut differ = |key, differs: bool| keys.extend(differs.then_some(key));
        differ("name", self.known_name() != other.known_name());
        let frontends = self.frontend != other.frontend;
        differ(self.frontend.key(), frontends);
        differ(other.frontend.key(), frontends && self.frontend.key() != other.frontend.key());
        differ("socket-group", self.socket_group != other.socket_group);
        let hosts = self.host != other.host;
        differ(self.host.key(), hosts);
        differ(other.host.key(), hosts && self.host.key() != other.host.key());
        differ("queue-pairs", self.queue_pairs != other.queue_pairs);
        differ("mac", self.mac != other.mac);
        differ("mtu", self.mtu != other.mtu);
        differ("guest-tso", self.guest_tso != other.guest_tso);
        differ("ring-reset", self.ring_reset != other.ring_reset);
        let sealed = self.require_sealed_memory != other.require_sealed_memory;
        differ("require-sealed-memory", sealed);
        differ("max-memory", self.memory_limit() != other.memory_limit());
        differ("busy-poll", self.busy_poll != other.busy_poll);
        differ("tx-method", self.tx_method != other.tx_method);
        differ("cpu-affinity", self.cpu_affinity != other.cpu_affinity);
        keys
    }

    /// Returns true if the settings that can change while the port runs are equal.
    pub fn is_live_equal(&self, other: &Self) -> bool {
        let live = |it: &Self| (it.allowed_sources.clone(), it.link, it.rx_limit, it.tx_limit);
        live(self) == live(other)
            && self.tx_filter == other.tx_filter
            && self.rx_filter == other.rx_filter
    }

    /// Returns the policy in force as options and their values.
    pub fn policy(&self) -> [(&'static str, String); 6] {
        let anti_spoofing = self.allowed_sources.as_ref().map_or("off".into(), ToString::to_string);
        [
            ("anti-spoofing", anti_spoofing),
            ("tx-filter", self.tx_filter.to_string()),
            ("rx-filter", self.rx_filter.to_string()),
            ("tx-limit", self.tx_limit.to_string()),
            ("rx-limit", self.rx_limit.to_string()),
            ("link", if self.link { "on" } else { "off" }.into()),
        ]
    }

    /// Returns the limit on the port's mapped bytes [default: twice the host's RAM, at least 64 GiB]. Guests
    /// can have more memory than the host, which swaps or shares pages.
    pub fn memory_limit(&self) -> u64 {
        self.max_memory.unwrap_or_else(|| host_memory().saturating_mul(2).max(64 << 30))
    }

    /// Returns why this port and the port `name` exclude each other, if they do. `other` is that port's
    /// configuration if it runs.
    pub fn conflict(&self, name: &str, other: Option<&Self>) -> Option<String> {
        if self.known_name() == Some(name) {
            return Some(format!("port {name} already exists; remove it first"));
        }
        let claim = check_claims(&[self, other?], std::iter::empty()).err()?;
        Some(format!("{claim} belongs to port {name}; name another, or remove that port"))
    }

    /// Returns the sockets, names and host queues that only one port can have, as text.
    fn claims(&self) -> Vec<String> {
        let mut claims: Vec<String> = self.name.iter().map(|name| format!("name {name}")).collect();
        if let Frontend::Listen(path) | Frontend::Connect(path) = &self.frontend {
            claims.push(format!("socket {}", path.display()));
        }
        match &self.host {
            Host::Tap(name) => claims.push(format!("tap {name}")),
            Host::AfXdp(AfXdp { name, queue, .. }) => claims.extend(
                (0..self.queue_pairs).map(|pair| format!("queue {} of {name}", queue + pair)),
            ),
            Host::TapDescriptors(_) | Host::Loopback => {}
        }
        claims
    }

    /// Returns the inherited descriptors, which only one port can have at the start, as text.
    pub(crate) fn descriptors(&self) -> Vec<String> {
        let frontend = match self.frontend {
            Frontend::Inherited(number) => Some(number),
            Frontend::Listen(_) | Frontend::Connect(_) => None,
        };
        let queues = match &self.host {
            Host::TapDescriptors(numbers) => numbers.as_slice(),
            _ => &[],
        };
        let numbers = frontend.iter().chain(queues);
        numbers.map(|number| format!("descriptor {number}")).collect()
    }
}

/// Checks that the ports of one start and the control socket do not exclude each other.
///
/// # Errors
/// An object is claimed twice. The line names it.
fn check_start(ports: &[PortConfig], control: Option<&Path>) -> Result<(), String> {
    let descriptors = ports.iter().flat_map(PortConfig::descriptors);
    let control = control.map(|path| format!("socket {}", path.display()));
    check_claims(&ports.iter().collect::<Vec<_>>(), descriptors.chain(control))
        .map_err(|claim| format!("{claim} is used twice; name another one"))
}

/// Checks that no object is claimed by two of these ports, or by one of them and `others`.
///
/// # Errors
/// An object is claimed twice. The error is its name.
fn check_claims(ports: &[&PortConfig], others: impl Iterator<Item = String>) -> Result<(), String> {
    let claims = ports.iter().flat_map(|port| port.claims());
    let mut claims: Vec<String> = claims.chain(others).collect();
    claims.sort_unstable();
    match claims.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(pair[0].clone()),
        None => Ok(()),
    }
}
