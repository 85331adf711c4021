//! Capabilities of a device, its driver and the kernel, found by binding a socket to each queue.

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

/// Capabilities of device, driver and kernel, for all queues of a port.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct DeviceCaps {
    /// The device itself reads and writes the UMEM.
    pub(super) zero_copy: bool,
    /// The kernel completes checksums that a frame's metadata requests: Linux 6.8, in copy mode.
    pub(super) metadata: bool,
    /// The XDP program runs in the kernel's generic code.
    pub(super) generic: bool,
}

impl DeviceCaps {
    /// Finds the capabilities: binds a socket to each of `queues`, and closes it.
    ///
    /// # Errors
    /// A queue does not exist or is in use, or the device lacks the required `mode`.
    pub(super) fn find(
        name: &str,
        device: u32,
        queues: Range<u32>,
        mode: Mode,
    ) -> Result<Self, OpenError> {
        // With a generic program, a driver still binds in zero-copy mode, but its frames never reach the
        // socket.
        let generic = link::at(device).is_ok_and(|link| link.program_is_generic);
        if generic && mode == Mode::ZeroCopy {
            return Err(OpenError(format!(
                "cannot use zero copy on {name}: its XDP program runs in the kernel's generic code, \
                 not in the driver; use mode=auto, or see why attach=native fails"
            )));
        }
        let zero_copy = mode != Mode::Copy && !generic;
        let mut caps = DeviceCaps { zero_copy, metadata: true, generic };
        for queue in queues.clone() {
            loop {
                let binding = caps.binding(device, queue);
                match try_bind(binding, caps.metadata) {
                    Ok(()) => break,
                    Err(Refused::Metadata) => caps.metadata = false,
                    Err(Refused::Bind(error))
                        if caps.zero_copy && mode == Mode::Auto && !is_final(&error) =>
                    {
                        debug!("af_xdp {name}: no zero copy: {error}");
                        caps.zero_copy = false;
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
            if caps.zero_copy { "zero-copy" } else { "copy" },
            match mode {
                Mode::Auto if generic => ", since the XDP program does not run in the driver",
                Mode::Auto if !caps.zero_copy => ", since the driver has no zero copy",
                _ => "",
            },
            if caps.metadata && !caps.zero_copy { "the kernel" } else { "the daemon" },
        );
        // In zero-copy mode a driver may ignore metadata, as virtio_net does.
        caps.metadata &= !caps.zero_copy;
        Ok(caps)
    }

    /// Returns the binding to a queue of the device with index `device`.
    pub(super) fn binding(&self, device: u32, queue: u32) -> Binding {
        Binding { device, queue, zero_copy: self.zero_copy, multi_buffer: false }
    }
}

/// Returns the message for a failed bind, with the fix.
pub(super) fn refused(name: &str, to: Binding, error: &io::Error) -> OpenError {
    let Binding { queue, zero_copy, .. } = to;
    let hint = match error.raw_os_error() {
        Some(libc::EBUSY) => {
            "; another AF_XDP socket uses that queue: choose another queue with queue=N, or stop the \
             process that has the socket"
        }
        Some(libc::EINVAL | libc::EOPNOTSUPP) if zero_copy => {
            "; the driver has no zero copy, or not with the device's settings: use mode=auto or \
             mode=copy"
        }
        Some(libc::EINVAL) => "; check the number of queues with 'ethtool -l'",
        Some(libc::EPERM) => "; run with CAP_NET_RAW",
        Some(libc::EAFNOSUPPORT) => "; the kernel has no AF_XDP (CONFIG_XDP_SOCKETS)",
        _ => "",
    };
    let mode = if zero_copy { "zero-copy" } else { "copy" };
    OpenError(format!(
        "cannot bind an AF_XDP socket to queue {queue} of {name} in {mode} mode: {error}{hint}"
    ))
}

/// Waits until the device has released a queue whose zero-copy socket was closed, at most [`BUSY_LIMIT`].
///
/// Closing only schedules the release (`xp_put_pool` in net/xdp/xsk_buff_pool.c). Until the release, the
/// device writes received frames into its buffers, which are guest memory. `xp_clear_dev` first stops the
/// device's use of the UMEM, then frees the queue. So the device has stopped once another socket can be
/// bound. If the queue stays busy, the device may still write, or another process may have bound the queue
/// after the release.
pub(super) fn wait_for_device(name: &str, binding: Binding) {
    let started = Instant::now();
    if let Err(Refused::Bind(error)) = try_bind(Binding { zero_copy: false, ..binding }, false)
        && error.raw_os_error() == Some(libc::EBUSY)
    {
        warn!(
            "af_xdp {name}: queue {} stays busy after its socket was closed; the device may still write \
             frames into guest memory: stop it with 'ip link set {name} down'",
            binding.queue
        );
        return;
    }
    debug!("af_xdp {name}: the device released its queue after {:?}", started.elapsed());
}

/// Returns true if binding fails with this error in copy mode too.
fn is_final(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENODEV | libc::ENETDOWN | libc::EPERM))
}

/// Step at which an attempt to bind failed.
enum Refused {
    /// The kernel does not support metadata of frames to be sent (before Linux 6.8).
    Metadata,
    /// Creating the socket failed.
    Socket(io::Error),
    /// bind(2) failed.
    Bind(io::Error),
}

/// Binds a socket with a UMEM of its own, and closes it. Tries a busy queue again for [`BUSY_LIMIT`]: the
/// queue stays busy for some 30 ms after its last socket was closed, also by a process that has ended.
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
