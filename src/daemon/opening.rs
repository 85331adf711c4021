//! What a port needs from the host: descriptors that it was promised, and its device's queues.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::thread;
use std::time::{Duration, Instant};

use log::info;

use super::StartError;
use crate::config::{Frontend, Host, PortConfig};
use crate::port::af_xdp::Interface;
use crate::port::tap::TapQueue;
use crate::port::{HostQueue, TapState};
use crate::sys::process::inherit;
use crate::sys::tap::{Queue, device_exists};

/// How long a TAP may be busy: the kernel keeps one for a while whose daemon was killed (see
/// [`Writer`](crate::sys::uring::Writer)).
const BUSY_PATIENCE: Duration = Duration::from_secs(1);
/// How long it is left alone between attempts.
const BUSY_RETRY: Duration = Duration::from_millis(1);

/// Descriptors that a port stands on: inherited, brought by an operator, or opened.
#[derive(Debug, Default)]
pub(crate) struct Descriptors {
    pub(crate) frontend: Option<OwnedFd>,
    pub(crate) tap_queues: Vec<OwnedFd>,
}

impl Descriptors {
    /// Takes those that the process that started us left open for us.
    ///
    /// # Errors
    /// With the descriptor that is not there.
    pub(crate) fn inherit(config: &PortConfig) -> Result<Self, StartError> {
        let take = |number: RawFd, option: &str| {
            inherit(number).map_err(|error| {
                StartError::new(format!("use descriptor {number} ({option}): {error}"))
            })
        };
        let frontend = match config.frontend {
            Frontend::Inherited(number) => Some(take(number, "--fd")?),
            Frontend::Listen(_) | Frontend::Connect(_) => None,
        };
        let tap_queues = match &config.host {
            Host::TapDescriptors(numbers) => {
                numbers.iter().map(|&number| take(number, "--tap-fd")).collect::<Result<_, _>>()?
            }
            Host::Tap(_) | Host::AfXdp(_) | Host::Loopback => Vec::new(),
        };
        Ok(Descriptors { frontend, tap_queues })
    }

    /// Sorts what an operator has brought: the frontend's socket, if it is not one to connect to,
    /// and the queues of a TAP.
    ///
    /// # Errors
    /// There are too few or too many.
    pub(crate) fn brought(config: &PortConfig, files: Vec<OwnedFd>) -> Result<Self, StartError> {
        let frontends = usize::from(!matches!(config.frontend, Frontend::Connect(_)));
        let queues = match config.host {
            Host::Tap(_) | Host::TapDescriptors(_) => usize::from(config.queue_pairs),
            Host::AfXdp(_) | Host::Loopback => 0,
        };
        if files.len() != frontends + queues {
            return Err(StartError::new(format!(
                "the port needs {} descriptors, and {} were passed with it; add it by \
                 'vhost-user-net ctl add', which opens them",
                frontends + queues,
                files.len()
            )));
        }
        let mut files = files.into_iter();
        let frontend = files.by_ref().take(frontends).next();
        Ok(Descriptors { frontend, tap_queues: files.collect() })
    }
}

/// Opens the queues of a port's TAP, if it has one that is not open.
pub(crate) fn open_queues(config: &PortConfig) -> Result<Vec<OwnedFd>, StartError> {
    match &config.host {
        Host::Tap(name) => {
            let queues = open_tap(name, config.queue_pairs, config.mtu)?;
            for queue in queues.iter().filter(|queue| queue.identity().multi_queue) {
                // Until a guest has buffers, frames are for the queues that are served already.
                queue.set_attached(false).map_err(|error| {
                    StartError::new(format!("detach a queue of tap {name}: {error}"))
                })?;
            }
            Ok(queues.into_iter().map(OwnedFd::from).collect())
        }
        Host::TapDescriptors(_) | Host::AfXdp(_) | Host::Loopback => Ok(Vec::new()),
    }
}

/// Opens the host side, one queue per pair, on what was brought for it; says what its device is
/// called.
pub(super) fn open_host(
    config: &PortConfig,
    brought: Vec<OwnedFd>,
) -> Result<(String, Vec<HostQueue>), StartError> {
    let pairs = config.queue_pairs;
    let queues = match &config.host {
        Host::Loopback => {
            return Ok(("loopback".into(), (0..pairs).map(|_| HostQueue::Loopback).collect()));
        }
        Host::AfXdp(options) => {
            let queues = Interface::start(
                options,
                pairs,
                config.mtu,
                config.mac,
                config.busy_poll.unwrap_or_default(),
                &config.rx_filter,
            )
            .map_err(|error| StartError::new(error.to_string()))?;
            let queues = queues.into_iter().map(|queue| HostQueue::AfXdp(Box::new(queue)));
            return Ok((options.name.clone(), queues.collect()));
        }
        Host::Tap(name) if brought.is_empty() => open_tap(name, pairs, config.mtu)?,
        Host::Tap(_) | Host::TapDescriptors(_) => brought
            .into_iter()
            .map(|fd| {
                let number = fd.as_raw_fd();
                Queue::inherit(fd)
                    .map_err(|error| StartError::new(format!("--tap-fd={number}: {error}")))
            })
            .collect::<Result<_, _>>()?,
    };
    let name = queues[0].identity().name.clone();
    if let Host::Tap(wanted) = &config.host
        && *wanted != name
    {
        return Err(StartError::new(format!("queues of tap {name} were passed for tap {wanted}")));
    }
    if let Some(other) = queues.iter().find(|queue| queue.identity().name != name) {
        let other = &other.identity().name;
        return Err(StartError::new(format!(
            "--tap-fd names queues of {name} and of {other}: all must be of one device"
        )));
    }
    let queues = TapQueue::prepare(queues, config.tx_method, &config.rx_filter)
        .map_err(|error| StartError::new(format!("set up tap {name}: {error}")))?;
    let queues: Vec<_> = queues.into_iter().map(|queue| HostQueue::Tap(Box::new(queue))).collect();
    if let HostQueue::Tap(queue) = &queues[0] {
        let offloads = queue.offloads();
        info!(
            "tap {name}: tx by {}, TCP segmentation {}, UDP segmentation {}",
            queue.tx_method(),
            if offloads.segmentation { "on" } else { "off" },
            if offloads.udp_segmentation { "on" } else { "off" },
        );
    }
    Ok((name, queues))
}

/// The host side of a port on a TAP that another daemon serves. Nothing of the device is set.
pub(super) fn adopt_tap(
    config: &PortConfig,
    queues: Vec<OwnedFd>,
    state: &TapState,
) -> Result<Vec<HostQueue>, StartError> {
    let queues = TapQueue::of_predecessor(queues, state, config.tx_method, &config.rx_filter)
        .map_err(|error| StartError::new(format!("set up tap {}: {error}", state.name)))?;
    Ok(queues.into_iter().map(|queue| HostQueue::Tap(Box::new(queue))).collect())
}

/// Opens `pairs` queues of the TAP `name`, which is made if it is missing.
fn open_tap(name: &str, pairs: u16, mtu: u16) -> Result<Vec<Queue>, StartError> {
    let several = if pairs > 1 { " multi_queue" } else { "" };
    let make = format!("ip tuntap add dev {name} mode tap vnet_hdr{several}");
    let failed = |error: io::Error| {
        let hint = match error.raw_os_error() {
            Some(libc::EBUSY) => "; is another process using it?".into(),
            Some(libc::EPERM) => {
                format!(
                    "; run with CAP_NET_ADMIN, or make it for this user with '{make} user NAME'"
                )
            }
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                "; is the kernel module tun loaded, and /dev/net/tun there?".into()
            }
            Some(libc::E2BIG) => "; other processes have queues of it open".into(),
            _ => String::new(),
        };
        StartError::new(format!("open tap {name}: {error}{hint}"))
    };
    let one_queue = || {
        StartError::new(format!(
            "tap {name} has one queue, and --queue-pairs={pairs}: make it again with \
             'ip link delete {name} && {make}'"
        ))
    };
    let until = Instant::now() + BUSY_PATIENCE;
    let (is_new, opened) = loop {
        let is_new = !device_exists(name).map_err(failed)?;
        match Queue::open(name, pairs > 1) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < until => {
                thread::sleep(BUSY_RETRY);
            }
            opened => break (is_new, opened),
        }
    };
    let first = match (opened, pairs) {
        // The kernel says EINVAL when IFF_MULTI_QUEUE is not what the device has.
        (Err(error), _) if !is_new && error.raw_os_error() == Some(libc::EINVAL) => {
            match (Queue::open(name, pairs == 1), pairs) {
                (Ok(queue), 1) => queue,
                (Ok(_), _) => return Err(one_queue()),
                // A port has the one queue.
                (Err(error), 2..) if error.raw_os_error() == Some(libc::EBUSY) => {
                    return Err(one_queue());
                }
                (Err(error), _) if error.raw_os_error() == Some(libc::EINVAL) => {
                    return Err(StartError::new(format!(
                        "{name} is a network device, but no TAP; choose another name"
                    )));
                }
                (Err(error), _) => return Err(failed(error)),
            }
        }
        (opened, _) => opened.map_err(failed)?,
    };
    let multi_queue = first.identity().multi_queue;
    let mut queues = vec![first];
    for _ in 1..pairs {
        queues.push(Queue::open(name, multi_queue).map_err(failed)?);
    }
    if is_new {
        info!("tap {name}: made, for as long as this process runs");
        queues[0].set_mtu(mtu.into()).and_then(|()| queues[0].set_up()).map_err(failed)?;
    }
    Ok(queues)
}
