//! A network device, shared by the queue pairs of a port: one XDP program, and one UMEM for all sockets of a
//! memory table.
//!
//! Invariant: the attached program treats frames for our queues by the last [`QueueConfig`], on any device.

mod queue_config;
mod sockets;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use log::{info, warn};

use super::device_caps::DeviceCaps;
use super::joining::Joining;
use super::program::Attachment;
use super::steering::Steering;
use super::tags::{self, Tags};
use super::umem::FrameLayout;
use super::{AfXdp, MAX_MTU, OpenError, XdpQueue};
use crate::features::HEADER_LENGTH;
use crate::frame::{ETHERNET_LENGTH, VLAN_TAG_LENGTH};
use crate::net_config::MacAddress;
use crate::policy::Filter;
use crate::port::mtu::MtuComparison;
use crate::sys::link::{self, Link, Watch};
use crate::sys::socket;

use queue_config::QueueConfig;
use sockets::Registered;
pub(super) use sockets::{Failure, OpenSocket};

/// Bytes by which a frame may exceed the MTU: an Ethernet header and one VLAN tag, as Linux forwards frames
/// (`is_skb_forwardable`).
pub(super) const OVERHEAD: usize = ETHERNET_LENGTH + VLAN_TAG_LENGTH;

/// State that the queue pairs' workers and the control thread share.
#[derive(Debug, Default)]
struct Shared {
    queue_config: QueueConfig,
    attachment: Option<Arc<Attachment>>,
    steering: Option<Steering>,
    /// State of VLAN tags in frames to the guest, at the last check.
    tags: Tags,
    /// Index of a veth's other end, which `tags` depends on.
    peer: Option<u32>,
    caps: DeviceCaps,
    registered: Option<Registered>,
}

/// A network device whose queues a port uses.
#[derive(Debug)]
pub struct Interface {
    options: AfXdp,
    /// Number of queue pairs.
    pairs: u16,
    /// SO_BUSY_POLL of the sockets; 0 disables it.
    busy_poll: Duration,
    /// MAC address whose frames a flow rule steers to the queue.
    steered_address: Option<MacAddress>,
    shared: Mutex<Shared>,
    /// The queues have a filter: a copy that workers read without the lock.
    has_filter: AtomicBool,
    /// Index of the device that the program is attached to; 0 for none.
    device: Arc<AtomicU32>,
    mtu: MtuComparison,
}

impl Interface {
    /// Attaches the program, and tries each queue by binding a socket to it.
    ///
    /// # Errors
    /// The device or a queue does not exist, a queue is in use, or the device lacks a required capability.
    pub fn start(
        options: &AfXdp,
        pairs: u16,
        mtu: u16,
        mac: Option<MacAddress>,
        busy_poll: Duration,
        filter: &Filter,
    ) -> Result<Vec<XdpQueue>, OpenError> {
        let name = &options.name;
        let interface = Arc::new(Interface {
            options: options.clone(),
            pairs,
            busy_poll,
            steered_address: mac.filter(|_| options.steer),
            shared: Mutex::default(),
            has_filter: AtomicBool::new(!filter.is_none()),
            device: Arc::default(),
            mtu: MtuComparison::default(),
        });
        let link = interface.find()?;
        if !link.is_up {
            warn!("af_xdp {name}: device is down; set it up with 'ip link set {name} up'");
        }
        interface.layout(&link, mtu, HEADER_LENGTH, false)?;
        if link.is_veth {
            warn_of_partial_checksums(name, &link);
        }
        if pairs > 1 {
            info!(
                "af_xdp {name}: serves queue_pairs={pairs}; frames on queues of pairs that the guest \
                 does not use go to the host"
            );
        }
        let mut shared = interface.lock();
        shared.queue_config.filter = filter.clone();
        shared.attachment = Some(interface.attach(&link, &shared.queue_config)?);
        interface.check_tags(&link, &mut shared);
        shared.caps = interface.find_caps(&link)?;
        shared.steering = interface.steer(&link)?;
        if shared.caps.generic {
            for joining in Joining::below(&link, &link::all().unwrap_or_default()) {
                warn!("af_xdp {name}: merged frames are lost; {joining}");
            }
        }
        drop(shared);
        (0..pairs)
            .map(|pair| {
                let watch = Watch::new()
                    .map_err(|error| OpenError(format!("cannot watch network devices: {error}")))?;
                Ok(XdpQueue { interface: interface.clone(), pair, watch, reported: false })
            })
            .collect()
    }

    /// Returns the name that the operator gave, which the device may have lost since.
    pub(super) fn name(&self) -> &str {
        &self.options.name
    }

    /// Returns the index of the device, which follows a replaced device; 0 for none.
    pub fn device(&self) -> &Arc<AtomicU32> {
        &self.device
    }

    /// Opens a packet socket on the device, for frames beside those of the queues.
    pub(super) fn packet_socket(&self) -> io::Result<OwnedFd> {
        let device = self.find().map_err(|error| io::Error::other(error.to_string()))?;
        socket::packet_socket(device.index)
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Returns the device queue of a queue pair.
    fn queue(&self, pair: u16) -> u32 {
        u32::from(self.options.queue) + u32::from(pair)
    }

    /// Looks up the device: by index while that device exists, else by name.
    fn find(&self) -> Result<Link, OpenError> {
        // The index first: the device may have been renamed, and another one may have its name.
        if let Ok(link) = link::at(self.device.load(Ordering::Relaxed)) {
            return Ok(link);
        }
        let name = self.name();
        link::find(name).map_err(|error| match error.raw_os_error() {
            Some(libc::ENODEV) => OpenError(format!(
                "there is no network device {name}; 'ip link add {name} type veth peer name …' \
                 makes one"
            )),
            _ => OpenError(format!("cannot look up network device {name}: {error}")),
        })
    }

    /// Returns the frame layout for the larger of the device's MTU and the port's.
    fn layout(
        &self,
        link: &Link,
        mtu: u16,
        header_length: usize,
        zero_copy: bool,
    ) -> Result<FrameLayout, OpenError> {
        let longest = link.mtu.max(mtu.into()) as usize + OVERHEAD;
        FrameLayout::new(longest, header_length, zero_copy).map_err(|_| {
            let name = self.name();
            OpenError(if u32::from(mtu) > link.mtu {
                format!(
                    "cannot carry the port's MTU of {mtu} on {name}: AF_XDP supports an MTU up to \
                     {MAX_MTU} bytes; lower --mtu and the VMM's host_mtu="
                )
            } else {
                format!(
                    "{name} has an MTU of {}: AF_XDP supports an MTU up to {MAX_MTU} bytes; lower \
                     the device's MTU",
                    link.mtu
                )
            })
        })
    }

    /// Inserts the flow rule for the guest's frames, if the options ask for it.
    fn steer(&self, link: &Link) -> Result<Option<Steering>, OpenError> {
        let steer = |address| Steering::new(&link.name, link.index, address, self.queue(0));
        self.steered_address.map(steer).transpose()
    }

    /// Checks if frames to the guest keep their VLAN tags, and logs a warning when they start to lose them.
    fn check_tags(&self, link: &Link, shared: &mut Shared) {
        let restored = shared.attachment.as_ref().is_some_and(|it| it.restores_tags);
        let tags = if restored { Tags::Kept } else { Tags::of(link) };
        if tags != shared.tags
            && let Some(warning) = tags.warning()
        {
            warn!("af_xdp {}: {warning}", self.name());
        }
        shared.tags = tags;
        shared.peer = link.veth_peer;
    }

    /// Checks the tags again if the device, or a veth's other end, is among the `changed` devices. `None`
    /// means that any device may have changed.
    pub(super) fn recheck_tags(&self, changed: Option<&BTreeSet<u32>>) {
        let mut shared = self.lock();
        let devices = [Some(self.device.load(Ordering::Relaxed)), shared.peer];
        let is_among = |all: &BTreeSet<u32>| devices.iter().flatten().any(|it| all.contains(it));
        if changed.is_none_or(is_among)
            && let Ok(link) = self.find()
        {
            self.check_tags(&link, &mut shared);
        }
    }

    fn find_caps(&self, link: &Link) -> Result<DeviceCaps, OpenError> {
        let queues = self.queue(0)..self.queue(self.pairs);
        DeviceCaps::find(self.name(), link.index, queues, self.options.mode)
    }
}

/// Logs a warning unless a veth's other end is known to complete checksums.
fn warn_of_partial_checksums(name: &str, veth: &Link) {
    let peer = veth.veth_peer.and_then(|peer| link::at(peer).ok());
    if peer.as_ref().is_none_or(|peer| tags::leaves_checksums(peer).unwrap_or(true)) {
        let peer = peer.map_or("NAME".into(), |peer| peer.name);
        warn!(
            "af_xdp {name}: the veth's other end may send partial checksums and GSO frames; TCP and UDP \
             to the guest then fail: run 'ethtool -K {peer} tx off'"
        );
    }
}
