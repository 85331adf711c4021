//! A network device and the sockets on its queues, as the queue pairs of a port share them: one
//! XDP program, one UMEM for all sockets of a memory table.

mod wanted;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::{Duration, Instant};

use log::{debug, info, warn};

use super::abilities::{Abilities, refused, wait_for_device};
use super::joining::Joining;
use super::program::Attachment;
use super::receiver::RING_SIZES;
use super::steering::Steering;
use super::tags::{self, Tags};
use super::umem::{FrameLayout, GuestUmem};
use super::{MAX_MTU, OpenError, XdpQueue};
use crate::config::AfXdp;
use crate::features::HEADER_LENGTH;
use crate::guest::GuestMemory;
use crate::net_config::MacAddress;
use crate::policy::Filter;
use crate::port::mtu::MtuComparison;
use crate::sys::link::{self, Link, Watch};
use crate::sys::socket;
use crate::sys::xsk::{Binding, Registration, Socket, Statistics};

use wanted::Wanted;

/// What a frame has on top of its MTU at the most: an Ethernet header and a VLAN tag, as Linux
/// forwards frames (`is_skb_forwardable`).
pub(super) const OVERHEAD: usize = 18;
/// Memory in bytes that the kernel may use for frames of a socket on their way: a full ring of
/// them, at what each takes with its bookkeeping.
const SEND_BUFFER: u32 = 4 << 20;
/// Frames that one busy poll of the driver handles.
const BUSY_POLL_BUDGET: u32 = 64;

/// Why a socket could not be opened.
#[derive(Debug)]
pub(super) enum Failure {
    /// The queue has another socket, maybe our own that was just closed.
    Busy(OpenError),
    /// The device does not work.
    Gone(OpenError),
}

/// A socket bound to its queue.
#[derive(Debug)]
pub(super) struct OpenSocket {
    pub(super) socket: Socket,
    pub(super) umem: Arc<GuestUmem>,
    /// Whether frames may ask for a checksum by metadata.
    pub(super) metadata: bool,
    /// Whether the kernel is to be asked for frames, rather than waited for.
    pub(super) busy_poll: bool,
    binding: Binding,
    /// Whether the program runs in the kernel's generic code.
    pub(super) generic: bool,
    /// MTU of the device in bytes, when it was opened.
    device_mtu: u32,
}

impl OpenSocket {
    /// Whether the device reads and writes the guest's memory itself.
    pub(super) fn is_zero_copy(&self) -> bool {
        self.binding.zero_copy
    }
}

impl AsFd for OpenSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The UMEM of the sockets that are open.
#[derive(Debug)]
struct Registered {
    guest: Arc<GuestMemory>,
    umem: Arc<GuestUmem>,
    sockets: Vec<(u16, Weak<OwnedFd>)>,
}

#[derive(Debug, Default)]
struct Shared {
    wanted: Wanted,
    attachment: Option<Arc<Attachment>>,
    steering: Option<Steering>,
    /// What becomes of VLAN tags of frames to the guest, when that was looked up last.
    tags: Tags,
    /// Index of the other end of a veth, which the tags depend on.
    peer: Option<u32>,
    abilities: Abilities,
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

    fn find_abilities(&self, link: &Link) -> Result<Abilities, OpenError> {
        let queues = self.queue(0)..self.queue(self.pairs);
        Abilities::find(self.name(), link.index, queues, self.options.mode)
    }

    /// Opens a queue pair's socket on `memory`. `fill` posts buffers: drivers want some before
    /// the socket is bound.
    pub(super) fn open(
        &self,
        pair: u16,
        memory: &Arc<GuestMemory>,
        mtu: u16,
        header_length: usize,
        receives: bool,
        fill: impl FnOnce(&mut Socket, &GuestUmem),
    ) -> Result<OpenSocket, Failure> {
        let link = self.find().map_err(Failure::Gone)?;
        if !link.is_up {
            let why = format!("it is down; set it up with 'ip link set {} up'", link.name);
            return Err(Failure::Gone(OpenError(why)));
        }
        let mut shared = self.lock();
        let shared = &mut *shared;
        if !shared.attachment.as_ref().is_some_and(|attachment| attachment.is_on(link.index)) {
            // Another device than before.
            shared.attachment = None;
            let attached = self.attach(&link, &shared.wanted);
            shared.attachment = Some(attached.map_err(Failure::Gone)?);
            self.look_for_tags(&link, shared);
            shared.abilities = self.find_abilities(&link).map_err(Failure::Gone)?;
        }
        if !shared.steering.as_ref().is_some_and(|steering| steering.is_on(link.index)) {
            shared.steering = None;
            shared.steering = self.steer(&link).map_err(Failure::Gone)?;
        }
        let abilities = shared.abilities;
        let layout =
            self.layout(&link, mtu, header_length, abilities.zero_copy).map_err(Failure::Gone)?;
        let queue = self.queue(pair);
        let binding = abilities.binding(link.index, queue);
        let failure = |error: io::Error| {
            let busy = error.raw_os_error() == Some(libc::EBUSY);
            let error = refused(self.name(), binding, &error);
            if busy { Failure::Busy(error) } else { Failure::Gone(error) }
        };

        // A socket of another queue pair whose UMEM this is.
        let first = shared.registered.as_ref().and_then(|registered| {
            let same = Arc::ptr_eq(&registered.guest, memory) && registered.umem.layout == layout;
            let mut live = registered.sockets.iter().filter_map(|(_, socket)| socket.upgrade());
            same.then(|| live.next().map(|socket| (socket, registered.umem.clone()))).flatten()
        });
        let (registration, umem) = match &first {
            Some((socket, umem)) => (Registration::Shared(socket.as_fd()), umem.clone()),
            None => {
                let umem = GuestUmem::new(memory, self.pairs, layout).map_err(|error| {
                    Failure::Gone(OpenError(format!("map the guest's memory: {error}")))
                })?;
                let headroom = layout.headroom();
                (Registration::New { headroom, metadata: abilities.metadata }, Arc::new(umem))
            }
        };
        let started = Instant::now();
        let mut socket = Socket::new(umem.memory(), RING_SIZES, &registration)
            .map_err(|error| Failure::Gone(not_registered(&error, umem.memory().length())))?;
        fill(&mut socket, &umem);
        let redirect = |socket: &Socket| match &shared.attachment {
            Some(attachment) if receives => attachment
                .redirect(queue, socket.descriptor(), layout.header as u32)
                .map_err(|error| {
                    let why = format!("redirect frames of queue {queue} to a socket: {error}");
                    Failure::Gone(OpenError(why))
                }),
            _ => Ok(()),
        };
        if abilities.zero_copy {
            // Frames that come between binding and redirecting are in its buffers already, which
            // would go round in another order then.
            redirect(&socket)?;
        }
        socket.bind(binding, &registration).map_err(failure)?;
        if !abilities.zero_copy {
            redirect(&socket)?;
        }
        if abilities.zero_copy && !socket.is_zero_copy().unwrap_or(false) {
            let why = "the kernel bound the socket without zero copy".into();
            return Err(Failure::Gone(OpenError(why)));
        }
        socket.set_send_buffer(SEND_BUFFER);
        let busy_poll = !self.busy_poll.is_zero();
        if busy_poll && let Err(error) = socket.prefer_busy_poll(self.busy_poll, BUSY_POLL_BUDGET) {
            debug!("af_xdp {}: the kernel does not busy-poll: {error}", self.name());
        }
        let entry = (pair, Arc::downgrade(socket.descriptor()));
        match (&mut shared.registered, first.is_some()) {
            (Some(registered), true) => registered.sockets.push(entry),
            (registered, _) => {
                *registered = Some(Registered {
                    guest: memory.clone(),
                    umem: umem.clone(),
                    sockets: vec![entry],
                });
            }
        }
        info!(
            "af_xdp {}: queue {queue} bound in {} mode, {} MiB of guest memory registered in {:?}",
            self.name(),
            if abilities.zero_copy { "zero-copy" } else { "copy" },
            umem.memory().length() >> 20,
            started.elapsed(),
        );
        self.mtu.compare("af_xdp", self.name(), link.mtu, mtu);
        Ok(OpenSocket {
            socket,
            umem,
            metadata: abilities.metadata,
            busy_poll,
            binding,
            generic: abilities.generic,
            device_mtu: link.mtu,
        })
    }

    /// Has frames of a queue pair's passed to the host.
    pub(super) fn stop_receiving(&self, pair: u16) {
        if let Some(attachment) = &self.lock().attachment {
            // It fails if it was not there, or the device has gone.
            let _ = attachment.pass(self.queue(pair));
        }
    }

    /// Closes a socket. When this returns, neither kernel nor device touches the guest's memory
    /// any more. Returns what the kernel has counted.
    pub(super) fn close(&self, pair: u16, open: OpenSocket) -> Statistics {
        let OpenSocket { socket, umem, binding, .. } = open;
        let statistics = socket.statistics().unwrap_or_default();
        if statistics.rx_invalid + statistics.tx_invalid > 0 {
            warn!(
                "af_xdp {}: the kernel refused addresses, {} for rx and {} for tx: this is a bug",
                self.name(),
                statistics.rx_invalid,
                statistics.tx_invalid
            );
        }
        let mut shared = self.lock();
        if let Some(registered) = &mut shared.registered {
            registered.sockets.retain(|(of, _)| *of != pair);
            if registered.sockets.is_empty() {
                shared.registered = None;
            }
        }
        let counted = shared.attachment.as_ref().map(|it| it.counters(binding.queue));
        if let Some(Ok(counters)) = counted {
            info!("af_xdp {}: queue {}: {counters}", self.name(), binding.queue);
        }
        // In copy mode this is enough: closing waits until nobody is in the middle of delivering
        // (`synchronize_net` in xsk_unbind_dev), and sending copies at once.
        drop(socket);
        drop(umem);
        drop(shared);
        if binding.zero_copy {
            wait_for_device(self.name(), binding);
        }
        statistics
    }

    /// Whether a socket still can work, after its device has changed; or why it is to be opened again.
    ///
    /// # Errors
    /// Why it can't.
    pub(super) fn check(&self, open: &OpenSocket) -> Result<Option<&'static str>, OpenError> {
        match link::at(open.binding.device) {
            Ok(link) if link.is_up => {
                Ok((link.mtu != open.device_mtu).then_some("the device's MTU has changed"))
            }
            Ok(_) => Err(OpenError("it is down".into())),
            Err(error) => Err(OpenError(format!("look it up: {error}"))),
        }
    }
}

fn not_registered(error: &io::Error, bytes: usize) -> OpenError {
    let mebibytes = bytes.div_ceil(1 << 20);
    let hint = match error.raw_os_error() {
        Some(libc::ENOBUFS) => format!(
            ": it needs that much locked memory; run with CAP_IPC_LOCK, or with 'ulimit -l {}' \
             (LimitMEMLOCK={mebibytes}M)",
            mebibytes << 10
        ),
        Some(libc::ENOMEM) => ": the host has not that much memory free".into(),
        Some(libc::EFAULT) => ": it can't be pinned; is the file shorter than the region?".into(),
        _ => String::new(),
    };
    OpenError(format!("register {mebibytes} MiB of guest memory with AF_XDP: {error}{hint}"))
}
