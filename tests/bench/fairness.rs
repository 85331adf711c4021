//! What a flooding guest costs its neighbours: how long their frames take to come back, in one
//! daemon with many ports, with the flood and without it, in turns.

use std::time::{Duration, Instant};

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

fn echo(card: &mut Card) -> Duration {
    let head = card.queue_tx(0, 0, &[0; HEADER], &[1; 60]);
    let sent = Instant::now();
    card.tx[0].publish();
    let frame = loop {
        if let Some(frame) = card.try_receive(0) {
            break frame;
        }
        assert!(sent.elapsed().as_secs() < 10, "a quiet guest's frame is lost");
        std::hint::spin_loop();
    };
    let time = sent.elapsed();
    assert_eq!(frame.len(), HEADER + 60);
    assert_eq!(card.tx[0].wait_used().0, head);
    time
}

fn turn(cards: &mut [Card], times: &mut Vec<Duration>) {
    for _ in 0..ECHOES {
        for card in &mut *cards {
            std::thread::sleep(PAUSE);
            times.push(echo(card));
        }
    }
}

pub(super) fn run() {
    let port = |name: &str| port(name, "loopback = true");
    let names: Vec<String> = (0..QUIET).map(|number| format!("quiet{number}")).collect();
    let contents: String = names.iter().map(|name| port(name)).collect();
    let daemon = Daemon::with_config(&(contents + &port("flood")), "flood");
    let card = |name: &str| Card::start(Frontend::new(daemon.connect_to(name)), Options::default());
    let mut quiet: Vec<Card> = names.iter().map(|name| card(name)).collect();
    let mut flooding = Some(card("flood"));
    let mut times = [Vec::new(), Vec::new()];
    let mut flooded = 0.0;
    for _ in 0..ROUNDS {
        turn(&mut quiet, &mut times[0]);
        let flood = Refilling::start(flooding.take().unwrap());
        let (started, cpu) = (Instant::now(), daemon.cpu_nanoseconds());
        turn(&mut quiet, &mut times[1]);
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
