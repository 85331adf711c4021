//! Preparation of a port: the workers start, but no VMM can connect yet.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::channel;

use log::info;

use super::control::{Control, FrontendHandover};
use super::{Filters, Opened, Port, PortStatus};
use crate::config::{Host, PortConfig};
use crate::counters::PairCounters;
use crate::descriptors::DescriptorQuota;
use crate::device::Device;
use crate::error::{StartError, no_descriptor};
use crate::features::{Offer, OfferOptions, PortOffloads};
use crate::guest::MemoryQuota;
use crate::net_config::NetConfig;
use crate::policy::{AntiSpoofing, Limiter, Limits, LiveFilter};
use crate::port::HostQueue;
use crate::sandbox::Sandbox;
use crate::sys::eventfd::Waker;
use crate::worker::{Worker, WorkerOptions};

/// A port whose workers run, and which no VMM can connect to yet.
pub struct Prepared {
    pub(super) control: Control,
    /// The port, without its control thread.
    pub(super) port: Port,
    /// The frontend that another daemon or port passes on.
    pub(super) frontend: Option<FrontendHandover>,
}

impl Prepared {
    pub(super) fn status(&self) -> &PortStatus {
        self.port.status()
    }

    /// Sets the frontend that the port takes over. The control thread then waits for a command to resume.
    pub(super) fn take_over(&mut self, frontend: FrontendHandover) {
        self.frontend = Some(frontend);
    }
}

/// Starts the workers of a port. Their counters continue from `counters`, or start at zero.
pub(super) fn prepare(
    opened: Opened,
    counters: Vec<PairCounters>,
    sandbox: Sandbox,
) -> Result<Prepared, StartError> {
    let Opened { name, config, from_file, queues, endpoint } = opened;
    let handles = queues.iter().map(HostQueue::handle).collect::<io::Result<Vec<_>>>();
    let handles = handles.map_err(no_descriptor)?.into_iter().flatten().collect();
    let tap = queues[0].tap_state();
    let listener = endpoint.fd().map(|fd| fd.try_clone_to_owned()).transpose();
    let listener = listener.map_err(no_descriptor)?;
    let largest_mtu = queues[0].largest_mtu();
    let offloads = queues[0].offloads();
    let offer = offer(&config, offloads);
    let net_config = NetConfig {
        mac: config.mac.unwrap_or_default(),
        queue_pairs: config.queue_pairs,
        mtu: config.mtu,
        link: config.link,
    };
    let limits =
        Arc::new(Limits { rx: Limiter::new(&config.rx_limit), tx: Limiter::new(&config.tx_limit) });
    let filters = Filters {
        tx: Arc::new(LiveFilter::new(config.tx_filter.clone())),
        rx: queues[0].rx_filter(),
    };
    let shared = WorkerOptions {
        name: name.clone(),
        cpu: None,
        busy_poll: config.busy_poll,
        limits: limits.clone(),
        pair: 0,
        capture: Arc::default(),
        tx_filter: filters.tx.clone(),
        peers: Arc::default(),
        sandbox,
    };
    let traffic = queues[0].traffic(shared.peers.clone());
    let device = queues[0].device();
    let announcer = queues[0].announcer(&limits, &filters.tx).map_err(no_descriptor)?;
    let queues = queues
        .into_iter()
        .zip(counters.into_iter().map(Some).chain(std::iter::repeat_with(|| None)));
    let workers = start_workers(&config, &shared, queues)?;
    let capture = shared.capture;
    let status = Arc::new(PortStatus::new(
        name.clone(),
        config.host.to_string(),
        device,
        config.frontend.clone(),
        limits,
        filters,
        traffic,
        Arc::new(MemoryQuota::new(config.memory_limit())),
        Arc::new(DescriptorQuota::new(
            usize::from(config.queue_pairs),
            matches!(config.host, Host::AfXdp(_)),
        )),
        workers.iter().map(|worker| worker.status().clone()).collect(),
    ));
    status.set_link(config.link);
    status.set_listener(listener);
    info!("{name}: ready queue_pairs={} features={:#x}", config.queue_pairs, offer.bits());
    let mut device = Device::new(name, offer, net_config, workers);
    device.set_anti_spoofing(
        config.allowed_sources.clone().map(|identity| Arc::new(AntiSpoofing::new(identity))),
    );
    device.set_link(config.link);
    device.set_announcer(announcer);
    device.set_limits(status.limits.clone());
    device.set_quota(status.memory.clone());
    device.set_descriptor_quota(status.descriptors.clone());
    device.set_largest_mtu(largest_mtu);
    device.require_sealed_memory(config.require_sealed_memory);
    let wake = Arc::new(Waker::new().map_err(no_descriptor)?);
    let (commands, inbox) = channel();
    let control = Control::new(device, endpoint, status.clone(), wake.clone(), inbox);
    let control = control.map_err(no_descriptor)?;
    let (offered, queues, thread) = (offer.bits(), handles, None);
    let port = Port {
        status,
        config,
        from_file,
        offered,
        offloads,
        capture,
        queues,
        tap,
        commands,
        wake,
        thread,
    };
    Ok(Prepared { control, port, frontend: None })
}

/// Starts one worker per queue pair; the workers' options differ only by the pair's number.
fn start_workers(
    config: &PortConfig,
    shared: &WorkerOptions,
    queues: impl Iterator<Item = (HostQueue, Option<PairCounters>)>,
) -> Result<Vec<Worker>, StartError> {
    let (cpus, name) = (&config.cpu_affinity, &shared.name);
    let start = |(pair, (queue, counters)): (usize, (HostQueue, Option<PairCounters>))| {
        let options = WorkerOptions {
            name: format!("{name}/{pair}"),
            cpu: cpus.iter().cycle().nth(pair).copied(),
            pair: pair as u16,
            ..shared.clone()
        };
        Worker::start(queue, options, counters.unwrap_or_default())
            .map_err(|error| StartError::new(format!("cannot start a worker of {name}: {error}")))
    };
    queues.enumerate().map(start).collect()
}

/// Returns the features that a port offers on a device with these offloads.
pub(super) fn offer(config: &PortConfig, offloads: PortOffloads) -> Offer {
    let options = OfferOptions {
        guest_segmentation: config.guest_tso,
        mac: config.mac.is_some(),
        ring_reset: config.ring_reset,
    };
    Offer::new(offloads, options)
}
