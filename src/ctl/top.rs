//! `vhost-user-net ctl top`: a live table of a port's traffic by protocol and peer.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::connection::{Connection, Failure};
use super::text::{columns, plain, print, short};
use crate::api::requests::Command;

/// Options of `ctl top`.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
pub struct TopOptions {
    /// Count for this many seconds before each table, 0.01 to 86400.
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = super::interval)]
    interval: Duration,
    /// Print this many tables [default: until interrupted].
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// Show at most this many rows.
    #[arg(long, value_name = "N", default_value = "20")]
    rows: usize,
}

/// Prints tables of traffic by protocol and peer. The daemon counts while the client is connected.
///
/// # Errors
/// The daemon cannot be asked, or has no such port.
pub(super) fn top(
    daemon: &mut Connection,
    port: &str,
    options: &TopOptions,
    in_json: bool,
) -> Result<(), Failure> {
    let mut ask = || -> Result<(Instant, Vec<Value>), Failure> {
        let rows = daemon.ask(&Command::Traffic { port: port.to_owned() }, &[])?;
        Ok((Instant::now(), rows.as_array().cloned().unwrap_or_default()))
    };
    let (mut since, mut before) = ask()?;
    let clear = if io::stdout().is_terminal() && !in_json { "\x1b[H\x1b[2J" } else { "" };
    for shown in 1.. {
        std::thread::sleep(options.interval);
        let (now, rows) = ask()?;
        let mut rates = rates(&before, &rows, now - since);
        rates.truncate(options.rows);
        let text = if in_json { format!("{:#}\n", json!(rates)) } else { table(&rates) };
        // The reader has closed the pipe.
        if !print(&(clear.to_owned() + &text)) {
            return Ok(());
        }
        (since, before) = (now, rows);
        if options.count.is_some_and(|count| shown >= count) {
            break;
        }
    }
    Ok(())
}

/// Returns the direction, protocol and peer of a row.
fn key(row: &Value) -> String {
    [&row["way"], &row["protocol"], &row["peer"]].map(Value::to_string).concat()
}

/// Returns the rates between two tables, highest bit rate first.
fn rates(before: &[Value], rows: &[Value], time: Duration) -> Vec<Value> {
    let before: HashMap<String, &Value> = before.iter().map(|row| (key(row), row)).collect();
    let number = |row: Option<&&Value>, name: &str| -> u64 {
        row.and_then(|row| row[name].as_u64()).unwrap_or(0)
    };
    let rate = |row: &Value| {
        let last = before.get(&key(row));
        let each = |name: &str| {
            let more = number(Some(&row), name).saturating_sub(number(last, name));
            (more as f64 / time.as_secs_f64()).round()
        };
        (each("frames") > 0.0).then(|| {
            json!({
                "way": row["way"],
                "protocol": row["protocol"],
                "peer": row["peer"],
                "frames_per_second": each("frames"),
                "bits_per_second": 8.0 * each("bytes"),
            })
        })
    };
    let mut rates: Vec<Value> = rows.iter().filter_map(rate).collect();
    rates.sort_by_key(|row| Reverse(row["bits_per_second"].as_f64().unwrap_or(0.0) as u64));
    rates
}

fn table(rates: &[Value]) -> String {
    let heads = ["WAY", "PROTOCOL", "PEER", "FRAMES/s", "BIT/s"].map(str::to_owned).to_vec();
    let mut rows = vec![heads];
    rows.extend(rates.iter().map(|row| {
        let word = |name: &str| match &row[name] {
            Value::Null => "-".to_owned(),
            value => plain(value),
        };
        let number = |name: &str| short(row[name].as_f64().unwrap_or(0.0));
        vec![
            word("way"),
            word("protocol"),
            word("peer"),
            number("frames_per_second"),
            number("bits_per_second"),
        ]
    }));
    columns(&rows)
}
