//! Opening the host side of a port: inherited descriptors, the device's queues, and the socket.

mod tap;

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;

use log::info;

use super::devices::Claim;
use crate::config::{Host, PortConfig};
use crate::endpoint::{Endpoint, Frontend};
use crate::error::StartError;
use crate::features::PortOffloads;
use crate::port::af_xdp::Interface;
use crate::port::tap::TapQueue;
use crate::port::{HostQueue, TapState};
use crate::sys::device;
use crate::sys::process::inherit;
use crate::sys::tap::Queue;

pub(super) use tap::log_created;
use tap::open_tap;

/// Descriptors for a port: inherited, or passed with a request.
#[derive(Debug, Default)]
pub struct Descriptors {
    /// The listening socket, or the connection to the VMM.
    pub frontend: Option<OwnedFd>,
    /// The queues of a TAP, one per queue pair.
    pub tap_queues: Vec<OwnedFd>,
}

impl Descriptors {
    /// Takes the descriptors that the process inherited for this port.
    ///
    /// # Errors
    /// A descriptor that `config` names was not inherited.
    pub fn inherit(config: &PortConfig) -> Result<Self, StartError> {
        let take = |number: RawFd, option: &str| {
            inherit(number).map_err(|error| {
                StartError::new(format!("cannot use descriptor {number} ({option}): {error}"))
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

    /// Assigns the descriptors of a request: the frontend's socket, unless the port connects to a VMM, then the
    /// queues of a TAP.
    ///
    /// # Errors
    /// The number of descriptors is not the one that the port needs.
    pub fn brought(config: &PortConfig, files: Vec<OwnedFd>) -> Result<Self, StartError> {
        let frontends = usize::from(!matches!(config.frontend, Frontend::Connect(_)));
        let queues = match config.host {
            Host::Tap(_) | Host::TapDescriptors(_) => usize::from(config.queue_pairs),
            Host::AfXdp(_) | Host::Loopback => 0,
        };
        if files.len() != frontends + queues {
            return Err(StartError::new(format!(
                "the port needs {} descriptors, and the request brings {}; use \
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

/// A port whose host side is open. The process still has all its rights.
pub struct Opened {
    pub(super) name: String,
    pub(super) config: PortConfig,
    pub(super) from_file: bool,
    pub(super) queues: Vec<HostQueue>,
    pub(super) endpoint: Endpoint,
}

impl Opened {
    /// Opens the objects that `config` names and `brought` does not contain.
    ///
    /// # Errors
    /// The cause, with the name of the object that cannot be opened.
    pub fn new(
        config: PortConfig,
        from_file: bool,
        brought: Descriptors,
    ) -> Result<Self, StartError> {
        let (device, queues) = open_host(&config, brought.tap_queues)?;
        let name = config.known_name().map_or(device, str::to_owned);
        let was_brought = brought.frontend.is_some();
        let endpoint = Endpoint::open(&config.frontend, brought.frontend)?;
        if let Some(group) = config.socket_group.as_ref().filter(|_| !was_brought) {
            endpoint.share_with(group)?;
        }
        Ok(Opened { name, config, from_file, queues, endpoint })
    }

    /// Opens only the host side of a port that another daemon or port serves. `tap` is the state of its TAP, whose
    /// settings do not change. Daemons up to version 0.1.0 do not pass it on; their TAPs are set up again.
    pub(super) fn of_predecessor(
        name: String,
        config: PortConfig,
        from_file: bool,
        (tap_queues, tap): (Vec<OwnedFd>, Option<TapState>),
        endpoint: Endpoint,
    ) -> Result<Self, StartError> {
        let queues = match tap {
            Some(tap) => adopt_tap(&config, tap_queues, &tap)?,
            None => open_host(&config, tap_queues)?.1,
        };
        Ok(Opened { name, config, from_file, queues, endpoint })
    }

    /// Returns the port's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the offloads of the port's device.
    pub(super) fn offloads(&self) -> PortOffloads {
        self.queues[0].offloads()
    }

    /// Returns the queues of a device that this port needs for itself.
    pub fn claim(&self) -> Claim<'_> {
        let device = self.queues[0].device().load(Ordering::Relaxed);
        Claim::new(&self.name, device, &self.config)
    }
}

/// Opens the queues of a port's TAP; returns none for other host sides and for inherited queues. `now` is the
/// present name of the device, if a port that runs is on it.
///
/// # Errors
/// The cause, with the TAP's name.
pub fn open_queues(config: &PortConfig, now: Option<&str>) -> Result<Vec<OwnedFd>, StartError> {
    match &config.host {
        Host::Tap(name) => {
            let name = now.unwrap_or(name);
            let (queues, _) = open_tap(name, config.queue_pairs, config.mtu)?;
            for queue in queues.iter().filter(|queue| queue.identity().multi_queue) {
                // The kernel then steers no frame to this queue before a guest posts buffers.
                queue.set_attached(false).map_err(|error| {
                    StartError::new(format!("cannot detach a queue of tap {name}: {error}"))
                })?;
            }
            Ok(queues.into_iter().map(OwnedFd::from).collect())
        }
        Host::TapDescriptors(_) | Host::AfXdp(_) | Host::Loopback => Ok(Vec::new()),
    }
}

/// Opens the host side, one queue per queue pair, on the descriptors in `brought`; returns the device's name
/// and the queues.
fn open_host(
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
        Host::Tap(name) if brought.is_empty() => {
            let (queues, is_new) = open_tap(name, pairs, config.mtu)?;
            if is_new {
                log_created(&queues[0].identity().name);
            }
            queues
        }
        Host::Tap(_) | Host::TapDescriptors(_) => brought
            .into_iter()
            .map(|fd| {
                let number = fd.as_raw_fd();
                Queue::inherit(fd).map_err(|error| {
                    StartError::new(format!("cannot use --tap-fd={number}: {error}"))
                })
            })
            .collect::<Result<_, _>>()?,
    };
    let name = queues[0].identity().name.clone();
    if let Host::Tap(wanted) = &config.host
        && *wanted != name
        && !device::index(wanted).is_ok_and(|it| it.is_some() && it == queues[0].identity().index)
    {
        return Err(StartError::new(format!(
            "cannot use queues of tap {name} for tap {wanted}; add the port again"
        )));
    }
    let is_another = |queue: &&Queue| {
        let (it, first) = (queue.identity(), queues[0].identity());
        it.name != first.name || it.index != first.index
    };
    if let Some(other) = queues.iter().find(is_another) {
        let other = &other.identity().name;
        return Err(StartError::new(format!(
            "cannot use --tap-fd: it has queues of {name} and of {other}; pass queues of one device"
        )));
    }
    let queues = TapQueue::prepare(queues, config.tx_method, &config.rx_filter)
        .map_err(|error| StartError::new(format!("cannot set up tap {name}: {error}")))?;
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

/// Builds the host side of a port on a TAP that another daemon serves, without a change of the TAP's settings.
fn adopt_tap(
    config: &PortConfig,
    queues: Vec<OwnedFd>,
    state: &TapState,
) -> Result<Vec<HostQueue>, StartError> {
    let queues = TapQueue::of_predecessor(queues, state, config.tx_method, &config.rx_filter)
        .map_err(|error| StartError::new(format!("cannot set up tap {}: {error}", state.name)))?;
    Ok(queues.into_iter().map(|queue| HostQueue::Tap(Box::new(queue))).collect())
}
