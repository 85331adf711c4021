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

/// Everything that the daemon is told at its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What is logged.
    pub log_level: LevelFilter,
    /// The file that all of this was read from, if it was.
    pub file: Option<PathBuf>,
    /// Whether to go on with the ports of the daemon that operators ask there now.
    pub take_over: bool,
    /// Where operators ask and tell it things.
    pub control: Option<PathBuf>,
    /// Where Prometheus fetches metrics.
    pub metrics: Option<MetricsAddress>,
    /// What the daemon gives up once it has opened everything.
    pub confinement: Confinement,
    /// The cards that it serves from its start on; there is at least one, unless operators can add
    /// some.
    pub ports: Vec<PortConfig>,
}

/// Where metrics are fetched: a unix socket by its path, or an address of this machine only.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum MetricsAddress {
    /// A path.
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
                "{address} is no loopback address: whoever reaches it could read all ports' metrics; \
                 write 127.0.0.1:{}, and have something that asks for passwords before it",
                address.port()
            )),
            Err(_) => {
                Err(format!("'{text}' is no place for metrics: write 127.0.0.1:9560 or /PATH"))
            }
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

/// One card.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortConfig {
    /// What was said about it, as it was said.
    pub options: PortOptions,
    /// Its name, if it is not to be called after its host side.
    pub name: Option<String>,
    /// Where the frontend comes from.
    pub frontend: Frontend,
    /// Whose members may connect to a socket that we make.
    pub socket_group: Option<String>,
    /// Where frames go.
    pub host: Host,
    /// Pairs of rings.
    pub queue_pairs: u16,
    /// The card's address, if it is ours to set.
    pub mac: Option<MacAddress>,
    /// The card's MTU in bytes.
    pub mtu: u16,
    /// Who the guest is, if it may only speak for itself.
    pub allowed_sources: Option<AllowedSources>,
    /// What of it is denied.
    pub tx_filter: Filter,
    /// What is denied of what it is given.
    pub rx_filter: Filter,
    /// How much it may be given.
    pub rx_limit: Limit,
    /// How much it may send.
    pub tx_limit: Limit,
    /// Whether frames move at all.
    pub link: bool,
    /// Whether the guest may be given unsegmented frames.
    pub guest_tso: bool,
    /// Whether the guest may reset single rings.
    pub ring_reset: bool,
    /// Whether the guest's memory must not be truncatable.
    pub require_sealed_memory: bool,
    /// Bytes of the VMM's files that can be mapped; if it is not said, by the host's RAM.
    pub max_memory: Option<u64>,
    /// How long to look for work before going to sleep; if it is not said, for a guest's answers only.
    pub busy_poll: Option<Duration>,
    /// How bursts of frames are written to a TAP.
    pub tx_method: TxMethod,
    /// Processors for the workers; none: all that the process may use.
    pub cpu_affinity: Vec<usize>,
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
    /// The option that names it.
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
    /// Rights that the sandboxed daemon needs for its ports, its control socket and its metrics.
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

    /// What was said about the daemon itself, which can't change while it runs: keys and values.
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
    /// The port's name, unless it is to be called after a device that only its descriptors tell.
    pub fn known_name(&self) -> Option<&str> {
        self.name.as_deref().or(match &self.host {
            Host::Tap(name) => Some(name),
            Host::AfXdp(af_xdp) => Some(&af_xdp.name),
            Host::Loopback => Some("loopback"),
            Host::TapDescriptors(_) => None,
        })
    }

    /// Keys whose meaning differs, and cannot change while the port runs. Values that are written out
    /// and equal to the defaults make no difference, nor does the order of a list that has none.
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

    /// True if what can change while the port runs is the same.
    pub fn is_live_equal(&self, other: &Self) -> bool {
        let live = |it: &Self| (it.allowed_sources.clone(), it.link, it.rx_limit, it.tx_limit);
        live(self) == live(other)
            && self.tx_filter == other.tx_filter
            && self.rx_filter == other.rx_filter
    }

    /// What an operator allows the guest, by option: the values in force, in words.
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

    /// Limit on the port's mapped bytes [default: twice the host's RAM, at least 64 GiB]. Guests can
    /// have more memory than the host, which swaps or shares pages.
    pub fn memory_limit(&self) -> u64 {
        self.max_memory.unwrap_or_else(|| host_memory().saturating_mul(2).max(64 << 30))
    }

    /// Why this port can't be had beside the port `name`, which has what `other` says if it runs.
    pub fn conflict(&self, name: &str, other: Option<&Self>) -> Option<String> {
        if self.known_name() == Some(name) {
            return Some(format!("port {name} already exists; remove it first"));
        }
        let claim = check_claims(&[self, other?], std::iter::empty()).err()?;
        Some(format!("{claim} belongs to port {name}; name another, or remove that port"))
    }

    /// What only one port can have: each socket, name and host queue, as text.
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

    /// Inherited descriptors, which only one port can have while all are started.
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

/// Checks that no two of the ports that are started together, nor the control socket, lay claim to
/// one thing.
///
/// # Errors
/// With what is named twice.
fn check_start(ports: &[PortConfig], control: Option<&Path>) -> Result<(), String> {
    let descriptors = ports.iter().flat_map(PortConfig::descriptors);
    let control = control.map(|path| format!("socket {}", path.display()));
    check_claims(&ports.iter().collect::<Vec<_>>(), descriptors.chain(control))
        .map_err(|claim| format!("{claim} is named twice"))
}

/// Checks that no two of these ports lay claim to one thing, nor to what `others` claim.
///
/// # Errors
/// With what is named twice.
fn check_claims(ports: &[&PortConfig], others: impl Iterator<Item = String>) -> Result<(), String> {
    let claims = ports.iter().flat_map(|port| port.claims());
    let mut claims: Vec<String> = claims.chain(others).collect();
    claims.sort_unstable();
    match claims.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(pair[0].clone()),
        None => Ok(()),
    }
}
