//! What the sandbox costs the data path: the same traffic through a daemon with it, through another
//! with it, which shows what the measurement's noise is, and through one without the filter of
//! system calls, in turns.

use std::fs;

use vhost_user_net::sys::process::pin_this_thread;

use super::af_xdp::{lean_rx_cost, veth};
use super::measure::{
    Cost, GUEST, LENGTHS, cost, head, in_turns, receive_frames, received, row, send_frames, sent,
};
use super::tap::Sender;
use crate::support::daemon::Daemon;
use crate::support::network::enter_new_namespace;
use crate::support::testpmd::Testpmd;

/// A daemon on a device of its own.
struct Party {
    daemon: Daemon,
    device: String,
}

/// One daemon with the sandbox, another, and one that filters no system calls, each on one of
/// `devices`.
fn parties(option: &str, devices: [&str; 3]) -> [Party; 3] {
    let seccomp = ["kill", "kill", "none"];
    [0, 1, 2].map(|index| {
        let port = format!("--{option}={}", devices[index]);
        let seccomp = format!("--seccomp={}", seccomp[index]);
        let daemon = Daemon::start(&[&port, "--cpu-affinity=1", &seccomp]);
        Party { daemon, device: devices[index].into() }
    })
}

/// What each party spends on a frame, in turns, beside guests that stand still between theirs.
fn measure(
    title: &str,
    parties: &[Party; 3],
    ring_size: u16,
    prepare: impl Fn(&mut Testpmd),
    cost: impl Fn(&Party) -> Cost,
) {
    let guests = parties.each_ref().map(|party| {
        let mut guest = Testpmd::start_on("0", &party.daemon.socket(), 1, ring_size, GUEST);
        prepare(&mut guest);
        guest.pause();
        guest
    });
    let turn = |index: usize| {
        guests[index].resume();
        let cost = cost(&parties[index]);
        guests[index].pause();
        cost
    };
    rows(title, in_turns([&mut || turn(0), &mut || turn(1), &mut || turn(2)]));
}

fn rows(title: &str, [sandboxed, again, unfiltered]: [Vec<Cost>; 3]) {
    row(title, &sandboxed, None);
    row("  another with the sandbox", &again, Some(("the first", &sandboxed)));
    row("  with --seccomp=none", &unfiltered, Some(("the first", &sandboxed)));
}

pub(super) fn run() {
    enter_new_namespace();
    fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
    pin_this_thread(0).unwrap();
    ["first", "again", "none"].into_iter().for_each(veth);
    let taps = parties("tap", ["tap0", "tap1", "tap2"]);
    let veths = parties("af-xdp", ["first0", "again0", "none0"]);
    let wires = ["first1", "again1", "none1"];
    for length in LENGTHS {
        head(&format!("frames of {length} bytes"));
        measure(
            "tap, tx",
            &taps,
            256,
            |guest| send_frames(guest, length),
            |party| cost(|| received(&party.device), || party.daemon.cpu_nanoseconds()),
        );
        measure("tap, rx", &taps, 1024, receive_frames, |party| {
            let _sender = Sender::start(&party.device, length);
            cost(|| sent(&party.device), || party.daemon.cpu_nanoseconds())
        });
        measure(
            "af_xdp, tx",
            &veths,
            256,
            |guest| send_frames(guest, length),
            |party| cost(|| sent(&party.device), || party.daemon.cpu_nanoseconds()),
        );
        let rx = |index: usize| lean_rx_cost(&veths[index].daemon, wires[index], length);
        rows("af_xdp, rx", in_turns([&mut || rx(0), &mut || rx(1), &mut || rx(2)]));
    }
}
