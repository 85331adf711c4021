//! The counters as Prometheus reads them. Directions are the guest's: rx is to the guest.

use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use crate::counters::{CopyReason, Counter, DirectionCounters, Drop, PairCounters};
use crate::status::PortStatus;

#[derive(Debug)]
struct Ports(Vec<Arc<PortStatus>>);

/// The exposition of all ports' counters.
pub(super) fn text(ports: &[Arc<PortStatus>]) -> String {
    let mut registry = Registry::with_prefix("vhost_user_net");
    registry.register_collector(Box::new(Ports(ports.to_vec())));
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = encode(&mut text, &registry);
    text
}

type PerDirection = (&'static str, &'static str, fn(&DirectionCounters) -> &Counter);
type PerPair = (&'static str, &'static str, fn(&PairCounters) -> &Counter);

const PER_DIRECTION: [PerDirection; 6] = [
    ("frames", "Frames moved; rx is to the guest", |it| &it.frames),
    ("bytes", "Bytes of these frames, without virtio headers", |it| &it.bytes),
    ("kicks", "Kicks by the guest that woke the worker", |it| &it.kicks),
    ("calls", "Interrupts sent to the guest", |it| &it.calls),
    ("calls_suppressed", "Interrupts that the guest did not want", |it| &it.calls_suppressed),
    ("bursts_limited", "Bursts that the port's limit cut short", |it| &it.limited),
];

const PER_PAIR: [PerPair; 3] = [
    ("turns", "Turns of the worker that moved something", |it| &it.turns),
    ("sleeps", "Times that the worker went to sleep", |it| &it.sleeps),
    ("starved", "Times that frames waited for the guest's buffers", |it| &it.starved),
];

impl Ports {
    /// Calls `each` with the labels and counters of every queue pair.
    fn each_pair(
        &self,
        mut each: impl FnMut(&str, &str, &PairCounters) -> fmt::Result,
    ) -> fmt::Result {
        for port in &self.0 {
            for (number, pair) in port.pairs.iter().enumerate() {
                each(&port.name, &number.to_string(), &pair.counters)?;
            }
        }
        Ok(())
    }

    /// The same for each direction of it.
    fn each_direction(
        &self,
        mut each: impl FnMut([(&str, &str); 3], &DirectionCounters) -> fmt::Result,
    ) -> fmt::Result {
        self.each_pair(|port, queue, counters| {
            for (direction, counters) in [("rx", &counters.rx), ("tx", &counters.tx)] {
                each([("port", port), ("queue", queue), ("direction", direction)], counters)?;
            }
            Ok(())
        })
    }
}

impl Collector for Ports {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for (name, help, counter) in PER_DIRECTION {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            self.each_direction(|labels, counters| {
                ConstCounter::new(counter(counters).get()).encode(metric.encode_family(&labels)?)
            })?;
        }
        for (name, help, counter) in PER_PAIR {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            self.each_pair(|port, queue, counters| {
                let labels = [("port", port), ("queue", queue)];
                ConstCounter::new(counter(counters).get()).encode(metric.encode_family(&labels)?)
            })?;
        }
        let help = "Frames dropped, by reason";
        let mut metric = encoder.encode_descriptor("drops", help, None, MetricType::Counter)?;
        self.each_direction(|[port, queue, direction], counters| {
            Drop::ALL.iter().try_for_each(|reason| {
                let labels = [port, queue, direction, ("reason", reason.name())];
                ConstCounter::new(counters.drops(*reason)).encode(metric.encode_family(&labels)?)
            })
        })?;
        let help = "Frames moved whose payload was copied in user space, by reason";
        let mut metric = encoder.encode_descriptor("copies", help, None, MetricType::Counter)?;
        self.each_direction(|[port, queue, direction], counters| {
            CopyReason::ALL.iter().try_for_each(|reason| {
                let labels = [port, queue, direction, ("reason", reason.name())];
                ConstCounter::new(counters.copies(*reason)).encode(metric.encode_family(&labels)?)
            })
        })?;
        let help = "Whether the port is in this state";
        let mut metric = encoder.encode_descriptor("port_state", help, None, MetricType::Gauge)?;
        for port in &self.0 {
            let now = super::report::state(port).0;
            for state in ["waiting", "connected", "running", "stopped"] {
                let labels = [("port", port.name.as_str()), ("state", state)];
                ConstGauge::new(u64::from(state == now)).encode(metric.encode_family(&labels)?)?;
            }
        }
        let help = "Connections of frontends";
        let mut metric =
            encoder.encode_descriptor("connections", help, None, MetricType::Counter)?;
        for port in &self.0 {
            let labels = [("port", port.name.as_str())];
            ConstCounter::new(port.connection().connections)
                .encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
