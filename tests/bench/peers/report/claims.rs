//! What the daemon is to be, and whether it was in this run.

use std::fmt::Write;

use super::{Report, shown};

const TAP: &str = "vhost-user-net, TAP";
const XDP: &str = "vhost-user-net, AF_XDP";
const TAP_POLLING: &str = "vhost-user-net, TAP, --busy-poll";
const XDP_POLLING: &str = "vhost-user-net, AF_XDP, --busy-poll";
const VHOST_NET: &str = "vhost-net, TAP";
const PLAIN: &str = "plain backend, TAP";
const DPDK_TAP: &str = "DPDK, TAP";
const DPDK_XDP: &str = "DPDK, AF_XDP";
const OVS: &str = "OVS-DPDK, AF_XDP";

/// How a figure is compared with that of another subject.
#[derive(Clone, Copy)]
enum How {
    /// As a share of it, at most this.
    AtMost(f64),
    /// As a share of it, at least this.
    AtLeast(f64),
    /// By how much it is above it, at most.
    Above(f64),
}

/// A figure: its case and subject.
type Place = (&'static str, &'static str);

/// What is to be compared: figures in this unit.
struct Claim(&'static str, Place, How, Place);

use How::{Above, AtLeast, AtMost};

const CLAIMS: [Claim; 50] = [
    Claim("instructions", ("tx 64", TAP), AtMost(1.0), ("tx 64", VHOST_NET)),
    Claim("instructions", ("tx 512", TAP), AtMost(1.0), ("tx 512", VHOST_NET)),
    Claim("instructions", ("tx 1500", TAP), AtMost(1.0), ("tx 1500", VHOST_NET)),
    Claim("instructions", ("rx 64", TAP), AtMost(1.15), ("rx 64", VHOST_NET)),
    Claim("instructions", ("rx 512", TAP), AtMost(1.15), ("rx 512", VHOST_NET)),
    Claim("instructions", ("rx 1500", TAP), AtMost(1.15), ("rx 1500", VHOST_NET)),
    Claim("instructions", ("64 KiB tx", TAP), AtMost(1.05), ("64 KiB tx", VHOST_NET)),
    Claim("instructions", ("64 KiB rx", TAP), AtMost(1.05), ("64 KiB rx", VHOST_NET)),
    Claim("ns", ("tx 64", TAP), AtMost(1.1), ("tx 64", FRESH)),
    Claim("ns", ("tx 512", TAP), AtMost(1.1), ("tx 512", FRESH)),
    Claim("ns", ("tx 1500", TAP), AtMost(1.1), ("tx 1500", FRESH)),
    Claim("ns", ("lean rx 64", TAP), AtMost(1.15), ("lean rx 64", "bare read loop")),
    Claim("ns", ("lean rx 512", TAP), AtMost(1.15), ("lean rx 512", "bare read loop")),
    Claim("ns", ("lean rx 1500", TAP), AtMost(1.15), ("lean rx 1500", "bare read loop")),
    Claim("ns", ("paced tx 64", TAP), AtMost(0.5), ("paced tx 64", PLAIN)),
    Claim("ns/KiB", ("TCP to guest", TAP), AtMost(1.5), ("TCP to host", TAP)),
    Claim("ns", ("tx 64", XDP), Above(40.0), ("tx 64", "bare AF_XDP loop")),
    Claim("ns", ("tx 512", XDP), Above(40.0), ("tx 512", "bare AF_XDP loop")),
    Claim("ns", ("tx 1500", XDP), Above(40.0), ("tx 1500", "bare AF_XDP loop")),
    Claim("ns", ("lean rx 64", XDP), Above(35.0), ("lean rx 64", "bare AF_XDP loop")),
    Claim("ns", ("lean rx 512", XDP), Above(35.0), ("lean rx 512", "bare AF_XDP loop")),
    Claim("ns", ("lean rx 1500", XDP), Above(35.0), ("lean rx 1500", "bare AF_XDP loop")),
    Claim("Mpps", ("tx 64", XDP), AtLeast(1.0), ("tx 64", DPDK_XDP)),
    Claim("Mpps", ("tx 512", XDP), AtLeast(1.0), ("tx 512", DPDK_XDP)),
    Claim("Mpps", ("tx 1500", XDP), AtLeast(1.0), ("tx 1500", DPDK_XDP)),
    Claim("Mpps", ("lean rx 64", XDP), AtLeast(1.0), ("lean rx 64", DPDK_XDP)),
    Claim("Mpps", ("lean rx 512", XDP), AtLeast(1.0), ("lean rx 512", DPDK_XDP)),
    Claim("Mpps", ("lean rx 1500", XDP), AtLeast(1.0), ("lean rx 1500", DPDK_XDP)),
    Claim("ns", ("paced tx 64", XDP), AtMost(0.2), ("paced tx 64", DPDK_XDP)),
    Claim("us", ("ping p50", TAP), AtMost(1.0), ("ping p50", PLAIN)),
    Claim("us", ("ping p99", TAP), AtMost(1.0), ("ping p99", PLAIN)),
    Claim("us", ("ping p50", XDP), AtMost(1.0), ("ping p50", PLAIN)),
    Claim("us", ("ping p99", XDP), AtMost(1.0), ("ping p99", PLAIN)),
    Claim("us", ("ping p50", TAP_POLLING), AtMost(1.0), ("ping p50", DPDK_TAP)),
    Claim("us", ("ping p99", TAP_POLLING), AtMost(1.0), ("ping p99", DPDK_TAP)),
    Claim("us", ("ping p50", XDP_POLLING), AtMost(1.0), ("ping p50", DPDK_XDP)),
    Claim("us", ("ping p99", XDP_POLLING), AtMost(1.0), ("ping p99", DPDK_XDP)),
    Claim("us", ("ping p50", XDP_POLLING), AtMost(1.0), ("ping p50", OVS)),
    Claim("us", ("ping p99", XDP_POLLING), AtMost(1.0), ("ping p99", OVS)),
    Claim("us", (POLLED50, TAP), AtMost(1.0), (POLLED50, PLAIN)),
    Claim("us", (POLLED99, TAP), AtMost(1.0), (POLLED99, PLAIN)),
    Claim("us", (POLLED50, TAP_POLLING), AtMost(1.0), (POLLED50, DPDK_TAP)),
    Claim("us", (POLLED99, TAP_POLLING), AtMost(1.0), (POLLED99, DPDK_TAP)),
    Claim("us", (POLLED50, XDP_POLLING), AtMost(1.0), (POLLED50, DPDK_XDP)),
    Claim("us", (POLLED99, XDP_POLLING), AtMost(1.0), (POLLED99, DPDK_XDP)),
    Claim("us", (POLLED50, XDP_POLLING), AtMost(1.0), (POLLED50, OVS)),
    Claim("us", (POLLED99, XDP_POLLING), AtMost(1.0), (POLLED99, OVS)),
    Claim("ns", (MANY, MANY_64), AtMost(1.05), (MANY, MANY_1)),
    Claim("KiB", ("private memory", MANY_8), Above(7.0 * 300.0), ("private memory", MANY_1)),
    Claim("KiB", ("private memory", MANY_64), Above(63.0 * 300.0), ("private memory", MANY_1)),
];

/// The kernel's work for a header that the guest cannot change any more.
const FRESH: &str = "bare io_uring loop, header apart, fresh frames";
const POLLED50: &str = "ping, polling guest p50";
const POLLED99: &str = "ping, polling guest p99";
const MANY: &str = "tx 64, one port of many";
const MANY_1: &str = "vhost-user-net, 1 ports";
const MANY_8: &str = "vhost-user-net, 8 ports";
const MANY_64: &str = "vhost-user-net, 64 ports";

/// Figures by themselves, which are to be at most so large.
const LIMITS: [(&str, Place, f64); 6] = [
    ("%", ("64 KiB tx, in user space", TAP), 3.0),
    ("cores", ("idle", TAP), 0.0005),
    ("cores", ("idle", XDP), 0.0005),
    ("KiB", ("private memory", TAP), 4096.0),
    ("KiB", ("private memory", XDP), 4096.0),
    ("ms", ("ready", TAP), 10.0),
];

impl Report {
    /// A table of what is wanted, and what was measured.
    pub(in crate::peers) fn claims(&self) -> String {
        let mut text =
            "| | against | wanted | measured (quartiles) | |\n|---|---|---|---|---|\n".to_owned();
        for Claim(unit, (case, subject), how, (other_case, other)) in CLAIMS {
            let figures =
                self.values(case, subject, unit).zip(self.values(other_case, other, unit));
            let Some((ours, theirs)) = figures else { continue };
            // Of the same round each.
            let pairs = ours.iter().zip(theirs);
            let mut values: Vec<f64> = pairs
                .map(|(ours, theirs)| match how {
                    AtMost(_) | AtLeast(_) => ours / theirs,
                    Above(_) => ours - theirs,
                })
                .collect();
            values.sort_by(f64::total_cmp);
            let [low, value, high] = [1, 2, 3].map(|quarter| values[values.len() * quarter / 4]);
            let (wanted, holds) = match how {
                AtMost(limit) => (format!("at most {limit}"), value <= limit),
                AtLeast(limit) => (format!("at least {limit}"), value >= limit),
                Above(limit) => (format!("+{limit} at most"), value <= limit),
            };
            let against = if case == other_case { other } else { other_case };
            let [low, value, high] = [low, value, high].map(shown);
            let _ = writeln!(
                text,
                "| {case}, {unit}: {subject} | {against} | {wanted} | {value} ({low} to {high}) | {} |",
                verdict(holds)
            );
        }
        for (unit, (case, subject), limit) in LIMITS {
            let Some(value) = self.median(case, subject, unit) else { continue };
            let _ = writeln!(
                text,
                "| {case}: {subject} | | at most {limit} {unit} | {} | {} |",
                shown(value),
                verdict(value <= limit)
            );
        }
        text
    }
}

fn verdict(holds: bool) -> &'static str {
    if holds { "yes" } else { "**no**" }
}
