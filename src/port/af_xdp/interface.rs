//! A network device as the queue pairs of a port share it: one XDP program, one UMEM for all sockets of a
//! memory table.
//!
//! Invariant: wherever the program is attached, it does with frames for our queues what was wanted last.

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

/// What a frame has on top of its MTU at the most: an Ethernet header and a VLAN tag, as Linux
/// forwards frames (`is_skb_forwardable`).
pub(super) const OVERHEAD: usize = ETHERNET_LENGTH + VLAN_TAG_LENGTH;

#[derive(Debug, Default)]
struct Shared {
    wanted: QueueConfig,
    attachment: Option<Arc<Attachment>>,
    steering: Option<Steering>,
    /// What becomes of VLAN tags of frames to the guest, when that was looked up last.
    tags: Tags,
    /// Index of the other end of a veth, which the tags depend on.
    peer: Option<u32>,
    abilities: DeviceCaps,
    registered: Option<Registered>,
}

/// A network device whose queues a port uses.
#[derive(Debug)]
pub struct Interface {
    options: AfXdp,
    pairs: u16,
    busy_poll: Duration,
    /// The address whose frames are to be brought to the queue.
    steer_for: Option<MacAddress>,
    shared: Mutex<Shared>,
    /// Whether there is a filter.
    filters: AtomicBool,
    /// Index of the device that it is attached to; 0 for none.
    device: Arc<AtomicU32>,
    mtu: MtuComparison,
}

impl Interface {
    /// Attaches the program and tries each queue.
    ///
    /// # Errors
    /// There is no such device or queue, it is in use, or can't do what was asked for.
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
            steer_for: mac.filter(|_| options.steer),
            shared: Mutex::default(),
            filters: AtomicBool::new(!filter.is_none()),
            device: Arc::default(),
            mtu: MtuComparison::default(),
        });
        let link = interface.find()?;
        if !link.is_up {
            warn!("af_xdp {name}: is down; set it up with 'ip link set {name} up'");
        }
        interface.layout(&link, mtu, HEADER_LENGTH, false)?;
        if link.is_veth {
            let peer = link.veth_peer.and_then(|peer| link::at(peer).ok());
            if peer.as_ref().is_none_or(|peer| tags::leaves_checksums(peer).unwrap_or(true)) {
                let peer = peer.map_or("NAME".into(), |peer| peer.name);
                warn!(
                    "af_xdp {name}: the other end of a veth must send whole frames, with their \
                     checksums: 'ethtool -K {peer} tx off'"
                );
            }
        }
        if pairs > 1 {
            info!(
                "af_xdp {name}: serves {pairs} queue pairs; frames on the queues of pairs that the \
                 guest does not use are lost to it"
            );
        }
        let mut shared = interface.lock();
        shared.wanted.filter = filter.clone();
        shared.attachment = Some(interface.attach(&link, &shared.wanted)?);
        interface.look_for_tags(&link, &mut shared);
        shared.abilities = interface.find_abilities(&link)?;
        shared.steering = interface.steer(&link)?;
        if shared.abilities.generic {
            for joining in Joining::below(&link, &link::all().unwrap_or_default()) {
                warn!("af_xdp {name}: joined frames are lost; {joining}");
            }
        }
        drop(shared);
        (0..pairs)
            .map(|pair| {
                let watch = Watch::new()
                    .map_err(|error| OpenError(format!("watch network devices: {error}")))?;
                Ok(XdpQueue { interface: interface.clone(), pair, watch, reported: false })
            })
            .collect()
    }

    /// The device's name.
    pub(super) fn name(&self) -> &str {
        &self.options.name
    }

    /// Index of the device, as it is known at any time; 0 for none.
    pub fn device(&self) -> &Arc<AtomicU32> {
        &self.device
    }

    /// A socket for frames beside those of the queues.
    pub(super) fn packet_socket(&self) -> io::Result<OwnedFd> {
        let device = self.find().map_err(|error| io::Error::other(error.to_string()))?;
        socket::packet_socket(device.index)
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn queue(&self, pair: u16) -> u32 {
        u32::from(self.options.queue) + u32::from(pair)
    }

    fn find(&self) -> Result<Link, OpenError> {
        // Whatever it is called by now: another device may have its name.
        if let Ok(link) = link::at(self.device.load(Ordering::Relaxed)) {
            return Ok(link);
        }
        let name = self.name();
        link::find(name).map_err(|error| match error.raw_os_error() {
            Some(libc::ENODEV) => OpenError(format!(
                "there is no network device {name}; 'ip link add {name} type veth peer name …' \
                 makes one"
            )),
            _ => OpenError(format!("look up network device {name}: {error}")),
        })
    }

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
                    "cannot carry the card's MTU of {mtu} on {name}: AF_XDP takes an MTU up to \
                     {MAX_MTU} bytes; lower --mtu and the VMM's host_mtu="
                )
            } else {
                format!(
                    "{name} has an MTU of {}: AF_XDP takes an MTU up to {MAX_MTU} bytes; lower that \
                     of the device",
                    link.mtu
                )
            })
        })
    }

    /// Brings the guest's frames to the queue, if that was asked for.
    fn steer(&self, link: &Link) -> Result<Option<Steering>, OpenError> {
        let steer = |address| Steering::new(&link.name, link.index, address, self.queue(0));
        self.steer_for.map(steer).transpose()
    }

    /// Looks what becomes of VLAN tags of frames to the guest, and says so where they are lost.
    fn look_for_tags(&self, link: &Link, shared: &mut Shared) {
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

    /// Looks for the tags again if its device or the other end of a veth is among the devices that have
    /// changed; `None` stands for any.
    pub(super) fn look_for_tags_again(&self, changed: Option<&BTreeSet<u32>>) {
        let mut shared = self.lock();
        let devices = [Some(self.device.load(Ordering::Relaxed)), shared.peer];
        let is_among = |all: &BTreeSet<u32>| devices.iter().flatten().any(|it| all.contains(it));
        if changed.is_none_or(is_among)
            && let Ok(link) = self.find()
        {
            self.look_for_tags(&link, &mut shared);
        }
    }

    fn find_abilities(&self, link: &Link) -> Result<DeviceCaps, OpenError> {
        let queues = self.queue(0)..self.queue(self.pairs);
        DeviceCaps::find(self.name(), link.index, queues, self.options.mode)
    }
}
