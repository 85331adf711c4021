//! What a flooding guest costs its neighbours: how long their frames take to come back, in one
//! daemon with many ports, with the flood and without it, in turns.
//!
//! All workers share processor 1, and all guests processor 0: what is compared is how soon a worker
//! that sleeps gets its turn beside one that never does. The quiet guests' driver sleeps until it is
//! called, as a guest does.

use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use epoll::{ControlOptions, Event, Events};
use vhost_user_net::sys::process::pin_this_thread;

use crate::support::daemon::{Daemon, port};
use crate::support::driver::{Card, HEADER, Options};
use crate::support::frontend::Frontend;
use crate::support::hostile::Refilling;

const QUIET: usize = 31;
/// Turns of each kind.
const ROUNDS: usize = 5;
/// Frames of each quiet guest in a turn.
const ECHOES: usize = 100;
/// Between two frames: the next guest's worker is asleep.
const PAUSE: Duration = Duration::from_micros(200);

/// Sends a frame and sleeps until it is back; `calls` waits for the calls of all.
fn echo(card: &mut Card, calls: RawFd) -> Duration {
    let head = card.queue_tx(0, 0, &[0; HEADER], &[1; 60]);
    card.rx[0].want_call();
    card.tx[0].want_no_call();
    let sent = Instant::now();
    card.tx[0].publish();
    let frame = loop {
        if let Some(frame) = card.try_receive(0) {
            break frame;
        }
        let mut called = [Event::new(Events::empty(), 0)];
        assert!(epoll::wait(calls, 10_000, &mut called).unwrap() > 0, "a frame is lost");
    };
    let time = sent.elapsed();
    assert_eq!(frame.len(), HEADER + 60);
    assert_eq!(card.tx[0].wait_used().0, head);
    time
}

fn turn(cards: &mut [Card], calls: RawFd, times: &mut Vec<Duration>) {
    for _ in 0..ECHOES {
        for card in &mut *cards {
            std::thread::sleep(PAUSE);
            times.push(echo(card, calls));
        }
    }
}

pub(super) fn run() {
    pin_this_thread(0).unwrap();
    let port = |name: &str| port(name, "loopback = true");
    let names: Vec<String> = (0..QUIET).map(|number| format!("quiet{number}")).collect();
    let contents: String = names.iter().map(|name| port(name)).collect();
    let daemon = Daemon::with_config(
        &format!("[defaults]\ncpu-affinity = \"1\"\n{contents}{}", port("flood")),
        "flood",
    );
    let card = |name: &str| Card::start(Frontend::new(daemon.connect_to(name)), Options::default());
    let mut quiet: Vec<Card> = names.iter().map(|name| card(name)).collect();
    let calls = epoll::create(true).unwrap();
    for card in &quiet {
        let event = Event::new(Events::EPOLLIN | Events::EPOLLET, 0);
        epoll::ctl(calls, ControlOptions::EPOLL_CTL_ADD, card.rx[0].call.as_raw_fd(), event)
            .unwrap();
    }
    let mut flooding = Some(card("flood"));
    let mut times = [Vec::new(), Vec::new()];
    let mut flooded = 0.0;
    for _ in 0..ROUNDS {
        turn(&mut quiet, calls, &mut times[0]);
        let flood = Refilling::start(flooding.take().unwrap());
        let (started, cpu) = (Instant::now(), daemon.cpu_nanoseconds());
        turn(&mut quiet, calls, &mut times[1]);
        flooded += (daemon.cpu_nanoseconds() - cpu) as f64 / started.elapsed().as_nanos() as f64;
        flooding = Some(flood.stop());
    }
    println!(
        "\n{QUIET} quiet ports and one that may flood, microseconds {:>6} {:>8} {:>8}",
        "p50", "p99", "max"
    );
    for (name, mut times) in ["without flood", "with flood"].into_iter().zip(times) {
        times.sort_unstable();
        let [half, most, all] = [50, 99, 100]
            .map(|part| times[(times.len() * part / 100).min(times.len() - 1)].as_secs_f64() * 1e6);
        println!("  {name:<48} {half:>8.0} {most:>8.0} {all:>8.0}");
    }
    println!("  the daemon takes {:.2} processors in the flood", flooded / ROUNDS as f64);
}
