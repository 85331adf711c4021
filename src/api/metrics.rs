//! The counters as Prometheus reads them. Directions are the guest's: rx is to the guest.

use std::sync::Arc;

use prometheus::proto::{Counter as Count, Gauge, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Encoder, TextEncoder};

use super::report::state;
use crate::config::MAX_QUEUE_PAIRS;
use crate::counters::{CopyReason, Counter, DirectionCounters, Drop, PairCounters};
use crate::daemon::{Port, Ports};
use crate::status::{PairStatus, PortStatus};

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

const PER_PAIR: [PerPair; 3] = [
    ("turns_total", "Turns of the worker that moved something", |it| &it.turns),
    ("sleeps_total", "Times that the worker went to sleep", |it| &it.sleeps),
    ("starved_total", "Times that frames waited for the guest's buffers", |it| &it.starved),
];

/// States that a port may be in.
const STATES: [&str; 5] = ["waiting", "connected", "running", "stopped", "ended"];

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
    let ports: Vec<&PortStatus> = ports.iter().map(Port::status).map(Arc::as_ref).collect();
    let numbers: Vec<String> = (0..usize::from(MAX_QUEUE_PAIRS)).map(|n| n.to_string()).collect();
    let pairs: Vec<(Labels<'_>, &PairCounters)> = ports
        .iter()
        .flat_map(|port| {
            let labelled = |(pair, number)| {
                let pair: &Arc<PairStatus> = pair;
                let number: &String = number;
                (vec![("port", port.name.as_str()), ("queue", number.as_str())], &pair.counters)
            };
            port.pairs.iter().zip(&numbers).map(labelled)
        })
        .collect();
    let directions: Vec<Direction<'_>> = pairs
        .iter()
        .flat_map(|(labels, pair)| {
            [("rx", &pair.rx), ("tx", &pair.tx)].map(|(direction, counters)| {
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
        let metrics = pairs.iter().map(|(labels, pair)| counted(labels, counter(pair).get()));
        families.push(family(name, help, MetricType::COUNTER, metrics.collect()));
    }
    let drops = by_reason(&Drop::ALL.map(Drop::name), &|it, index| it.drops(Drop::ALL[index]));
    let help = "Frames dropped, by reason";
    families.push(family("drops_total", help, MetricType::COUNTER, drops));
    let copies = by_reason(&CopyReason::ALL.map(CopyReason::name), &|it, index| {
        it.copies(CopyReason::ALL[index])
    });
    let help = "Frames moved whose payload was copied in user space, by reason";
    families.push(family("copies_total", help, MetricType::COUNTER, copies));
    let states = ports.iter().flat_map(|port| {
        let now = state(port).0;
        STATES.map(|state| {
            let mut gauge = Gauge::default();
            gauge.set_value(if state == now { 1.0 } else { 0.0 });
            let mut metric = labelled(&vec![("port", &port.name), ("state", state)]);
            metric.set_gauge(gauge);
            metric
        })
    });
    let help = "Whether the port is in this state";
    families.push(family("port_state", help, MetricType::GAUGE, states.collect()));
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
