//! How exactly limits are kept: iperf3 between the host and a real Linux guest on a TAP, each way,
//! by TCP with segmentation offload and by UDP. What it reports of payload is put in terms of the
//! wire, as limits are.

use std::time::{Duration, Instant};

use super::af_xdp::Load;
use super::measure::{GUEST, receive_frames, received, send_frames, sent};
use crate::support::daemon::Daemon;
use crate::support::network::{enter_new_namespace, ip};
use crate::support::testpmd::Testpmd;
use crate::support::vm::{GUEST_ADDRESS, HOST_ADDRESS, Vm, iperf_with, make_guest};

/// Payload bytes of each packet: TCP's with timestamps at an MTU of 1500.
const PAYLOAD: f64 = 1448.0;
/// Bytes of testpmd's frames.
const FRAME: usize = 1486;

pub(super) fn run() {
    make_guest();
    enter_new_namespace();
    ip("tuntap add dev tap0 mode tap vnet_hdr");
    ip("link set tap0 up");
    ip(&format!("address add {HOST_ADDRESS}/24 dev tap0"));
    ip("tuntap add dev tap1 mode tap vnet_hdr");
    ip("link set tap1 up");
    println!(
        "\n{:<24} {:>12} {:>9} {:>12} {:>9}",
        "limit, on the wire", "to host", "of limit", "to guest", "of limit"
    );
    for (limit, rate, unit) in
        [("10mbit", 10.0, "Mbit/s"), ("1gbit", 1000.0, "Mbit/s"), ("10kpps", 10.0, "kpps")]
    {
        let limits = ["tx", "rx"].map(|way| format!("--{way}-limit={limit}"));
        let daemon = Daemon::start(&["--tap=tap0", &limits[0], &limits[1]]);
        let mut guest = Vm::start(&daemon.socket(), &[]);
        guest.wait_ready();
        // Bytes around the payload: Ethernet, IPv4 and TCP or UDP.
        for (name, options, around) in [("TCP", "", 66.0), ("UDP", "-u -b 2g -l 1448", 42.0)] {
            print!("  {:<22}", format!("{limit}, {name}"));
            for way in ["-R", ""] {
                let payload = iperf_with(GUEST_ADDRESS, &format!("-t 6 -O 2 {options} {way}"));
                let passed = match unit {
                    "kpps" => payload * 1000.0 / 8.0 / PAYLOAD,
                    _ => payload * (PAYLOAD + around) / PAYLOAD,
                };
                print!(" {passed:>5.4} {unit:<6} {:>8.3}", passed / rate);
            }
            println!();
        }
    }
    // More UDP than a guest brings whose processor is emulated.
    let limits = ["--tx-limit=1gbit", "--rx-limit=1gbit"];
    let daemon = Daemon::start(&["--tap=tap1", limits[0], limits[1], "--cpu-affinity=1"]);
    let mut guest = Testpmd::start_on("0", &daemon.socket(), 1, 1024, GUEST);
    print!("  {:<22}", "1gbit, testpmd");
    send_frames(&mut guest, FRAME);
    show_rate(|| received("tap1"));
    receive_frames(&mut guest);
    let _sender = Load::flooding("tap1", FRAME);
    show_rate(|| sent("tap1"));
    println!();
}

/// Shows the rate at which `frames` counts frames.
fn show_rate(frames: impl Fn() -> u64) {
    const SETTLE: Duration = Duration::from_secs(1);
    const TIME: Duration = Duration::from_secs(4);
    std::thread::sleep(SETTLE);
    let (started, before) = (Instant::now(), frames());
    std::thread::sleep(TIME);
    let bits = (frames() - before) * FRAME as u64 * 8;
    let passed = bits as f64 / started.elapsed().as_secs_f64() / 1e6;
    print!(" {passed:>5.4} Mbit/s {:>8.3}", passed / 1000.0);
}
