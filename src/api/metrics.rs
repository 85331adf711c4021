//! The counters as Prometheus reads them. Directions are the guest's: rx is to the guest.

use std::sync::Arc;
use std::time::Duration;

use prometheus::proto::{Counter as Count, Gauge, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Encoder, TextEncoder};

use super::report::{device_drops, state};
use crate::counters::{
    CopyReason, Counter, DirectionCounters, DropReason, Histogram, PairCounters,
};
use crate::descriptors;
use crate::guest::MemoryQuota;
use crate::net_config::MAX_QUEUE_PAIRS;
use crate::ports::{Port, PortStatus, Ports};
use crate::worker::PairStatus;

type PerDirection = (&'static str, &'static str, fn(&DirectionCounters) -> &Counter);
type PerPair = (&'static str, &'static str, fn(&PairCounters) -> &Counter);

const PER_DIRECTION: [PerDirection; 6] = [
    ("frames_total", "Frames moved; rx is to the guest", |it| &it.frames),
    ("bytes_total", "Bytes of these frames, without virtio headers", |it| &it.bytes),
    ("kicks_total", "Kicks by the guest that woke the worker", |it| &it.kicks),
    ("calls_total", "Interrupts sent to the guest", |it| &it.calls),
    ("calls_suppressed_total", "Interrupts that the guest did not want", |it| &it.calls_suppressed),
    ("bursts_limited_total", "Bursts that the port's limit cut short", |it| &it.limited),
];

const PER_PAIR: [PerPair; 10] = [
    ("sessions_total", "Times that the rings were started, or changed", |it| &it.sessions),
    ("turns_total", "Turns of the worker that moved something", |it| &it.turns),
    ("poll_attempts_total", "Polls for a guest's reply", |it| &it.poll_attempts),
    ("poll_successes_total", "Polls that ended with a reply", |it| &it.poll_successes),
    ("coalesced_sleeps_total", "Sleeps to coalesce wake-ups", |it| &it.coalesced_sleeps),
    ("looks_total", "Deprecated: use poll_attempts_total", |it| &it.poll_attempts),
    ("replies_total", "Deprecated: use poll_successes_total", |it| &it.poll_successes),
    ("naps_total", "Deprecated: use coalesced_sleeps_total", |it| &it.coalesced_sleeps),
    ("sleeps_total", "Times that the worker went to sleep", |it| &it.sleeps),
    ("starved_total", "Times that frames waited for the guest's buffers", |it| &it.starved),
];

/// States that a port may be in.
const STATES: [&str; 6] = ["waiting", "connected", "running", "degraded", "stopped", "ended"];

/// Names and values of a metric's labels.
type Labels<'a> = Vec<(&'static str, &'a str)>;

fn labelled(labels: &Labels<'_>) -> Metric {
    let pair = |(name, value): &(&str, &str)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    };
    Metric::from_label(labels.iter().map(pair).collect())
}

fn counted(labels: &Labels<'_>, value: u64) -> Metric {
    let mut count = Count::default();
    count.set_value(value as f64);
    let mut metric = labelled(labels);
    metric.set_counter(count);
    metric
}

fn histogram<const N: usize>(labels: &Labels<'_>, from: &Histogram<N>, unit: f64) -> Metric {
    let mut histogram = prometheus::proto::Histogram::default();
    let cumulated = from.cumulated();
    histogram.set_sample_count(cumulated.last().map_or(0, |(_, all)| *all));
    histogram.set_sample_sum(from.sum() as f64 * unit);
    let bucket = |(bound, below): (f64, u64)| {
        let mut bucket = prometheus::proto::Bucket::default();
        bucket.set_upper_bound(bound * unit);
        bucket.set_cumulative_count(below);
        bucket
    };
    histogram.set_bucket(cumulated.into_iter().map(bucket).collect());
    let mut metric = labelled(labels);
    metric.set_histogram(histogram);
    metric
}

fn seconds(labels: &Labels<'_>, time: Duration) -> Metric {
    let mut count = Count::default();
    count.set_value(time.as_secs_f64());
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

fn family(name: &str, help: &str, kind: MetricType, metrics: Vec<Metric>) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(format!("vhost_user_net_{name}"));
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(metrics);
    family
}

/// A direction of a queue pair, and what it is labelled with.
struct Direction<'a> {
    labels: Labels<'a>,
    counters: &'a DirectionCounters,
}

/// The exposition of all ports' counters.
pub(super) fn text(ports: &Ports) -> String {
    let (abandoned, missing) = (ports.abandoned(), ports.missing().len());
    let device_drops = ports.iter().filter_map(|port| match ports.device(port) {
        Some(link) => Some((port.name(), device_drops(port, &link))),
        None if port.status().host == "loopback" => Some((port.name(), [0, 0])),
        None => None,
    });
    let device_drops: Vec<(&str, [u64; 2])> = device_drops.collect();
    let foreign = ports
        .iter()
        .map(|port| gauge(&vec![("port", port.name())], ports.foreign_queues(port).into()));
    let foreign: Vec<Metric> = foreign.collect();
    let ports: Vec<&PortStatus> = ports.iter().map(Port::status).map(Arc::as_ref).collect();
    let numbers: Vec<String> = (0..usize::from(MAX_QUEUE_PAIRS)).map(|n| n.to_string()).collect();
    let pairs: Vec<(Labels<'_>, &PairStatus)> = ports
        .iter()
        .flat_map(|port| {
            let labelled = |(pair, number)| {
                let pair: &Arc<PairStatus> = pair;
                let number: &String = number;
                (vec![("port", port.name.as_str()), ("queue", number.as_str())], &**pair)
            };
            port.pairs.iter().zip(&numbers).map(labelled)
        })
        .collect();
    let directions: Vec<Direction<'_>> = pairs
        .iter()
        .flat_map(|(labels, pair)| {
            [("rx", &pair.counters.rx), ("tx", &pair.counters.tx)].map(|(direction, counters)| {
                let labels = labels.iter().copied().chain([("direction", direction)]).collect();
                Direction { labels, counters }
            })
        })
        .collect();
    let by_reason = |reasons: &[&'static str], count: &dyn Fn(&DirectionCounters, usize) -> u64| {
        let mut metrics = Vec::new();
        for Direction { labels, counters } in &directions {
            metrics.extend(reasons.iter().enumerate().map(|(index, reason)| {
                let labels = labels.iter().copied().chain([("reason", *reason)]).collect();
                counted(&labels, count(counters, index))
            }));
        }
        metrics
    };

    let mut families = Vec::new();
    for (name, help, counter) in PER_DIRECTION {
        let metrics = directions.iter().map(|it| counted(&it.labels, counter(it.counters).get()));
        families.push(family(name, help, MetricType::COUNTER, metrics.collect()));
    }
    for (name, help, counter) in PER_PAIR {
        let count = |pair: &PairStatus| counter(&pair.counters).get();
        let metrics = pairs.iter().map(|(labels, pair)| counted(labels, count(pair)));
        families.push(family(name, help, MetricType::COUNTER, metrics.collect()));
    }
    let bursts = directions.iter().map(|it| histogram(&it.labels, &it.counters.bursts, 1.0));
    let help = "Chains that were shown to the guest as used at once";
    families.push(family("burst_chains", help, MetricType::HISTOGRAM, bursts.collect()));
    let waits =
        pairs.iter().map(|(labels, pair)| histogram(labels, &pair.counters.kick_to_used, 1e-6));
    let help = "From when a kick for frames from the guest woke the worker until the guest was shown \
                that the first of them are used";
    families.push(family("kick_to_used_seconds", help, MetricType::HISTOGRAM, waits.collect()));
    let times: Vec<_> =
        pairs.iter().filter_map(|(labels, pair)| Some((labels, pair.times()?))).collect();
    for (name, help, which) in [
        ("busy_seconds_total", "Time that the worker ran on a processor", 0),
        ("idle_seconds_total", "Time that it did not", 1),
    ] {
        let time = |(busy, idle): (Duration, Duration)| [busy, idle][which];
        let metrics = times.iter().map(|(labels, both)| seconds(labels, time(*both)));
        families.push(family(name, help, MetricType::COUNTER, metrics.collect()));
    }
    let modes = pairs.iter().map(|(labels, pair)| {
        let mode = pair.mode().name();
        gauge(&labels.iter().copied().chain([("mode", mode)]).collect(), 1.0)
    });
    let help = "How the queue pair has moved frames last";
    families.push(family("queue_mode", help, MetricType::GAUGE, modes.collect()));
    let drops = by_reason(&DropReason::ALL.map(DropReason::name), &|it, index| {
        it.drops(DropReason::ALL[index])
    });
    let help = "Frames dropped, by reason";
    families.push(family("drops_total", help, MetricType::COUNTER, drops));
    let copies = by_reason(&CopyReason::ALL.map(CopyReason::name), &|it, index| {
        it.copies(CopyReason::ALL[index])
    });
    let help = "Frames moved whose payload was copied in user space, by reason";
    families.push(family("copies_total", help, MetricType::COUNTER, copies));
    let drops = device_drops.iter().flat_map(|(port, [rx, tx])| {
        [("rx", *rx), ("tx", *tx)].map(|(direction, drops)| {
            counted(&vec![("port", *port), ("direction", direction)], drops)
        })
    });
    let help =
        "Frames that the kernel has dropped in the port's network device; rx is to the guest";
    families.push(family("device_drops_total", help, MetricType::COUNTER, drops.collect()));
    let help = "Queues of the port's TAP that other processes have";
    families.push(family("foreign_queues", help, MetricType::GAUGE, foreign));
    let states = ports.iter().flat_map(|port| {
        let now = state(port).0;
        STATES.map(|state| {
            let labels = vec![("port", port.name.as_str()), ("state", state)];
            gauge(&labels, if state == now { 1.0 } else { 0.0 })
        })
    });
    let help = "Whether the port is in this state";
    families.push(family("port_state", help, MetricType::GAUGE, states.collect()));
    let links = ports.iter().map(|port| {
        gauge(&vec![("port", port.name.as_str())], if port.has_link() { 1.0 } else { 0.0 })
    });
    let help = "Whether an operator lets frames move";
    families.push(family("link_up", help, MetricType::GAUGE, links.collect()));
    for (name, help, bytes) in [
        (
            "mapped_bytes",
            "Bytes of guest memory, dirty log and inflight buffer that are mapped",
            MemoryQuota::mapped as fn(&MemoryQuota) -> u64,
        ),
        (
            "pinned_bytes",
            "Bytes of guest memory and bounce buffers that the kernel keeps in memory for AF_XDP",
            MemoryQuota::pinned,
        ),
        ("max_mapped_bytes", "Bytes that can be mapped: the port's max-memory", MemoryQuota::limit),
    ] {
        let metrics = ports
            .iter()
            .map(|port| gauge(&vec![("port", port.name.as_str())], bytes(&port.memory) as f64));
        families.push(family(name, help, MetricType::GAUGE, metrics.collect()));
    }
    let metrics = ports
        .iter()
        .map(|port| gauge(&vec![("port", port.name.as_str())], port.descriptors.kept() as f64));
    let help = "Descriptors that are kept for the VMM: of memory, rings, dirty log and the like";
    families.push(family("vmm_descriptors", help, MetricType::GAUGE, metrics.collect()));
    let metrics = ports
        .iter()
        .map(|port| counted(&vec![("port", port.name.as_str())], port.descriptors.refused()));
    let help = "Requests of the VMM refused because too few descriptors may be open";
    families.push(family(
        "descriptors_refused_total",
        help,
        MetricType::COUNTER,
        metrics.collect(),
    ));
    let most = vec![gauge(&Vec::new(), descriptors::limit() as f64)];
    let help = "Descriptors that the daemon may open (RLIMIT_NOFILE)";
    families.push(family("max_descriptors", help, MetricType::GAUGE, most));
    let build = gauge(&vec![("version", env!("CARGO_PKG_VERSION"))], 1.0);
    families.push(family("build_info", "The daemon's version", MetricType::GAUGE, vec![build]));
    let help = "Ports that did not stop in time when they were removed";
    let abandoned = vec![counted(&Vec::new(), abandoned as u64)];
    families.push(family("abandoned_ports_total", help, MetricType::COUNTER, abandoned));
    let help = "Ports of the file that could not be started, and are tried every second";
    let missing = vec![gauge(&Vec::new(), missing as f64)];
    families.push(family("missing_ports", help, MetricType::GAUGE, missing));
    let connections = ports
        .iter()
        .map(|port| counted(&vec![("port", &port.name)], port.connection().connections));
    let help = "Connections of frontends";
    families.push(family("connections_total", help, MetricType::COUNTER, connections.collect()));

    // A daemon that has no ports yet has no metrics, which the encoder takes for a mistake.
    families.retain(|family| !family.get_metric().is_empty());
    let mut bytes = Vec::new();
    let _ = TextEncoder::new().encode(&families, &mut bytes);
    String::from_utf8(bytes).unwrap_or_default()
}
