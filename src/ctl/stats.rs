//! `vhost-user-net ctl stats`: ports' rates, from differences of counters.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::connection::{Connection, Failure};
use crate::api::requests::Command;

/// Sums a number over a port's queue pairs, at a path within each.
fn sum(report: &Value, path: &str) -> f64 {
    let pairs = report["queue_pairs"].as_array().map_or(&[][..], Vec::as_slice);
    pairs.iter().filter_map(|pair| pair.pointer(path)?.as_f64()).sum()
}

/// Shows the rates of these ports, or of all if `ports` is empty, over each interval `time`: `count` times,
/// or until `show` returns false.
///
/// # Errors
/// The daemon cannot be asked, or has no such port.
pub(super) fn rates(
    daemon: &mut Connection,
    ports: &[String],
    time: Duration,
    count: u64,
    mut show: impl FnMut(&[Value]) -> bool,
) -> Result<(), Failure> {
    let list = daemon.ask(&Command::List {}, &[])?;
    let all = list.as_array().map_or(&[][..], Vec::as_slice);
    let all = all.iter().filter_map(|port| port["name"].as_str().map(str::to_owned));
    let names: Vec<String> = if ports.is_empty() { all.collect() } else { ports.to_vec() };
    let mut sample = || -> Result<Vec<(Instant, Value)>, Failure> {
        let report = |port: &String| {
            let report = daemon.ask(&Command::Show { port: port.clone() }, &[])?;
            Ok((Instant::now(), report))
        };
        names.iter().map(report).collect()
    };
    let mut before = sample()?;
    for _ in 0..count {
        std::thread::sleep(time);
        let after = sample()?;
        let pairs = before.iter().zip(&after);
        let rates: Vec<Value> = pairs.map(|(before, after)| difference(before, after)).collect();
        if !show(&rates) {
            break;
        }
        before = after;
    }
    Ok(())
}

/// Returns a port's rates between two reports.
fn difference((then, before): &(Instant, Value), (now, after): &(Instant, Value)) -> Value {
    let seconds = (*now - *then).as_secs_f64();
    let rate = |path: &str| ((sum(after, path) - sum(before, path)) / seconds).max(0.0);
    let dropped = |report: &Value| report["dropped"].as_f64().unwrap_or(0.0);
    let in_device = |report: &Value| {
        let drops = |way: &str| report["device"][way].as_f64().unwrap_or(0.0);
        drops("rx_drops") + drops("tx_drops")
    };
    let lost =
        |count: &dyn Fn(&Value) -> f64| ((count(after) - count(before)) / seconds).max(0.0).round();
    json!({
        "name": after["name"],
        "rx_frames_per_second": rate("/rx/frames").round(),
        "rx_bits_per_second": (8.0 * rate("/rx/bytes")).round(),
        "tx_frames_per_second": rate("/tx/frames").round(),
        "tx_bits_per_second": (8.0 * rate("/tx/bytes")).round(),
        "dropped_per_second": lost(&dropped),
        "device_drops_per_second": lost(&in_device),
        "kicks_per_second": (rate("/rx/kicks") + rate("/tx/kicks")).round(),
        "calls_per_second": (rate("/rx/calls") + rate("/tx/calls")).round(),
        // In CPUs: above 1 with several queue pairs.
        "busy": (rate("/busy_seconds") * 1000.0).round() / 1000.0,
    })
}
