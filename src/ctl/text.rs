//! Replies of the daemon as text for people: tables, reports and rates.

use std::fmt::Write as _;
use std::io::{self, Write as _};

use serde_json::Value;

/// Returns a value without quotes.
pub(super) fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Returns a value as a cell of a table; a list is one word.
fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::Bool(value) => if *value { "on" } else { "off" }.into(),
        Value::Array(items) => items.iter().map(cell).collect::<Vec<_>>().join(","),
        value => plain(value),
    }
}

/// Writes to standard output; returns false once the reader has closed the pipe.
pub(super) fn print(text: &str) -> bool {
    let mut output = io::stdout().lock();
    output.write_all(text.as_bytes()).and_then(|()| output.flush()).is_ok()
}

/// Returns a number with three decimals and `k`, `M` or `G`.
pub(super) fn short(number: f64) -> String {
    let units = [(1e9, "G"), (1e6, "M"), (1e3, "k")];
    match units.iter().find(|(factor, _)| number >= *factor) {
        Some((factor, unit)) => format!("{:.3}{unit}", number / factor),
        None => format!("{number:.0}"),
    }
}

/// Returns rows of cells, aligned in columns; the first row holds the heads.
pub(super) fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.first().map_or(0, Vec::len);
    let widest = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..count).map(|column| widest(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
    text
}

/// Returns the table of ports, one line each.
pub(super) fn list(ports: &[Value]) -> String {
    const COLUMNS: [&str; 11] = [
        "name",
        "host",
        "state",
        "link",
        "rx_frames",
        "tx_frames",
        "dropped",
        "rx_limit",
        "tx_limit",
        "mac",
        "anti_spoofing",
    ];
    let heads = COLUMNS.map(|column| column.to_uppercase().replace('_', "-")).to_vec();
    let row = |port: &Value| COLUMNS.map(|column| cell(&port[column])).to_vec();
    columns(&[vec![heads], ports.iter().map(row).collect()].concat())
}

/// Returns the table of ports' rates, one line each.
pub(super) fn rates(rates: &[Value]) -> String {
    const COLUMNS: [(&str, &str); 9] = [
        ("RX-FRAMES/s", "rx_frames_per_second"),
        ("RX-BIT/s", "rx_bits_per_second"),
        ("TX-FRAMES/s", "tx_frames_per_second"),
        ("TX-BIT/s", "tx_bits_per_second"),
        ("DROPPED/s", "dropped_per_second"),
        ("DEVICE-DROPS/s", "device_drops_per_second"),
        ("KICKS/s", "kicks_per_second"),
        ("CALLS/s", "calls_per_second"),
        ("BUSY", "busy"),
    ];
    let heads = ["NAME"].into_iter().chain(COLUMNS.map(|(head, _)| head)).map(str::to_owned);
    let mut rows: Vec<Vec<String>> = vec![heads.collect()];
    rows.extend(rates.iter().map(|port| {
        let cell = |(_, key): &(&str, &str)| {
            let number = port[*key].as_f64().unwrap_or(0.0);
            if *key == "busy" { format!("{:.1} %", number * 100.0) } else { short(number) }
        };
        [plain(&port["name"])].into_iter().chain(COLUMNS.iter().map(cell)).collect()
    }));
    columns(&rows)
}

/// Returns a port's report.
pub(super) fn report(report: &Value) -> String {
    let mut text = format!("{}: {}\n", plain(&report["name"]), plain(&report["explanation"]));
    let _ = writeln!(text, "  host          {}", plain(&report["host"]));
    if let Some(device) = report["device"].as_object() {
        let (rx, tx) = (&device["rx_drops"], &device["tx_drops"]);
        let name = plain(&device["name"]);
        let _ = writeln!(
            text,
            "  device        {name}, in which the kernel dropped {rx} rx and {tx} tx"
        );
    }
    if let Some(seconds) = report["connected_seconds"].as_u64() {
        let features = plain(&report["features"]);
        let process = report["vmm_process"].as_i64();
        let process = process.map_or(String::new(), |process| format!(", process {process}"));
        let _ = writeln!(
            text,
            "  frontend      connected for {seconds} s{process}, features {features}"
        );
    }
    let _ = writeln!(text, "  connected     {} times so far", report["connections"]);
    if let (Some(mapped), Some(most)) =
        (report["mapped_bytes"].as_u64(), report["max_memory"].as_u64())
    {
        let _ = writeln!(text, "  mapped        {} of {} MiB", mapped >> 20, most >> 20);
    }
    for (way, what) in [("rx", "limit"), ("tx", "limit"), ("rx", "filter"), ("tx", "filter")] {
        let value = plain(&report[format!("{way}_{what}")]);
        let _ = writeln!(text, "  {:<13} {value}", format!("{way} {what}"));
    }
    for what in ["link", "mac", "anti_spoofing", "source_macs", "source_ips", "vlans"] {
        let value = match cell(&report[what]) {
            value if !value.is_empty() => value,
            // No addresses are listed, so the guest may use any.
            _ if what == "source_ips" || report["anti_spoofing"] != true => "any".into(),
            _ => "none".into(),
        };
        let _ = writeln!(text, "  {:<13} {value}", what.replace('_', " "));
    }
    let pairs = report["queue_pairs"].as_array().map_or(&[][..], Vec::as_slice);
    for (number, pair) in pairs.iter().enumerate() {
        let serving = if pair["serving"] == true { "running" } else { "not running" };
        let _ = writeln!(
            text,
            "  queue pair {number}: {serving}, mode {}, {} sessions, {} turns, {} sleeps, {} times out of \
             buffers",
            plain(&pair["mode"]),
            pair["sessions"],
            pair["turns"],
            pair["sleeps"],
            pair["starved"]
        );
        if let (Some(busy), Some(idle)) =
            (pair["busy_seconds"].as_f64(), pair["idle_seconds"].as_f64())
        {
            let _ = write!(text, "    busy {busy:.3} s, idle {idle:.3} s");
            if let Some(half) = pair["kick_to_used_p50"].as_f64() {
                let most = pair["kick_to_used_p99"].as_f64().unwrap_or(f64::INFINITY);
                let _ = write!(text, "; kick to used up to {half} us (half), {most} us (99 %)");
            }
            text.push('\n');
        }
        for way in ["rx", "tx"] {
            let it = &pair[way];
            let _ = write!(
                text,
                "    {way}: {} frames, {} bytes, {} kicks, {} calls ({} suppressed)",
                it["frames"], it["bytes"], it["kicks"], it["calls"], it["calls_suppressed"]
            );
            for what in ["dropped", "copied"] {
                for (reason, count) in it[what].as_object().into_iter().flatten() {
                    let _ = write!(text, ", {count} {what} ({reason})");
                }
            }
            if it["limited"] != 0 {
                let _ = write!(text, ", {} bursts limited", it["limited"]);
            }
            text.push('\n');
        }
    }
    text
}

/// Returns the daemon's version and settings, and its ports' feature bits.
pub(super) fn features(reply: &Value) -> String {
    let started = &reply["started"];
    let mut text = format!(
        "vhost-user-net {}, control version {}\n",
        plain(&reply["daemon"]),
        reply["version"]
    );
    let _ = writeln!(text, "  file       {}", started["file"].as_str().unwrap_or("-"));
    for (key, value) in started["settings"].as_object().into_iter().flatten() {
        let value = plain(value);
        let value = if value.is_empty() { "-" } else { &value };
        let _ = writeln!(text, "  {key:<10} {value}");
    }
    for (port, features) in reply["ports"].as_object().into_iter().flatten() {
        let names = |what: &str| -> String {
            let names = features[what].as_array().map_or(&[][..], Vec::as_slice);
            names.iter().map(plain).collect::<Vec<_>>().join(" ")
        };
        let _ = writeln!(text, "{port}: offered {}", names("offered"));
        let _ = writeln!(text, "{port}: in use  {}", names("negotiated"));
    }
    text
}
