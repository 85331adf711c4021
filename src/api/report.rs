//! Reports about ports, as JSON.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::counters::{CopyReason, DirectionCounters, DropReason};
use crate::endpoint::Frontend;
use crate::features;
use crate::frame::FrameDirection;
use crate::ports::{FrontendStatus, Port, PortStatus, Ports};
use crate::sys::link::{Drops, Link};
use crate::traffic::Row;
use crate::worker::PairStatus;

/// The report for a list of ports.
#[derive(Debug, Serialize)]
pub(super) struct Summary {
    name: String,
    host: String,
    state: &'static str,
    rx_frames: u64,
    tx_frames: u64,
    dropped: u64,
    rx_limit: String,
    tx_limit: String,
    link: &'static str,
    from_file: bool,
    rx_filter: String,
    tx_filter: String,
    mac: Option<String>,
    anti_spoofing: bool,
    /// The source MAC addresses that anti-spoofing allows; `mac` is one of them.
    source_macs: Vec<String>,
    source_ips: Vec<String>,
    vlans: Vec<u16>,
}

/// The full report about a port.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    #[serde(flatten)]
    summary: Summary,
    /// The state, and the event that ends it, for an operator.
    explanation: String,
    /// The network device; `None` if the kernel does not report it.
    device: Option<DeviceReport>,
    /// The options that were set.
    options: serde_json::Map<String, serde_json::Value>,
    connected_seconds: Option<u64>,
    connections: u64,
    /// Process ID of the connected VMM, if it is in the daemon's PID namespace.
    vmm_process: Option<i32>,
    /// True if another VMM has connected since. It waits, or has disconnected again unnoticed.
    another_vmm_waits: bool,
    features: Option<String>,
    /// Mapped bytes of the VMM's files, and their limit.
    mapped_bytes: u64,
    max_memory: u64,
    queue_pairs: Vec<Pair>,
}

/// A port's network device.
#[derive(Debug, Serialize)]
struct DeviceReport {
    /// The present name.
    name: String,
    index: u32,
    /// Frames that the kernel dropped in the device, from host to guest.
    rx_drops: u64,
    /// Frames that the kernel dropped in the device, from guest to host.
    tx_drops: u64,
    /// Number of its queues that other processes have open.
    foreign_queues: u32,
}

/// Returns the numbers of frames that the kernel dropped in a port's device: rx (host to guest), then tx.
pub(super) fn device_drops(port: &Port, link: &Link) -> [u64; 2] {
    let Drops { rx, tx } = link.drops;
    // The kernel sends to a TAP the frames that the guest receives.
    if port.is_on_tap() { [tx, rx] } else { [rx, tx] }
}

/// A queue pair.
#[derive(Debug, Serialize)]
struct Pair {
    serving: bool,
    fault: Option<String>,
    /// Mode of the last transfer.
    mode: &'static str,
    sessions: u64,
    turns: u64,
    #[serde(rename = "looks")]
    poll_attempts: u64,
    #[serde(rename = "replies")]
    poll_successes: u64,
    #[serde(rename = "naps")]
    coalesced_sleeps: u64,
    sleeps: u64,
    starved: u64,
    /// Seconds that the worker ran on a CPU, and that it did not.
    busy_seconds: Option<f64>,
    idle_seconds: Option<f64>,
    /// Median and 99th percentile of the time from a kick to the first used frame, in microseconds.
    kick_to_used_p50: Option<f64>,
    kick_to_used_p99: Option<f64>,
    rx: Direction,
    tx: Direction,
}

/// A direction of a queue pair.
#[derive(Debug, Serialize)]
struct Direction {
    frames: u64,
    bytes: u64,
    dropped: BTreeMap<&'static str, u64>,
    copied: BTreeMap<&'static str, u64>,
    kicks: u64,
    calls: u64,
    calls_suppressed: u64,
    limited: u64,
    /// Median and 99th percentile of the chains published as used at once.
    burst_p50: Option<f64>,
    burst_p99: Option<f64>,
}

/// Returns the name of a port's state, and its explanation for an operator.
pub(super) fn state(port: &PortStatus) -> (&'static str, String) {
    if port.has_ended() {
        let why =
            "ended: its inherited connection was closed, or its control thread has exited; see the log".into();
        return ("ended", why);
    }
    let connection = port.connection();
    if connection.since.is_none() {
        let whom = match &port.frontend {
            Frontend::Listen(path) => format!("waiting for a frontend on {}", path.display()),
            Frontend::Connect(path) => format!("connecting to {}", path.display()),
            Frontend::Inherited(number) => format!("waiting for a frontend on descriptor {number}"),
        };
        return ("waiting", whom);
    }
    let faults = port.pairs.iter().enumerate();
    if let Some((pair, fault)) = faults.filter_map(|(pair, it)| Some((pair, it.fault()?))).next() {
        let why = format!(
            "stopped: queue pair {pair}: {fault}; resumes when the guest resets the device or the VMM \
             reconnects"
        );
        return ("stopped", why);
    }
    if port.is_degraded() {
        let why = "degraded: its network device does not work; frames are dropped; the daemon tries it every second";
        return ("degraded", why.into());
    }
    let serving = port.pairs.iter().filter(|pair| pair.is_serving()).count();
    match serving {
        0 => ("connected", "frontend connected; the guest has not started the device".into()),
        pairs => {
            let link = if port.has_link() { "" } else { "; an operator has set the link down" };
            ("running", format!("running: {pairs} of {} queue pairs{link}", port.pairs.len()))
        }
    }
}

fn texts<T: ToString>(items: &[T]) -> Vec<String> {
    items.iter().map(ToString::to_string).collect()
}

/// Returns the report for a list of ports.
pub(super) fn summary(it: &Port) -> Summary {
    let (port, config) = (it.status(), it.config());
    let sources = config.allowed_sources.clone().unwrap_or_default();
    let counters = || port.pairs.iter().map(|pair| &pair.counters);
    let dropped = |counters: &DirectionCounters| -> u64 {
        DropReason::ALL.iter().map(|reason| counters.drops(*reason)).fold(0, u64::saturating_add)
    };
    Summary {
        name: port.name.clone(),
        host: port.host.clone(),
        state: state(port).0,
        rx_frames: counters().map(|pair| pair.rx.frames.get()).fold(0, u64::saturating_add),
        tx_frames: counters().map(|pair| pair.tx.frames.get()).fold(0, u64::saturating_add),
        dropped: counters()
            .flat_map(|pair| [dropped(&pair.rx), dropped(&pair.tx)])
            .fold(0, u64::saturating_add),
        rx_limit: port.limits.rx.limit().to_string(),
        tx_limit: port.limits.tx.limit().to_string(),
        link: if port.has_link() { "up" } else { "down" },
        from_file: it.is_from_file(),
        rx_filter: port.filters.rx.get().to_string(),
        tx_filter: port.filters.tx.get().to_string(),
        mac: config.mac.map(|mac| mac.to_string()),
        anti_spoofing: config.allowed_sources.is_some(),
        source_macs: texts(&sources.macs),
        source_ips: texts(&sources.addresses),
        vlans: sources.vlans,
    }
}

/// Returns the names of the features that a port offers, and of those that are negotiated.
pub(super) fn features(port: &Port) -> serde_json::Value {
    let negotiated = port.status().connection().features.unwrap_or(0);
    serde_json::json!({
        "offered": features::names(port.offered()),
        "negotiated": features::names(negotiated),
    })
}

/// Returns the traffic of a port with one peer, by one protocol.
pub(super) fn traffic(row: &Row) -> serde_json::Value {
    let Row { key, volume } = row;
    serde_json::json!({
        "way": if key.direction == FrameDirection::Tx { "tx" } else { "rx" },
        "protocol": key.protocol.map(|protocol| protocol.to_string()),
        "peer": key.peer,
        "frames": volume.frames,
        "bytes": volume.bytes,
    })
}

/// Returns the remarks about a port's socket, which its explanation ends with in any state.
fn remarks(connection: &FrontendStatus) -> String {
    let waits = "another VMM has connected and waits, unless it has disconnected again";
    let waits = connection.another_waits.then_some(waits);
    [waits, connection.hidden].into_iter().flatten().map(|remark| format!("; {remark}")).collect()
}

/// Returns the full report about a port.
pub(super) fn full(ports: &Ports, it: &Port) -> Report {
    let device = ports.device(it).map(|link| {
        let [rx_drops, tx_drops] = device_drops(it, &link);
        let (name, index, foreign_queues) = (link.name, link.index, ports.foreign_queues(it));
        DeviceReport { name, index, rx_drops, tx_drops, foreign_queues }
    });
    let port = it.status();
    let connection = port.connection();
    let options = match serde_json::to_value(it.options()) {
        Ok(serde_json::Value::Object(options)) => options,
        _ => serde_json::Map::new(),
    };
    let is_set = |value: &serde_json::Value| {
        !(value.is_null() || value == false || value.as_array().is_some_and(Vec::is_empty))
    };
    Report {
        summary: summary(it),
        device,
        options: options.into_iter().filter(|(_, value)| is_set(value)).collect(),
        explanation: state(port).1 + &remarks(&connection),
        connected_seconds: connection.since.map(|since| since.elapsed().as_secs()),
        connections: connection.connections,
        vmm_process: connection.process,
        another_vmm_waits: connection.another_waits,
        features: connection.features.map(|bits| format!("{bits:#x}")),
        mapped_bytes: port.memory.mapped(),
        max_memory: port.memory.limit(),
        queue_pairs: port.pairs.iter().map(|pair| self::pair(pair)).collect(),
    }
}

fn pair(pair: &PairStatus) -> Pair {
    let (counters, times) = (&pair.counters, pair.times());
    Pair {
        serving: pair.is_serving(),
        fault: pair.fault(),
        mode: pair.mode().name(),
        sessions: counters.sessions.get(),
        busy_seconds: times.map(|(busy, _)| busy.as_secs_f64()),
        idle_seconds: times.map(|(_, idle)| idle.as_secs_f64()),
        kick_to_used_p50: counters.kick_to_used.quantile(0.5),
        kick_to_used_p99: counters.kick_to_used.quantile(0.99),
        turns: counters.turns.get(),
        poll_attempts: counters.poll_attempts.get(),
        poll_successes: counters.poll_successes.get(),
        coalesced_sleeps: counters.coalesced_sleeps.get(),
        sleeps: counters.sleeps.get(),
        starved: counters.starved.get(),
        rx: direction(&counters.rx),
        tx: direction(&counters.tx),
    }
}

fn direction(counters: &DirectionCounters) -> Direction {
    let dropped = DropReason::ALL.map(|reason| (reason.name(), counters.drops(reason)));
    let copied = CopyReason::ALL.map(|reason| (reason.name(), counters.copies(reason)));
    Direction {
        frames: counters.frames.get(),
        bytes: counters.bytes.get(),
        dropped: dropped.into_iter().filter(|(_, count)| *count > 0).collect(),
        copied: copied.into_iter().filter(|(_, count)| *count > 0).collect(),
        kicks: counters.kicks.get(),
        calls: counters.calls.get(),
        calls_suppressed: counters.calls_suppressed.get(),
        limited: counters.limited.get(),
        burst_p50: counters.bursts.quantile(0.5),
        burst_p99: counters.bursts.quantile(0.99),
    }
}
