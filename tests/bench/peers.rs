//! This daemon beside its peers, in one run: what a frame costs each, what TCP and pings do with a
//! guest behind each, what each costs while nothing happens, and how that grows with ports.
//!
//! All have the same guests and the same senders, on processor 0; backends have processor 1, and
//! take turns: those that poll are stopped (SIGSTOP) between theirs.

mod cases;
mod counted;
mod kernel_guest;
mod machine;
mod own_guest;
mod party;
mod plain;
mod report;
mod vhost_net;

use std::fs;
use std::path::PathBuf;

use vhost_user_net::sys::process::pin_this_thread;

use crate::support::network::enter_quiet_namespace;
use party::{CONTESTANTS, COUNTED, Contestant, Party, missing};
use report::Report;

pub(crate) use plain::serve as serve_plain;
pub(crate) use vhost_net::serve as serve_vhost_net;

/// Which cases are measured, if not all.
const CASES: &str = "COMPARE_CASES";
/// Names of those that take part, separated by semicolons; all if there are none.
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
    let mut contestants = present(&CONTESTANTS, &mut report);
    if !is_wanted("ovs") && !wanted.is_empty() {
        contestants.retain(|contestant| !matches!(contestant.kind, party::Kind::Ovs(_)));
    }
    let parties = start(&contestants);
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

/// Whether an environment variable names this, or nothing.
fn is_named(variable: &str, name: &str) -> bool {
    let names = std::env::var(variable).unwrap_or_default();
    names.is_empty() || names.split(';').any(|it| it == name)
}

/// Those that can take part here, and are wanted.
fn present(contestants: &[Contestant], report: &mut Report) -> Vec<Contestant> {
    let mut contestants = contestants.to_vec();
    contestants.retain(|it| is_named(PARTIES, it.name));
    contestants.retain(|contestant| match missing(contestant) {
        Some(why) => {
            report.skip(contestant.name, why);
            false
        }
        None => true,
    });
    contestants
}

fn start(contestants: &[Contestant]) -> Vec<Party> {
    (1..).zip(contestants).map(|(number, it)| Party::start(*it, number)).collect()
}

/// What a frame costs the daemon, vhost-net and the plain backend in executed instructions, the kernel's
/// included: for a machine whose clock counts these, and which has one processor (`tests/bench/vhost-net`).
pub(super) fn count() {
    enter_a_namespace();
    let mut report = Report::counted();
    let parties = start(&present(&COUNTED, &mut report));
    counted::count(&parties, |case| is_named(CASES, case), &mut report);
    println!("\n{}{}", report.tables(), report.claims());
}

/// Moves this thread into a quiet namespace, whose TCP is any Linux's: the machine's default may be BBR,
/// whose timers would run on the backend's processor. A host may permit none but some to its namespaces.
fn enter_a_namespace() {
    enter_quiet_namespace();
    let control = "/proc/sys/net/ipv4/tcp_congestion_control";
    let _ = ["cubic", "reno"].into_iter().find(|name| fs::write(control, name).is_ok());
    println!("TCP's congestion control: {}", fs::read_to_string(control).unwrap().trim());
}
