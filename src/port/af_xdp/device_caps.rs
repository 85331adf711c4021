//! What a device, its driver and the kernel can do, found out by binding a socket to each queue.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use log::{debug, info, warn};

use super::interface::OVERHEAD;
use super::umem::FrameLayout;
use super::{BUSY_LIMIT, BUSY_RETRY, Mode, OpenError};
use crate::guest::Umem;
use crate::sys::link;
use crate::sys::xsk::{Binding, CHUNK, Registration, RingSizes, Socket};

/// What device, driver and kernel can do.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct DeviceCaps {
    /// The device itself reads and writes the UMEM.
    pub(super) zero_copy: bool,
    /// Frames to be sent may carry metadata.
    pub(super) metadata: bool,
    /// The XDP program runs in the kernel's generic code.
    pub(super) generic: bool,
}

impl DeviceCaps {
    /// Binds a socket to each of the queues and closes it.
    ///
    /// # Errors
    /// There is no such queue, it is in use, or can't do what was asked for.
    pub(super) fn find(
        name: &str,
        device: u32,
        queues: Range<u32>,
        mode: Mode,
    ) -> Result<Self, OpenError> {
        // A driver binds in zero-copy mode then, too, and its frames never reach the socket.
        let generic = link::at(device).is_ok_and(|link| link.program_is_generic);
        if generic && mode == Mode::ZeroCopy {
            return Err(OpenError(format!(
                "{name} has its XDP program in the kernel's generic code, and zero copy needs it \
                 in the driver: use mode=auto, or see why attach=native fails"
            )));
        }
        let zero_copy = mode != Mode::Copy && !generic;
        let mut abilities = DeviceCaps { zero_copy, metadata: true, generic };
        for queue in queues.clone() {
            loop {
                let binding = abilities.binding(device, queue);
                match try_bind(binding, abilities.metadata) {
                    Ok(()) => break,
                    Err(Refused::Metadata) => abilities.metadata = false,
                    Err(Refused::Bind(error))
                        if abilities.zero_copy && mode == Mode::Auto && !is_final(&error) =>
                    {
                        debug!("af_xdp {name}: no zero copy: {error}");
                        abilities.zero_copy = false;
                    }
                    Err(Refused::Bind(error) | Refused::Socket(error)) => {
                        return Err(refused(name, binding, &error));
                    }
                }
            }
        }
        info!(
            "af_xdp {name}: queues {}-{}, {} mode{}, checksums by {}",
            queues.start,
            queues.end - 1,
            if abilities.zero_copy { "zero-copy" } else { "copy" },
            match mode {
                Mode::Auto if generic => ", since the XDP program does not run in the driver",
                Mode::Auto if !abilities.zero_copy => ", since the driver has no zero copy",
                _ => "",
            },
            if abilities.metadata && !abilities.zero_copy { "the kernel" } else { "the daemon" },
        );
        // Drivers need not look at metadata, as virtio_net does not.
        abilities.metadata &= !abilities.zero_copy;
        Ok(abilities)
    }

    /// How to bind to a queue of the device of that index.
    pub(super) fn binding(&self, device: u32, queue: u32) -> Binding {
        Binding { device, queue, zero_copy: self.zero_copy, multi_buffer: false }
    }
}

/// What a refusal to bind means, and what to do about it.
pub(super) fn refused(name: &str, to: Binding, error: &io::Error) -> OpenError {
    let Binding { queue, zero_copy, .. } = to;
    let hint = match error.raw_os_error() {
        Some(libc::EBUSY) => {
            "; another AF_XDP socket has that queue: choose another with queue=N, or stop whoever \
             uses it"
        }
        Some(libc::EINVAL | libc::EOPNOTSUPP) if zero_copy => {
            "; the driver has no zero copy, or not as the device is set up: use mode=auto or \
             mode=copy"
        }
        Some(libc::EINVAL) => "; has it that many queues? 'ethtool -l' tells",
        Some(libc::EPERM) => "; run with CAP_NET_RAW",
        Some(libc::EAFNOSUPPORT) => "; the kernel has no AF_XDP (CONFIG_XDP_SOCKETS)",
        _ => "",
    };
    let mode = if zero_copy { "zero-copy" } else { "copy" };
    OpenError(format!(
        "bind an AF_XDP socket to queue {queue} of {name} in {mode} mode: {error}{hint}"
    ))
}

/// Waits until the device has let go of a queue whose zero-copy socket was closed: it writes into
/// its buffers until then. That is when the queue can be bound again.
pub(super) fn wait_for_device(name: &str, binding: Binding) {
    let started = Instant::now();
    if let Err(Refused::Bind(error)) = try_bind(Binding { zero_copy: false, ..binding }, false)
        && error.raw_os_error() == Some(libc::EBUSY)
    {
        warn!("af_xdp {name}: queue {} stays busy", binding.queue);
        return;
    }
    debug!("af_xdp {name}: the device let go after {:?}", started.elapsed());
}

/// An error that has nothing to do with zero copy.
fn is_final(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENODEV | libc::ENETDOWN | libc::EPERM))
}

/// Where an attempt to bind ended.
enum Refused {
    /// The kernel knows no metadata of frames to be sent.
    Metadata,
    Socket(io::Error),
    Bind(io::Error),
}

/// Binds a socket that nobody uses, and closes it. A queue that is busy may be so with a socket
/// that was closed a moment ago, also by a process that has ended.
fn try_bind(binding: Binding, metadata: bool) -> Result<(), Refused> {
    const SIZES: RingSizes = RingSizes { rx: 64, tx: 64 };
    const BUFFERS: u32 = 64;
    let layout =
        FrameLayout::new(1500 + OVERHEAD, 0, binding.zero_copy).map_err(Refused::Socket)?;
    let umem = Umem::new((BUFFERS * CHUNK) as usize, &[], 0).map_err(Refused::Socket)?;
    let umem = Arc::new(umem);
    let started = Instant::now();
    loop {
        let registration = Registration::New { headroom: layout.headroom(), metadata };
        let mut socket = Socket::new(&umem, SIZES, &registration).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::EINVAL) if metadata => Refused::Metadata,
                _ => Refused::Socket(error),
            }
        })?;
        (0..BUFFERS).for_each(|buffer| socket.fill.stage((buffer * CHUNK).into()));
        socket.fill.submit();
        match socket.bind(binding, &registration) {
            Err(error)
                if error.raw_os_error() == Some(libc::EBUSY) && started.elapsed() < BUSY_LIMIT =>
            {
                drop(socket);
                std::thread::sleep(BUSY_RETRY);
            }
            result => return result.map_err(Refused::Bind),
        }
    }
}
