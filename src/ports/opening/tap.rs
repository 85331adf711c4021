//! Opening a TAP's queues, and making a TAP that is missing.

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

/// How long a TAP may be busy: the kernel keeps one for a while whose daemon was killed (see
/// [`Writer`](crate::sys::uring::Writer)).
const BUSY_PATIENCE: Duration = Duration::from_secs(1);
/// How long it is left alone between attempts.
const BUSY_RETRY: Duration = Duration::from_millis(1);

/// Opens `pairs` queues of the TAP that `wanted` leads to, as its primary or an alternative name. A
/// missing TAP is made.
pub(super) fn open_tap(wanted: &str, pairs: u16, mtu: u16) -> Result<Vec<Queue>, StartError> {
    let several = if pairs > 1 { " multi_queue" } else { "" };
    let make = format!("ip tuntap add dev {wanted} mode tap vnet_hdr{several} user NAME");
    let failed = |error: io::Error| {
        let hint = match error.raw_os_error() {
            Some(libc::EBUSY) => "; is another process using it?".into(),
            Some(libc::EPERM) => {
                format!("; run with CAP_NET_ADMIN, or make it for this user with '{make}'")
            }
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                "; is the kernel module tun loaded, and /dev/net/tun there?".into()
            }
            Some(libc::E2BIG) => "; other processes have queues of it open".into(),
            _ => String::new(),
        };
        StartError::new(format!("open tap {wanted}: {error}{hint}"))
    };
    let one_queue = |name: &str| {
        StartError::new(format!(
            "tap {name} has one queue, and --queue-pairs={pairs}: make it again with \
             'ip link delete {name} && {make}'"
        ))
    };
    let until = Instant::now() + BUSY_PATIENCE;
    let (name, index, opened) = loop {
        let index = device::index(wanted).map_err(failed)?;
        if index.is_none() && wanted.len() > MAX_NAME {
            return Err(StartError::new(format!(
                "cannot make tap {wanted}: a name of more than {MAX_NAME} bytes can only be the \
                 alternative name of a device; make the TAP and add the name first"
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
        // The kernel says EINVAL when IFF_MULTI_QUEUE is not what the device has.
        (Err(error), _) if index.is_some() && error.raw_os_error() == Some(libc::EINVAL) => {
            match (Queue::open(&name, pairs == 1), pairs) {
                (Ok(queue), 1) => queue,
                (Ok(_), _) => return Err(one_queue(&name)),
                // A port has the one queue.
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
    // One that was made in the stead of a device that has gone meanwhile goes with its queue.
    let check = |queue: &Queue, index: Option<u32>| match queue.identity().index {
        found if found == index => Ok(()),
        _ => Err(StartError::new(format!(
            "cannot open tap {wanted}: it was renamed meanwhile; try again"
        ))),
    };
    let is_new = index.is_none();
    if is_new {
        // Before others can have a queue of it, and frames of it are looked at.
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
        info!("tap {name}: made, for as long as this process runs");
        device::set_mtu(&name, mtu.into()).and_then(|()| device::set_up(&name)).map_err(failed)?;
    }
    Ok(queues)
}

/// Has the host take no addresses and routes from what a TAP's guest sends, unlike the kernel's default
/// for a device that is in no bridge.
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
