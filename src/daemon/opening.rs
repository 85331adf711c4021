//! What a port needs from the host: descriptors that it was promised, and its device's queues.

mod tap;

use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use log::info;

use crate::config::{Host, PortConfig};
use crate::endpoint::Frontend;
use crate::error::StartError;
use crate::port::af_xdp::Interface;
use crate::port::tap::TapQueue;
use crate::port::{HostQueue, TapState};
use crate::sys::device;
use crate::sys::process::inherit;
use crate::sys::tap::Queue;

use tap::open_tap;

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

/// Opens the queues of a port's TAP, if it has one that is not open. `now` is what the device is called
/// by now, if a port that runs has it.
pub(crate) fn open_queues(
    config: &PortConfig,
    now: Option<&str>,
) -> Result<Vec<OwnedFd>, StartError> {
    match &config.host {
        Host::Tap(name) => {
            let name = now.unwrap_or(name);
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
        && !device::index(wanted).is_ok_and(|it| it.is_some() && it == queues[0].identity().index)
    {
        return Err(StartError::new(format!("queues of tap {name} were passed for tap {wanted}")));
    }
    let is_another = |queue: &&Queue| {
        let (it, first) = (queue.identity(), queues[0].identity());
        it.name != first.name || it.index != first.index
    };
    if let Some(other) = queues.iter().find(is_another) {
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
