//! Counters and gauges in Prometheus' text format. As everywhere, rx is host to guest, tx is guest to host.

use std::sync::Arc;

use prometheus::proto::{
    Bucket, Counter as Count, Gauge, LabelPair, Metric, MetricFamily, MetricType,
};
use prometheus::{Encoder, TextEncoder};

use super::report::{device_drops, state};
use crate::counters::{
    CopyReason, Counter, DirectionCounters, DropReason, Histogram, PairCounters,
};
use crate::descriptors;
use crate::net_config::MAX_QUEUE_PAIRS;
use crate::ports::{Port, PortStatus, Ports};
use crate::worker::PairStatus;

/// Name, help and value of a counter with the labels of a port, a queue pair and a direction.
type PerDirection = (&'static str, &'static str, fn(&DirectionCounters) -> &Counter);
/// Name, help and value of a counter with the labels of a port and a queue pair.
type PerPair = (&'static str, &'static str, fn(&PairCounters) -> &Counter);
/// Name, kind, help and value of a metric with the label of a port.
type PerPort = (&'static str, MetricType, &'static str, fn(&PortStatus) -> f64);

const PER_DIRECTION: [PerDirection; 6] = [
    ("frames_total", "Frames moved; rx is host to guest, tx is guest to host", |it| &it.frames),
    ("bytes_total", "Bytes of these frames, without virtio-net headers", |it| &it.bytes),
    ("kicks_total", "Kicks from the guest that woke the worker", |it| &it.kicks),
    ("calls_total", "Calls (interrupts) to the guest", |it| &it.calls),
    ("calls_suppressed_total", "Calls that the driver had disabled", |it| &it.calls_suppressed),
    ("bursts_limited_total", "Bursts that the port's rate limit shortened", |it| &it.limited),
];

const PER_PAIR: [PerPair; 10] = [
    ("sessions_total", "Sessions begun: the rings were started, or changed", |it| &it.sessions),
    ("turns_total", "Turns of the worker that moved frames", |it| &it.turns),
    ("poll_attempts_total", "Polls for a guest's reply", |it| &it.poll_attempts),
    ("poll_successes_total", "Polls that ended with a reply", |it| &it.poll_successes),
    ("coalesced_sleeps_total", "Sleeps to coalesce wake-ups", |it| &it.coalesced_sleeps),
    ("looks_total", "Deprecated: use poll_attempts_total", |it| &it.poll_attempts),
    ("replies_total", "Deprecated: use poll_successes_total", |it| &it.poll_successes),
    ("naps_total", "Deprecated: use coalesced_sleeps_total", |it| &it.coalesced_sleeps),
    ("sleeps_total", "Sleeps of the worker", |it| &it.sleeps),
    ("starved_total", "Waits for the guest to add rx buffers", |it| &it.starved),
];

const PER_PORT: [PerPort; 7] = [
    ("link_up", MetricType::GAUGE, "1 if the link is up, 0 if an operator has set it down", |it| {
        it.has_link().into()
    }),
    (
        "mapped_bytes",
        MetricType::GAUGE,
        "Mapped bytes of guest memory, dirty log and inflight buffer",
        |it| it.memory.mapped() as f64,
    ),
    (
        "pinned_bytes",
        MetricType::GAUGE,
        "Bytes of guest memory and bounce buffers that the kernel has pinned for AF_XDP",
        |it| it.memory.pinned() as f64,
    ),
    ("max_mapped_bytes", MetricType::GAUGE, "Limit on mapped bytes: the port's max-memory", |it| {
        it.memory.limit() as f64
    }),
    (
        "vmm_descriptors",
        MetricType::GAUGE,
        "Descriptors kept for the VMM, such as those of memory regions, rings and the dirty log",
        |it| it.descriptors.kept() as f64,
    ),
    (
        "descriptors_refused_total",
        MetricType::COUNTER,
        "Requests of the VMM refused for lack of descriptors (RLIMIT_NOFILE)",
        |it| it.descriptors.refused() as f64,
    ),
    ("connections_total", MetricType::COUNTER, "Connections of frontends", |it| {
        it.connection().connections as f64
    }),
];

/// Values of the label `state`.
const STATES: [&str; 6] = ["waiting", "connected", "running", "degraded", "stopped", "ended"];

/// Returns the metrics of all ports and of the daemon.
pub(super) fn text(ports: &Ports) -> String {
    let numbers: Vec<String> = (0..MAX_QUEUE_PAIRS).map(|number| number.to_string()).collect();
    let statuses: Vec<&PortStatus> = ports.iter().map(Port::status).map(Arc::as_ref).collect();
    let pairs = pairs(&statuses, &numbers);
    let directions = directions(&pairs);
    let mut families = of_directions(&directions);
    families.extend(of_pairs(&pairs));
    families.extend(of_reasons(&directions));
    families.extend(of_devices(ports));
    families.extend(of_ports(&statuses));
    families.extend(of_daemon(ports));
    // A daemon without ports has families without metrics, which the encoder refuses.
    families.retain(|family| !family.get_metric().is_empty());
    let mut bytes = Vec::new();
    let _ = TextEncoder::new().encode(&families, &mut bytes);
    String::from_utf8(bytes).unwrap_or_default()
}

/// A queue pair with its labels.
struct Pair<'a> {
    labels: Labels<'a>,
    status: &'a PairStatus,
}

/// A direction of a queue pair with its labels.
struct Direction<'a> {
    labels: Labels<'a>,
    counters: &'a DirectionCounters,
}

/// Returns the queue pairs of all ports. `numbers` are the values of the label `queue`.
fn pairs<'a>(ports: &[&'a PortStatus], numbers: &'a [String]) -> Vec<Pair<'a>> {
    let mut pairs = Vec::new();
    for port in ports {
        pairs.extend(port.pairs.iter().zip(numbers).map(|(status, number)| Pair {
            labels: vec![("port", port.name.as_str()), ("queue", number.as_str())],
            status,
        }));
    }
    pairs
}

/// Returns both directions of each queue pair.
fn directions<'a>(pairs: &[Pair<'a>]) -> Vec<Direction<'a>> {
    let both = |pair: &Pair<'a>| {
        let counters = &pair.status.counters;
        [("rx", &counters.rx), ("tx", &counters.tx)].map(|(direction, counters)| Direction {
            labels: with(&pair.labels, "direction", direction),
            counters,
        })
    };
    pairs.iter().flat_map(both).collect()
}

fn of_directions(directions: &[Direction<'_>]) -> Vec<MetricFamily> {
    let mut families = Vec::new();
    for (name, help, value) in PER_DIRECTION {
        let count = |it: &Direction<'_>| counter(&it.labels, value(it.counters).get() as f64);
        let metrics = directions.iter().map(count).collect();
        families.push(family(name, MetricType::COUNTER, help, metrics));
    }
    let bursts = directions.iter().map(|it| histogram(&it.labels, &it.counters.bursts, 1.0));
    let help = "Chains published as used at once";
    families.push(family("burst_chains", MetricType::HISTOGRAM, help, bursts.collect()));
    families
}

fn of_pairs(pairs: &[Pair<'_>]) -> Vec<MetricFamily> {
    let mut families = Vec::new();
    for (name, help, value) in PER_PAIR {
        let count = |it: &Pair<'_>| counter(&it.labels, value(&it.status.counters).get() as f64);
        let metrics = pairs.iter().map(count).collect();
        families.push(family(name, MetricType::COUNTER, help, metrics));
    }
    let delays =
        pairs.iter().map(|it| histogram(&it.labels, &it.status.counters.kick_to_used, 1e-6));
    let help = "Time from a kick for frames from the guest that woke the worker until the first of these \
                frames was published as used";
    families.push(family("kick_to_used_seconds", MetricType::HISTOGRAM, help, delays.collect()));
    let (mut busy, mut idle) = (Vec::new(), Vec::new());
    for (labels, times) in pairs.iter().filter_map(|it| Some((&it.labels, it.status.times()?))) {
        busy.push(counter(labels, times.0.as_secs_f64()));
        idle.push(counter(labels, times.1.as_secs_f64()));
    }
    let help = "Time that the worker ran on a CPU";
    families.push(family("busy_seconds_total", MetricType::COUNTER, help, busy));
    let help = "Time that the worker ran on no CPU";
    families.push(family("idle_seconds_total", MetricType::COUNTER, help, idle));
    let mode = |it: &Pair<'_>| gauge(&with(&it.labels, "mode", it.status.mode().name()), 1.0);
    let modes = pairs.iter().map(mode).collect();
    let help = "1 for the mode in which the queue pair moved frames last";
    families.push(family("queue_mode", MetricType::GAUGE, help, modes));
    families
}

fn of_reasons(directions: &[Direction<'_>]) -> [MetricFamily; 2] {
    let (mut drops, mut copies) = (Vec::new(), Vec::new());
    for Direction { labels, counters } in directions {
        drops.extend(DropReason::ALL.map(|reason| {
            counter(&with(labels, "reason", reason.name()), counters.drops(reason) as f64)
        }));
        copies.extend(CopyReason::ALL.map(|reason| {
            counter(&with(labels, "reason", reason.name()), counters.copies(reason) as f64)
        }));
    }
    let copied = "Frames moved whose payload was copied in user space, by reason";
    [
        family("drops_total", MetricType::COUNTER, "Frames dropped, by reason", drops),
        family("copies_total", MetricType::COUNTER, copied, copies),
    ]
}

fn of_devices(ports: &Ports) -> [MetricFamily; 2] {
    let (mut drops, mut foreign) = (Vec::new(), Vec::new());
    for port in ports.iter() {
        let labels = vec![("port", port.name())];
        foreign.push(gauge(&labels, ports.foreign_queues(port).into()));
        let [rx, tx] = match ports.device(port) {
            Some(link) => device_drops(port, &link),
            None if port.status().host == "loopback" => [0, 0],
            None => continue,
        };
        drops.push(counter(&with(&labels, "direction", "rx"), rx as f64));
        drops.push(counter(&with(&labels, "direction", "tx"), tx as f64));
    }
    let dropped =
        "Frames that the kernel dropped in the port's network device; rx is host to guest";
    let queues = "Queues of the port's TAP that other processes have open";
    [
        family("device_drops_total", MetricType::COUNTER, dropped, drops),
        family("foreign_queues", MetricType::GAUGE, queues, foreign),
    ]
}

fn of_ports(ports: &[&PortStatus]) -> Vec<MetricFamily> {
    let mut states = Vec::new();
    for port in ports {
        let (labels, present) = (vec![("port", port.name.as_str())], state(port).0);
        states.extend(STATES.map(|state| {
            gauge(&with(&labels, "state", state), if state == present { 1.0 } else { 0.0 })
        }));
    }
    let help = "1 for the port's present state, 0 for the others";
    let mut families = vec![family("port_state", MetricType::GAUGE, help, states)];
    for (name, kind, help, value) in PER_PORT {
        let number = if kind == MetricType::COUNTER { counter } else { gauge };
        let metrics =
            ports.iter().map(|port| number(&vec![("port", port.name.as_str())], value(port)));
        families.push(family(name, kind, help, metrics.collect()));
    }
    families
}

fn of_daemon(ports: &Ports) -> [MetricFamily; 4] {
    let none = Labels::new();
    let most = gauge(&none, descriptors::limit() as f64);
    let build = gauge(&vec![("version", env!("CARGO_PKG_VERSION"))], 1.0);
    let abandoned = counter(&none, ports.abandoned() as f64);
    let missing = gauge(&none, ports.missing().len() as f64);
    let limit = "Limit on the daemon's open descriptors (RLIMIT_NOFILE)";
    let stuck = "Ports that did not stop in time when they were removed";
    let not_started =
        "Ports of the file that could not be started; the daemon tries them every second";
    [
        family("max_descriptors", MetricType::GAUGE, limit, vec![most]),
        family("build_info", MetricType::GAUGE, "The daemon's version", vec![build]),
        family("abandoned_ports_total", MetricType::COUNTER, stuck, vec![abandoned]),
        family("missing_ports", MetricType::GAUGE, not_started, vec![missing]),
    ]
}

/// Names and values of a metric's labels.
type Labels<'a> = Vec<(&'static str, &'a str)>;

/// Returns `labels` and one more.
fn with<'a>(labels: &Labels<'a>, name: &'static str, value: &'a str) -> Labels<'a> {
    labels.iter().copied().chain([(name, value)]).collect()
}

fn family(name: &str, kind: MetricType, help: &str, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(format!("vhost_user_net_{name}"));
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

fn counter(labels: &Labels<'_>, value: f64) -> Metric {
    let mut count = Count::default();
    count.set_value(value);
    let mut metric = labelled(labels);
    metric.set_counter(count);
    metric
}

fn gauge(labels: &Labels<'_>, value: f64) -> Metric {
    let mut gauge = Gauge::default();
    gauge.set_value(value);
    let mut metric = labelled(labels);
    metric.set_gauge(gauge);
    metric
}

/// Returns the metric of `from`, whose values are multiples of `unit`.
fn histogram<const N: usize>(labels: &Labels<'_>, from: &Histogram<N>, unit: f64) -> Metric {
    let mut histogram = prometheus::proto::Histogram::default();
    let cumulated = from.cumulated();
    histogram.set_sample_count(cumulated.last().map_or(0, |(_, all)| *all));
    histogram.set_sample_sum(from.sum() as f64 * unit);
    let bucket = |(bound, below): (f64, u64)| {
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(bound * unit);
        bucket.set_cumulative_count(below);
        bucket
    };
    histogram.set_bucket(cumulated.into_iter().map(bucket).collect());
    let mut metric = labelled(labels);
    metric.set_histogram(histogram);
    metric
}

fn labelled(labels: &Labels<'_>) -> Metric {
    let pair = |(name, value): &(&str, &str)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    };
    Metric::from_label(labels.iter().map(pair).collect())
}
