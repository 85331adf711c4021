//! The AF_XDP port: frames between a driver of ours and the far end of a veth, each test in a
//! network namespace of its own.

use crate::support::daemon::Daemon;
use crate::support::driver::{Card, EVENT_IDX, INDIRECT, Options, PROTOCOL, VERSION_1};
use crate::support::frontend::Frontend;
use crate::support::network::{Wire, enter_new_namespace, ip};
use crate::support::traffic::{check_both_ways, frame};
use crate::support::{eventually, needs_root};

/// A veth in a fresh namespace: one end for the daemon, the other for the test.
fn veth(queues: u32) {
    enter_new_namespace();
    std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
    let many = format!("numrxqueues {queues} numtxqueues {queues}");
    ip(&format!("link add veth0 {many} type veth peer name veth1 {many}"));
    ip("link set veth0 up");
    ip("link set veth1 up");
}

fn start(options: &[&str], card: Options) -> (Daemon, Wire, Card) {
    veth(card.pairs);
    let queues = format!("--queue-pairs={}", card.pairs);
    let mut all = vec!["--af-xdp=veth0", queues.as_str()];
    all.extend(options);
    let daemon = Daemon::start(&all);
    let card = Card::start(Frontend::new(daemon.connect()), card);
    (daemon, Wire::open("veth1"), card)
}

#[test]
fn frames_go_both_ways_unchanged_and_in_order() {
    needs_root!("frames_go_both_ways_unchanged_and_in_order");
    for features in [Options::default().features, VERSION_1 | PROTOCOL] {
        for size in [64, 1024] {
            let options = Options { features, size, ..Options::default() };
            let (daemon, wire, mut card) = start(&[], options);
            check_both_ways(&wire, &mut card, 2000);
            drop(card);
            eventually("it is counted", || daemon.log().contains("tx 2000 frames"));
            println!("{}", daemon.log());
        }
    }
}
