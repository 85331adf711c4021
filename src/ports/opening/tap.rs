//! Opening the queues of a TAP, and creating a missing TAP.

use std::fs;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use log::{info, warn};
use nix::unistd::geteuid;

use crate::error::StartError;
use crate::port::tap::no_tap;
use crate::sys::device::{self, MAX_NAME};
use crate::sys::link;
use crate::sys::tap::Queue;

/// Time that a TAP may be busy: the kernel holds the TAP of a killed daemon for a moment (see
/// [`Writer`](crate::sys::uring::Writer)).
const BUSY_TIMEOUT: Duration = Duration::from_secs(1);
/// Interval between two attempts to open a busy TAP.
const BUSY_RETRY: Duration = Duration::from_millis(1);

/// Opens `pairs` queues of the TAP whose primary or alternative name is `wanted`; creates the TAP if it is missing.
/// Returns the queues, and whether the TAP was created: then it exists until its last queue is closed.
///
/// # Errors
/// The cause, with the TAP's name.
pub(super) fn open_tap(
    wanted: &str,
    pairs: u16,
    mtu: u16,
) -> Result<(Vec<Queue>, bool), StartError> {
    let several = if pairs > 1 { " multi_queue" } else { "" };
    let create = format!("ip tuntap add dev {wanted} mode tap vnet_hdr{several} user NAME");
    let failed = |error: io::Error| {
        let hint = match error.raw_os_error() {
            Some(libc::EBUSY) => "; is another process using it?".into(),
            Some(libc::EPERM) => {
                format!("; run with CAP_NET_ADMIN, or create it for this user with '{create}'")
            }
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                "; run 'modprobe tun', or pass /dev/net/tun into the container".into()
            }
            Some(libc::E2BIG) => "; stop the other processes that have its queues open".into(),
            _ => String::new(),
        };
        StartError::new(format!("cannot open tap {wanted}: {error}{hint}"))
    };
    let one_queue = |name: &str| {
        StartError::new(format!(
            "cannot use tap {name} for --queue-pairs={pairs}: it has one queue; create it again with \
             'ip link delete {name} && {create}'"
        ))
    };
    let until = Instant::now() + BUSY_TIMEOUT;
    let (name, index, opened) = loop {
        let index = device::index(wanted).map_err(failed)?;
        if index.is_none() && wanted.len() > MAX_NAME {
            return Err(StartError::new(format!(
                "cannot create tap {wanted}: a name of more than {MAX_NAME} bytes can only be the \
                 alternative name of a device; create the TAP and add the name first"
            )));
        }
        let name = index.map_or_else(|| Ok(wanted.to_owned()), device::name).map_err(failed)?;
        let open = if index.is_none() { Queue::make } else { Queue::open };
        match open(&name, pairs > 1) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < until => {
                thread::sleep(BUSY_RETRY);
            }
            opened => break (name, index, opened),
        }
    };
    let first = match (opened, pairs) {
        // The kernel returns EINVAL if IFF_MULTI_QUEUE is set here and not in the device, or the reverse.
        (Err(error), _) if index.is_some() && error.raw_os_error() == Some(libc::EINVAL) => {
            match (Queue::open(&name, pairs == 1), pairs) {
                (Ok(queue), 1) => queue,
                (Ok(_), _) => return Err(one_queue(&name)),
                // A port has the only queue.
                (Err(error), 2..) if error.raw_os_error() == Some(libc::EBUSY) => {
                    return Err(one_queue(&name));
                }
                (Err(error), _) if error.raw_os_error() == Some(libc::EINVAL) => {
                    return Err(StartError::new(no_tap(wanted)));
                }
                (Err(error), _) => return Err(failed(error)),
            }
        }
        (opened, _) => opened.map_err(failed)?,
    };
    // If the device was renamed or deleted meanwhile, the kernel has created another one, which this error closes.
    let check = |queue: &Queue, index: Option<u32>| match queue.identity().index {
        found if found == index => Ok(()),
        _ => Err(StartError::new(format!(
            "cannot open tap {wanted}: it was renamed meanwhile; try again"
        ))),
    };
    let is_new = index.is_none();
    if is_new {
        // First of all, so that no other user opens a queue, and the host acts on no frame of the guest.
        first.set_owner(geteuid().as_raw()).map_err(failed)?;
        refuse_router_advertisements(&name);
    } else {
        check(&first, index)?;
    }
    let multi_queue = first.identity().multi_queue;
    let mut queues = vec![first];
    for _ in 1..pairs {
        let queue = Queue::open(&name, multi_queue).map_err(failed)?;
        check(&queue, queues[0].identity().index)?;
        queues.push(queue);
    }
    if is_new {
        device::set_mtu(&name, mtu.into()).and_then(|()| device::set_up(&name)).map_err(failed)?;
    }
    Ok((queues, is_new))
}

/// Logs that a TAP was created.
pub(in crate::ports) fn log_created(name: &str) {
    info!("tap {name}: created; removed on exit");
}

/// Makes the host ignore router advertisements of the guest. By default the kernel takes addresses and routes from
/// them, unless the device is in a bridge.
fn refuse_router_advertisements(name: &str) {
    let written = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_ra"), "0");
    if let Err(error) = written
        && link::find(name).is_ok_and(|link| link.takes_advertisements)
    {
        warn!(
            "tap {name}: cannot set accept_ra to 0: {error}; its guest can give this host addresses and \
             routes until 'sysctl -w net/ipv6/conf/{name}/accept_ra=0' is run or it is in a bridge"
        );
    }
}
