//! The sockets on a device's queues: each is opened on the UMEM that all sockets of a memory table share,
//! bound to its queue, and closed.
//!
//! Invariant: a UMEM is registered for as long as one of its sockets is open, and for one memory table.
//! When a socket is closed, neither kernel nor device touches the guest's memory any more.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Instant;

use log::{debug, info, warn};

use super::Interface;
use crate::guest::GuestMemory;
use crate::port::af_xdp::OpenError;
use crate::port::af_xdp::device_caps::{refused, wait_for_device};
use crate::port::af_xdp::receiver::RING_SIZES;
use crate::port::af_xdp::umem::GuestUmem;
use crate::sys::link;
use crate::sys::xsk::{Binding, Registrable, Registration, Socket, Statistics};

/// Memory in bytes that the kernel may use for frames of a socket on their way: a full ring of
/// them, at what each takes with its bookkeeping.
const SEND_BUFFER: u32 = 4 << 20;
/// Frames that one busy poll of the driver handles.
const BUSY_POLL_BUDGET: u32 = 64;

/// Why a socket could not be opened.
#[derive(Debug)]
pub(in crate::port::af_xdp) enum Failure {
    /// The queue has another socket, maybe our own that was just closed.
    Busy(OpenError),
    /// The device does not work.
    Gone(OpenError),
}

/// A socket bound to its queue.
#[derive(Debug)]
pub(in crate::port::af_xdp) struct OpenSocket {
    pub(in crate::port::af_xdp) socket: Socket,
    pub(in crate::port::af_xdp) umem: Arc<GuestUmem>,
    /// Whether frames may ask for a checksum by metadata.
    pub(in crate::port::af_xdp) metadata: bool,
    /// Whether the kernel is to be asked for frames, rather than waited for.
    pub(in crate::port::af_xdp) busy_poll: bool,
    binding: Binding,
    /// Whether the program runs in the kernel's generic code.
    pub(in crate::port::af_xdp) generic: bool,
    /// MTU of the device in bytes, when it was opened.
    device_mtu: u32,
}

impl OpenSocket {
    /// Whether the device reads and writes the guest's memory itself.
    pub(in crate::port::af_xdp) fn is_zero_copy(&self) -> bool {
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
pub(super) struct Registered {
    guest: Arc<GuestMemory>,
    umem: Arc<GuestUmem>,
    sockets: Vec<(u16, Weak<OwnedFd>)>,
}

impl Interface {
    /// Opens a queue pair's socket on `memory`. `fill` posts buffers: drivers want some before
    /// the socket is bound.
    pub(in crate::port::af_xdp) fn open(
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
    pub(in crate::port::af_xdp) fn stop_receiving(&self, pair: u16) {
        if let Some(attachment) = &self.lock().attachment {
            // It fails if it was not there, or the device has gone.
            let _ = attachment.pass(self.queue(pair));
        }
    }

    /// Closes a socket. When this returns, neither kernel nor device touches the guest's memory
    /// any more. Returns what the kernel has counted.
    pub(in crate::port::af_xdp) fn close(&self, pair: u16, open: OpenSocket) -> Statistics {
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
    pub(in crate::port::af_xdp) fn check(
        &self,
        open: &OpenSocket,
    ) -> Result<Option<&'static str>, OpenError> {
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
