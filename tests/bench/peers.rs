//! This daemon beside its peers, in one run: what a frame costs each, what TCP and pings do with a
//! guest behind each, what each costs while nothing happens, and how that grows with ports.
//!
//! All have the same guests and the same senders, on processor 0; backends have processor 1, and
//! take turns: those that poll are stopped (SIGSTOP) between theirs.

mod cases;
mod kernel_guest;
mod party;
mod plain;
mod report;

use std::fs;
use std::path::PathBuf;

use vhost_user_net::sys::process::pin_this_thread;

use crate::support::network::enter_quiet_namespace;
use party::{CONTESTANTS, Party, missing};
use report::Report;

pub(crate) use plain::serve as serve_plain;

/// Which cases are measured, if not all.
const CASES: &str = "COMPARE_CASES";
/// Whose names contain one of these, if not all take part; separated by semicolons.
const PARTIES: &str = "COMPARE_PARTIES";
/// Where the figures are put.
const DIRECTORY: &str = "COMPARE_DIRECTORY";

pub(super) fn run() {
    enter_a_namespace();
    pin_this_thread(0).unwrap();
    let wanted = std::env::var(CASES).unwrap_or_default();
    let wanted: Vec<&str> = wanted.split_whitespace().collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.contains(&name);
    let mut report = Report::default();
    let mut contestants = CONTESTANTS.to_vec();
    contestants.retain(|contestant| match missing(contestant) {
        Some(why) => {
            report.skip(contestant.name, why);
            false
        }
        None => true,
    });
    let names = std::env::var(PARTIES).unwrap_or_default();
    contestants.retain(|it| names.split(';').any(|part| it.name.contains(part)));
    if !is_wanted("ovs") && !wanted.is_empty() {
        contestants.retain(|contestant| !matches!(contestant.kind, party::Kind::Ovs(_)));
    }
    let parties: Vec<Party> = (1..).zip(&contestants).map(|(n, it)| Party::start(*it, n)).collect();
    for (name, measure) in cases::WITH_PARTIES {
        if is_wanted(name) {
            measure(&parties, &mut report);
        }
    }
    drop(parties);
    for (name, measure) in cases::ALONE {
        if is_wanted(name) {
            measure(&mut report);
        }
    }
    let directory = std::env::var_os(DIRECTORY).map_or("target/compare".into(), PathBuf::from);
    report.write(&directory);
    println!("\nfigures, table and picture: {}", directory.display());
}

/// Moves this thread into a quiet namespace, whose TCP is any Linux's: the machine's default may be BBR,
/// whose timers would run on the backend's processor.
fn enter_a_namespace() {
    enter_quiet_namespace();
    fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "cubic").unwrap();
}
