//! The sockets on a device's queues. Each is opened on the UMEM that all sockets of a memory table share,
//! then bound to its queue, and closed at the session's end at the latest.
//!
//! Invariant: a UMEM is registered while one of its sockets is open, and for one memory table. After `close`,
//! neither kernel nor device accesses guest memory. The exception is a zero-copy queue that the kernel does
//! not release within 1 s, which is logged ([`wait_for_device`]).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};
use std::time::Instant;

use log::{debug, info, warn};

use super::{Interface, Shared};
use crate::guest::GuestMemory;
use crate::port::af_xdp::OpenError;
use crate::port::af_xdp::device_caps::{refused, wait_for_device};
use crate::port::af_xdp::program::Attachment;
use crate::port::af_xdp::receiver::RING_SIZES;
use crate::port::af_xdp::umem::{FrameLayout, GuestUmem};
use crate::sys::link::{self, Link};
use crate::sys::xsk::{Binding, Registrable, Registration, Socket, Statistics};

/// Bytes of kernel memory that a socket's frames in transmission may take: a full tx ring, with the kernel's
/// overhead for each frame.
const SEND_BUFFER: u32 = 4 << 20;
/// Most frames that the driver handles in one busy poll.
const BUSY_POLL_BUDGET: u32 = 64;

/// Reason why a socket could not be opened.
#[derive(Debug)]
pub(in crate::port::af_xdp) enum Failure {
    /// The queue has another socket, possibly our own that was just closed.
    Busy(OpenError),
    /// The device does not work.
    Gone(OpenError),
}

/// A socket bound to its queue.
#[derive(Debug)]
pub(in crate::port::af_xdp) struct OpenSocket {
    pub(in crate::port::af_xdp) socket: Socket,
    pub(in crate::port::af_xdp) umem: Arc<GuestUmem>,
    /// The kernel completes checksums that a frame's metadata requests.
    pub(in crate::port::af_xdp) metadata: bool,
    /// The worker must ask the kernel for frames in each turn.
    pub(in crate::port::af_xdp) busy_poll: bool,
    binding: Binding,
    /// The XDP program runs in the kernel's generic code.
    pub(in crate::port::af_xdp) generic: bool,
    /// MTU of the device in bytes, when the socket was opened.
    device_mtu: u32,
}

impl OpenSocket {
    /// Returns true if the device itself reads and writes guest memory.
    pub(in crate::port::af_xdp) fn is_zero_copy(&self) -> bool {
        self.binding.zero_copy
    }
}

impl AsFd for OpenSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// UMEM of the sockets that are open.
#[derive(Debug)]
pub(super) struct Registered {
    guest: Arc<GuestMemory>,
    umem: Arc<GuestUmem>,
    /// Queue pair and descriptor of each socket.
    sockets: Vec<(u16, Weak<OwnedFd>)>,
}

/// Redirection of a queue's frames to a socket.
struct Redirection<'a> {
    attachment: &'a Attachment,
    /// Bytes of virtio-net header that the program writes before each frame.
    header: u32,
}

impl Interface {
    /// Opens a queue pair's socket on guest `memory`, and redirects the queue's frames to it. `fill` posts
    /// buffers before the socket is bound, which some drivers require.
    ///
    /// # Errors
    /// `Busy` if the queue has a socket; `Gone` if the device is down or missing, or a system call fails.
    pub(in crate::port::af_xdp) fn open(
        &self,
        pair: u16,
        memory: &Arc<GuestMemory>,
        mtu: u16,
        header_length: usize,
        receives: bool,
        fill: impl FnOnce(&mut Socket, &GuestUmem),
    ) -> Result<OpenSocket, Failure> {
        let link = self.find_running().map_err(Failure::Gone)?;
        let mut shared = self.lock();
        let shared = &mut *shared;
        self.follow_device(&link, shared).map_err(Failure::Gone)?;
        let caps = shared.caps;
        let layout =
            self.layout(&link, mtu, header_length, caps.zero_copy).map_err(Failure::Gone)?;
        let binding = caps.binding(link.index, self.queue(pair));
        let (first, umem) =
            self.umem(shared.registered.as_ref(), memory, layout).map_err(Failure::Gone)?;
        let registration = match &first {
            Some(socket) => Registration::Shared(socket.as_fd()),
            None => Registration::New { headroom: layout.headroom(), metadata: caps.metadata },
        };
        let started = Instant::now();
        let mut socket = Socket::new(umem.memory(), RING_SIZES, &registration)
            .map_err(|error| Failure::Gone(not_registered(&error, umem.memory().length())))?;
        fill(&mut socket, &umem);
        let redirection = shared
            .attachment
            .as_deref()
            .filter(|_| receives)
            .map(|attachment| Redirection { attachment, header: layout.header as u32 });
        self.bind(&socket, binding, &registration, redirection)?;
        let busy_poll = self.set_options(&socket);
        let entry = (pair, Arc::downgrade(socket.descriptor()));
        match &mut shared.registered {
            Some(registered) if first.is_some() => registered.sockets.push(entry),
            registered => {
                *registered = Some(Registered {
                    guest: memory.clone(),
                    umem: umem.clone(),
                    sockets: vec![entry],
                });
            }
        }
        info!(
            "af_xdp {}: queue {} bound in {} mode, {} MiB of guest memory registered in {:?}",
            self.name(),
            binding.queue,
            if caps.zero_copy { "zero-copy" } else { "copy" },
            umem.memory().length() >> 20,
            started.elapsed(),
        );
        self.mtu.compare("af_xdp", self.name(), link.mtu, mtu);
        Ok(OpenSocket {
            socket,
            umem,
            metadata: caps.metadata,
            busy_poll,
            binding,
            generic: caps.generic,
            device_mtu: link.mtu,
        })
    }

    /// Looks up the device, which must be up.
    fn find_running(&self) -> Result<Link, OpenError> {
        let link = self.find()?;
        if !link.is_up {
            let name = &link.name;
            return Err(OpenError(format!("it is down; set it up with 'ip link set {name} up'")));
        }
        Ok(link)
    }

    /// Attaches program and flow rule to a device that has replaced the earlier one, and finds out what the
    /// new device can do.
    fn follow_device(&self, link: &Link, shared: &mut Shared) -> Result<(), OpenError> {
        if !shared.attachment.as_ref().is_some_and(|attachment| attachment.is_on(link.index)) {
            shared.attachment = None;
            shared.attachment = Some(self.attach(link, &shared.queue_config)?);
            self.check_tags(link, shared);
            shared.caps = self.find_caps(link)?;
        }
        if !shared.steering.as_ref().is_some_and(|steering| steering.is_on(link.index)) {
            shared.steering = None;
            shared.steering = self.steer(link)?;
        }
        Ok(())
    }

    /// Returns the UMEM for guest `memory`: the registered one, with the descriptor of a socket that has it,
    /// or a new one.
    fn umem(
        &self,
        registered: Option<&Registered>,
        memory: &Arc<GuestMemory>,
        layout: FrameLayout,
    ) -> Result<(Option<Arc<OwnedFd>>, Arc<GuestUmem>), OpenError> {
        if let Some(registered) = registered
            && Arc::ptr_eq(&registered.guest, memory)
            && registered.umem.layout == layout
            && let Some(socket) = registered.sockets.iter().find_map(|(_, it)| it.upgrade())
        {
            return Ok((Some(socket), registered.umem.clone()));
        }
        let umem = GuestUmem::new(memory, self.pairs, layout)
            .map_err(|error| OpenError(format!("cannot map the guest's memory: {error}")))?;
        Ok((None, Arc::new(umem)))
    }

    /// Binds a socket to its queue, and redirects the queue's frames to it.
    fn bind(
        &self,
        socket: &Socket,
        binding: Binding,
        registration: &Registration<'_>,
        redirection: Option<Redirection<'_>>,
    ) -> Result<(), Failure> {
        let queue = binding.queue;
        let redirect = || match &redirection {
            Some(Redirection { attachment, header }) => {
                attachment.redirect(queue, socket.descriptor(), *header).map_err(|error| {
                    let why =
                        format!("cannot redirect frames of queue {queue} to a socket: {error}");
                    Failure::Gone(OpenError(why))
                })
            }
            None => Ok(()),
        };
        if binding.zero_copy {
            // A frame that arrived between the two calls would already be in one of the socket's buffers. The
            // driver would then reuse that buffer out of order.
            redirect()?;
        }
        socket.bind(binding, registration).map_err(|error| {
            let busy = error.raw_os_error() == Some(libc::EBUSY);
            let error = refused(self.name(), binding, &error);
            if busy { Failure::Busy(error) } else { Failure::Gone(error) }
        })?;
        if !binding.zero_copy {
            return redirect();
        }
        if !socket.is_zero_copy().unwrap_or(false) {
            let why = "the kernel bound the socket without zero copy; use mode=copy".into();
            return Err(Failure::Gone(OpenError(why)));
        }
        Ok(())
    }

    /// Sets the send buffer and busy polling of a bound socket. Returns true if the worker must ask the
    /// kernel for frames.
    fn set_options(&self, socket: &Socket) -> bool {
        socket.set_send_buffer(SEND_BUFFER);
        let busy_poll = !self.busy_poll.is_zero();
        if busy_poll && let Err(error) = socket.prefer_busy_poll(self.busy_poll, BUSY_POLL_BUDGET) {
            debug!("af_xdp {}: the kernel does not busy-poll: {error}", self.name());
        }
        busy_poll
    }

    /// Stops redirecting frames to a queue pair's socket: the program passes them to the host.
    pub(in crate::port::af_xdp) fn stop_receiving(&self, pair: u16) {
        if let Some(attachment) = &self.lock().attachment {
            // It fails if the map has no such socket, or the device is gone.
            let _ = attachment.pass(self.queue(pair));
        }
    }

    /// Closes a socket, and waits until neither kernel nor device accesses guest memory: for a zero-copy
    /// queue at most 1 s. Returns the kernel's counters.
    pub(in crate::port::af_xdp) fn close(&self, pair: u16, open: OpenSocket) -> Statistics {
        let OpenSocket { socket, umem, binding, .. } = open;
        let statistics = socket.statistics().unwrap_or_default();
        if statistics.rx_invalid + statistics.tx_invalid > 0 {
            warn!(
                "af_xdp {}: kernel refused buffer addresses rx={} tx={}; their frames are lost: report \
                 this bug",
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
        // In copy mode this is enough: closing waits for deliveries in progress (`synchronize_net` in
        // xsk_unbind_dev), and the kernel copies frames to be sent when the daemon submits them.
        drop(socket);
        drop(umem);
        drop(shared);
        if binding.zero_copy {
            wait_for_device(self.name(), binding);
        }
        statistics
    }

    /// Checks a socket after its device has changed. Returns a reason to open the socket again, if there is
    /// one.
    ///
    /// # Errors
    /// The device is down or gone, so no socket can work.
    pub(in crate::port::af_xdp) fn check(
        &self,
        open: &OpenSocket,
    ) -> Result<Option<&'static str>, OpenError> {
        match link::at(open.binding.device) {
            Ok(link) if link.is_up => {
                Ok((link.mtu != open.device_mtu).then_some("the device's MTU has changed"))
            }
            Ok(_) => Err(OpenError("it is down".into())),
            Err(error) => Err(OpenError(format!("cannot look up the device: {error}"))),
        }
    }
}

/// Returns the error for a UMEM of `bytes` bytes that the kernel did not register.
fn not_registered(error: &io::Error, bytes: usize) -> OpenError {
    let mebibytes = bytes.div_ceil(1 << 20);
    let hint = match error.raw_os_error() {
        Some(libc::ENOBUFS) => format!(
            "; it needs that much locked memory: run with CAP_IPC_LOCK, or with 'ulimit -l {}' \
             (LimitMEMLOCK={mebibytes}M)",
            mebibytes << 10
        ),
        Some(libc::ENOMEM) => "; the host has less free memory: use a smaller guest".into(),
        Some(libc::EFAULT) => {
            "; the kernel cannot pin it: check that the memory's file is as long as the region"
                .into()
        }
        _ => String::new(),
    };
    OpenError(format!("cannot register {mebibytes} MiB of guest memory with AF_XDP: {error}{hint}"))
}
