//! What options cost the data path: the same traffic through daemons that differ by these, in turns.

use vhost_user_net::policy::filter::extended;
use vhost_user_net::sys::bpf::Program;
use vhost_user_net::sys::bpf::instructions::{add, copy, exit};
use vhost_user_net::sys::process::pin_this_thread;

use super::af_xdp::Load;
use super::af_xdp::{lean_rx_cost, veth};
use super::measure::{
    Cost, GUEST, LENGTHS, cost, frame, head, in_turns, receive_frames, received, row, send_frames,
    sent,
};
use crate::support::daemon::Daemon;
use crate::support::network::enter_quiet_namespace;
use crate::support::testpmd::Testpmd;

/// What is compared with the first: what it is called, and its options.
type Variant<'a> = (&'a str, &'a [&'a str]);

/// A daemon on a device of its own.
struct Party<'a> {
    name: &'a str,
    daemon: Daemon,
    device: String,
}

/// A daemon for each variant, on a device that is called after `device`.
fn parties<'a>(option: &str, device: &str, variants: &[Variant<'a>; 3]) -> [Party<'a>; 3] {
    [0, 1, 2].map(|index| {
        let (name, options) = variants[index];
        let device = format!("{device}{index}");
        if option == "af-xdp" {
            veth(&device);
        }
        // A veth has two ends.
        let device = if option == "af-xdp" { format!("{device}0") } else { device };
        let port = format!("--{option}={device}");
        let options: Vec<&str> =
            [&port, "--cpu-affinity=1"].into_iter().chain(options.iter().copied()).collect();
        Party { name, daemon: Daemon::start(&options), device }
    })
}

/// What each party spends on a frame, in turns, beside guests that stand still between theirs.
fn measure(
    title: &str,
    parties: &[Party<'_>; 3],
    ring_size: u16,
    prepare: impl Fn(&mut Testpmd),
    cost: impl Fn(&Party<'_>) -> Cost,
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
    rows(title, parties, in_turns([&mut || turn(0), &mut || turn(1), &mut || turn(2)]));
}

fn rows(title: &str, parties: &[Party<'_>; 3], costs: [Vec<Cost>; 3]) {
    row(title, &costs[0], None);
    for (party, cost) in parties.iter().zip(&costs).skip(1) {
        row(&format!("  {}", party.name), cost, Some(("the first", &costs[0])));
    }
}

/// With the sandbox, with it in another daemon, which shows the measurement's noise, and without
/// the filter of system calls.
pub(super) fn sandbox() {
    run(&[
        ("", &["--seccomp=kill"]),
        ("another with the sandbox", &["--seccomp=kill"]),
        ("with --seccomp=none", &["--seccomp=none"]),
    ]);
}

/// With nothing to comply with, with rules for the guest's addresses, and with limits that are
/// never reached.
pub(super) fn policy() {
    run(&[
        ("", &[]),
        (
            "with --anti-spoofing=on",
            &["--anti-spoofing=on", "--mac=52:54:00:77:00:02", "--source-ip=198.18.0.0/15"],
        ),
        ("with limits", &["--tx-limit=90gbit,100mpps", "--rx-limit=90gbit,100mpps"]),
    ]);
}

/// With filters, each way.
pub(super) fn filter() {
    let [tx, rx] = ["tx", "rx"].map(|way| format!("--{way}-filter={FILTER}"));
    run(&[
        ("", &[]),
        ("with a --tx-filter of ten rules", &[&tx]),
        ("with an --rx-filter of ten rules", &[&rx]),
    ]);
    // The kernel runs it where frames come from, in whoever's time: not in the daemon's.
    head("the rules in the XDP program, alone");
    for (name, text) in [("ten rules", FILTER), ("none", "default allow")] {
        let mut program = vec![copy(9, 1)];
        program.extend(extended(&text.parse().unwrap()));
        // XDP_PASS is 2.
        program.extend([add(0, 1), exit()]);
        let program = Program::load("bench", &program).unwrap();
        let time = program.time(&frame(64), 1_000_000).unwrap();
        println!("  {name:<34} {:8}", time.as_nanos());
    }
}

/// Ten rules, of which testpmd's frames match the ninth.
const FILTER: &str = "deny tcp dport 25; deny tcp dport 465; deny udp dport 53 from 192.0.2.0/24; \
                      deny icmp from 203.0.113.0/24; deny udp sport 67; deny sctp; \
                      deny to 10.0.0.0/8; deny to 172.16.0.0/12; \
                      allow udp dport 9 to 198.18.0.0/15; deny udp; default allow";

fn run(variants: &[Variant<'_>; 3]) {
    enter_quiet_namespace();
    pin_this_thread(0).unwrap();
    let taps = parties("tap", "tap", variants);
    let veths = parties("af-xdp", "veth", variants);
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
            let _sender = Load::flooding(&party.device, length);
            cost(|| sent(&party.device), || party.daemon.cpu_nanoseconds())
        });
        measure(
            "af_xdp, tx",
            &veths,
            256,
            |guest| send_frames(guest, length),
            |party| cost(|| sent(&party.device), || party.daemon.cpu_nanoseconds()),
        );
        let rx =
            |index: usize| lean_rx_cost(&veths[index].daemon, &format!("veth{index}1"), length);
        rows("af_xdp, rx", &veths, in_turns([&mut || rx(0), &mut || rx(1), &mut || rx(2)]));
    }
}
