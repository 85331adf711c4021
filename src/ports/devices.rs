//! The network devices of ports: the kernel's drops, queues of other processes, and missing owners. No frame
//! passes through here.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use log::{info, warn};

use super::opening::log_created;
use super::{Port, Ports};
use crate::config::{Host, PortConfig};
use crate::error::StartError;
use crate::event::until;
use crate::sys::device;
use crate::sys::link::{Link, Questions, Tun, Watch};
use crate::sys::tap::Queue;

/// Time from a change of a device to the count of its queues. Our own queues may come and go meanwhile, and the
/// kernel keeps those of a killed process for a moment.
const SETTLE: Duration = Duration::from_secs(1);

/// Maximum age of the kernel's answer about all devices.
const VALIDITY: Duration = Duration::from_secs(1);

/// All devices by index, and the time of the kernel's answer.
#[derive(Debug)]
struct Seen {
    at: Instant,
    links: HashMap<u32, Link>,
}

/// The state of a device's queue count.
#[derive(Debug, Default)]
struct Known {
    /// Time of the next count of the queues.
    due: Option<Instant>,
    /// Number of queues that other processes had open at the last count.
    foreign_queues: u32,
}

impl Known {
    fn is_due(&self) -> bool {
        self.due.is_some_and(|due| due <= Instant::now())
    }
}

/// The netlink sockets to ask the kernel about devices, as far as it permits.
#[derive(Debug)]
pub(super) struct Devices {
    questions: Option<Questions>,
    watch: Option<Watch>,
    known: HashMap<u32, Known>,
    /// The kernel's last answer. A request can wait for another process that changes devices, so one request
    /// serves all ports.
    seen: RefCell<Option<Seen>>,
}

impl Devices {
    /// Opens the sockets. The caller does so before the sandbox filters the main thread's system calls.
    pub(super) fn new() -> Self {
        let (questions, watch) = (Questions::open().ok(), Watch::new().ok());
        Devices { questions, watch, known: HashMap::new(), seen: RefCell::default() }
    }

    /// Returns a device as it was at most 1 s ago; `None` if it does not exist, or the kernel does not report it.
    fn at(&self, index: u32) -> Option<Link> {
        let questions = self.questions.as_ref()?;
        let mut seen = self.seen.borrow_mut();
        seen.take_if(|seen| seen.at.elapsed() > VALIDITY);
        let seen = seen.get_or_insert_with(|| {
            let links = questions.all().unwrap_or_default();
            let links = links.into_iter().map(|link| (link.index, link)).collect();
            Seen { at: Instant::now(), links }
        });
        seen.links.get(&index).cloned()
    }

    /// Discards the last answer, so that the kernel is asked again.
    fn forget(&mut self) {
        self.seen.take();
    }
}

impl Port {
    fn device_index(&self) -> u32 {
        self.status().device.load(Ordering::Relaxed)
    }
}

/// The queues of a device that one port needs for itself.
pub struct Claim<'a> {
    port: &'a str,
    /// The device's index; 0 if the index is unknown.
    device: u32,
    queues: Range<u16>,
}

impl<'a> Claim<'a> {
    /// Creates the claim of a port on the device with this index.
    pub fn new(port: &'a str, device: u32, config: &PortConfig) -> Self {
        let queues = match &config.host {
            Host::AfXdp(af_xdp) => af_xdp.queue..af_xdp.queue + config.queue_pairs,
            Host::Tap(_) | Host::TapDescriptors(_) | Host::Loopback => 0..u16::MAX,
        };
        Claim { port, device, queues }
    }
}

/// Checks that no two ports claim the same queues of a device, whatever name they use for it.
///
/// # Errors
/// The names of both ports.
pub fn check_devices<'a>(claims: impl Iterator<Item = Claim<'a>>) -> Result<(), StartError> {
    let mut before: Vec<Claim<'_>> = Vec::new();
    for claim in claims.filter(|claim| claim.device != 0) {
        let overlaps = |other: &&Claim<'_>| {
            other.device == claim.device
                && other.queues.start < claim.queues.end
                && claim.queues.start < other.queues.end
        };
        if let Some(other) = before.iter().find(overlaps) {
            return Err(StartError::new(format!(
                "cannot start port {}: port {} uses the same device under another name; choose another device",
                claim.port, other.port
            )));
        }
        before.push(claim);
    }
    Ok(())
}

/// Returns name and index of a port's device; 0 if the index is unknown. Opening the device reports any
/// error.
fn find_device(config: &PortConfig, queues: &[OwnedFd]) -> (String, u32) {
    let queue = queues.first().and_then(|fd| Queue::inherit(fd.try_clone().ok()?).ok());
    if let Some(queue) = queue {
        let identity = queue.identity();
        return (identity.name.clone(), identity.index.unwrap_or(0));
    }
    let name = match &config.host {
        Host::Tap(name) => name,
        Host::AfXdp(af_xdp) => &af_xdp.name,
        Host::TapDescriptors(_) | Host::Loopback => return (String::new(), 0),
    };
    (name.clone(), device::index(name).ok().flatten().unwrap_or(0))
}

impl Ports {
    /// Checks that no port except `replaced` claims the device of a new port. `queues` are those that came with the
    /// request. No setting of the device changes: it may be a running port's.
    ///
    /// # Errors
    /// The name of the port that has the device.
    pub(super) fn check_device(
        &self,
        config: &PortConfig,
        queues: &[OwnedFd],
        replaced: Option<&str>,
    ) -> Result<(), StartError> {
        let (name, device) = find_device(config, queues);
        let name = config.known_name().unwrap_or(&name);
        let others = self
            .iter()
            .filter(|port| Some(port.name()) != replaced && !port.status().has_ended())
            .map(|port| Claim::new(port.name(), port.device_index(), port.config()));
        check_devices(others.chain([Claim::new(name, device, config)]))
    }

    /// Returns a port's device as it was at most 1 s ago; `None` if the kernel does not report it.
    pub fn device(&self, port: &Port) -> Option<Link> {
        let index = port.device_index();
        (index != 0).then(|| self.devices.at(index)).flatten()
    }

    /// Logs that the TAP of a new port was created for it, by the client or the helper process that passed its
    /// queues: the TAP exists only until its last queue is closed, and no other process has a queue.
    pub(super) fn log_created_tap(&mut self, name: &str) {
        self.devices.forget();
        let Ok(port) = self.find(name) else { return };
        let pairs = u32::from(port.config().queue_pairs);
        let is_new = |tun: &Tun| !tun.persistent && tun.queues <= pairs;
        if matches!(port.config().host, Host::Tap(_))
            && let Some(link) = self.device(port)
            && link.tun.as_ref().is_some_and(is_new)
        {
            log_created(&link.name);
        }
    }

    /// Returns the number of queues of a port's TAP that other processes had open at the last count.
    pub fn foreign_queues(&self, port: &Port) -> u32 {
        self.devices.known.get(&port.device_index()).map_or(0, |known| known.foreign_queues)
    }

    /// Returns the descriptor that becomes readable when a network device has changed.
    pub fn device_changes(&self) -> Option<BorrowedFd<'_>> {
        self.devices.watch.as_ref().map(AsFd::as_fd)
    }

    /// Schedules a count of the queues of devices that have changed.
    pub fn note_device_changes(&mut self) {
        let devices = &mut self.devices;
        devices.forget();
        let Some(changed) = devices.watch.as_ref().map(Watch::clear) else { return };
        let due = Instant::now() + SETTLE;
        for (index, known) in &mut devices.known {
            if changed.as_ref().is_none_or(|changed| changed.contains(index)) {
                known.due.get_or_insert(due);
            }
        }
    }

    /// Checks the devices of new ports, and counts the queues that are due; returns the time until the next count.
    pub fn look_at_devices(&mut self) -> Option<Duration> {
        let mut known = std::mem::take(&mut self.devices.known);
        let mut next = HashMap::new();
        let is_due = |port: &Port| known.get(&port.device_index()).is_none_or(Known::is_due);
        let on_taps = |port: &&Port| port.tap().is_some() && port.device_index() != 0;
        if self.iter().filter(on_taps).any(is_due) {
            self.devices.forget();
        }
        for port in self.iter().filter(on_taps) {
            let index = port.device_index();
            let state = known.remove(&index).unwrap_or_else(|| {
                if let Some(link) = self.devices.at(index) {
                    warn_of_missing_owner(port, &link);
                }
                Known { due: Some(Instant::now() + SETTLE), foreign_queues: 0 }
            });
            next.insert(index, self.count_queues(port, state));
        }
        let due = next.values().filter_map(|known| known.due).min();
        self.devices.known = next;
        until(due)
    }

    /// Counts the queues of a port's TAP, if the count is due.
    fn count_queues(&self, port: &Port, known: Known) -> Known {
        if !known.is_due() {
            return known;
        }
        let Some(link) = self.devices.at(port.device_index()) else {
            return Known { due: None, ..known };
        };
        let (name, device) = (port.name(), &link.name);
        let open = link.tun.as_ref().map_or(0, |tun| tun.queues);
        let foreign_queues = open.saturating_sub(u32::from(port.config().queue_pairs));
        if foreign_queues > known.foreign_queues {
            warn!(
                "{name}: other processes have {foreign_queues} queues of tap {device}; frames that the kernel \
                 steers there do not reach the guest; 'vhost-user-net doctor --tap={device}' names the \
                 processes"
            );
        } else if foreign_queues == 0 && known.foreign_queues > 0 {
            info!("{name}: other processes have no queues of tap {device} any more");
        }
        Known { due: None, foreign_queues }
    }
}

/// Warns of a TAP without owner and group: every user who can open /dev/net/tun can attach to it
/// (`tun_not_capable` of drivers/net/tun.c).
fn warn_of_missing_owner(port: &Port, link: &Link) {
    let ownerless = |tun: &Tun| tun.owner.is_none() && tun.group.is_none();
    if link.tun.as_ref().is_some_and(ownerless) {
        let device = &link.name;
        warn!(
            "{}: tap {device} has no owner; every user of this host can attach to it and read its frames; \
             create it with 'ip tuntap add dev {device} … user NAME'",
            port.name()
        );
    }
}
