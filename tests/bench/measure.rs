//! What a frame costs, measured in turns: the machine's speed changes from minute to minute, so
//! each figure is compared with its peer's of the same round.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vhost_user_net::sys::process::pin_this_thread;

use crate::af_xdp::Load;
use crate::support::testpmd::Testpmd;

/// How long a turn is measured.
pub(super) const TURN: Duration = Duration::from_millis(300);
/// How long it runs before.
const SETTLE: Duration = Duration::from_millis(100);
/// Turns of each measurement; the median counts.
pub(super) const ROUNDS: usize = 15;
/// Frames that a bare loop handles at a time.
pub(super) const BATCH: usize = 32;
/// Lengths of frames in bytes.
pub(super) const LENGTHS: [usize; 2] = [64, 1500 - 14];
/// What testpmd's card is like.
pub(super) const GUEST: &str = "mrg_rxbuf=1,in_order=0,packed_vq=0";

/// Nanoseconds per frame, and frames per second.
#[derive(Clone, Copy)]
pub(super) struct Cost {
    ns: f64,
    rate: f64,
}

impl Cost {
    /// Nanoseconds for each of what was counted.
    pub(super) fn ns(&self) -> f64 {
        self.ns
    }

    /// How many were counted in a second.
    pub(super) fn rate(&self) -> f64 {
        self.rate
    }
}

pub(super) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Where what is measured runs: processor 1, if there are two.
pub(super) fn backend_processor() -> usize {
    usize::from(Path::new("/sys/devices/system/cpu/cpu1").exists())
}

/// On-CPU nanoseconds of the calling thread.
fn own_time() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    text.split(' ').next().unwrap().parse().unwrap()
}

/// Runs `step`, which returns the frames it moved, for a turn on processor 1.
pub(super) fn bare(mut step: impl FnMut() -> u64) -> Cost {
    pin_this_thread(backend_processor()).unwrap();
    let (started, before, mut frames) = (Instant::now(), own_time(), 0);
    while started.elapsed() < TURN {
        for _ in 0..8 {
            frames += step();
        }
    }
    let cost = Cost {
        ns: (own_time() - before) as f64 / frames as f64,
        rate: frames as f64 / started.elapsed().as_secs_f64(),
    };
    pin_this_thread(0).unwrap();
    cost
}

/// Frames that the other processor writes anew before each is sent, as a guest does: a loop that sends frames
/// which its own caches have for good is no limit for a backend.
pub(super) struct Fresh {
    counts: Arc<Counts>,
    /// Those that the loop has been given.
    taken: u64,
    _writer: Load,
}

#[derive(Default)]
struct Counts {
    written: AtomicU64,
    sent: AtomicU64,
}

impl Fresh {
    /// Has `write` write the n-th frame, at most `ahead` of them before they are sent.
    pub(super) fn written_by(ahead: u64, write: impl Fn(u64) + Send + 'static) -> Self {
        let counts = Arc::<Counts>::default();
        let (its, mut writer) = (counts.clone(), Load::default());
        writer.run(move || {
            let number = its.written.load(Ordering::Relaxed);
            if number - its.sent.load(Ordering::Acquire) < ahead {
                write(number);
                its.written.store(number + 1, Ordering::Release);
            }
        });
        Fresh { counts, taken: 0, _writer: writer }
    }

    /// Waits for the next so many. Those before have been sent.
    pub(super) fn take(&mut self, count: u64) {
        self.counts.sent.store(self.taken, Ordering::Release);
        self.taken += count;
        while self.counts.written.load(Ordering::Acquire) < self.taken {
            std::hint::spin_loop();
        }
    }
}

/// What a backend spends, by `cpu`, on each frame that `frames` counts while traffic runs.
pub(super) fn cost(mut frames: impl FnMut() -> u64, cpu: impl Fn() -> u64) -> Cost {
    std::thread::sleep(SETTLE);
    let (started, before, first) = (Instant::now(), cpu(), frames());
    std::thread::sleep(TURN);
    let used = cpu() - before;
    let moved = (frames() - first) as f64;
    Cost { ns: used as f64 / moved, rate: moved / started.elapsed().as_secs_f64() }
}

/// Takes all measurements, in turns.
pub(super) fn in_turns<const N: usize>(
    measurements: [&mut dyn FnMut() -> Cost; N],
) -> [Vec<Cost>; N] {
    let boxed = measurements.map(|measure| Box::new(measure) as Box<dyn FnMut() -> Cost + '_>);
    let costs = all_in_turns(ROUNDS, boxed.into());
    costs.try_into().unwrap_or_else(|_| unreachable!("each measurement has its costs"))
}

/// The same of any number of measurements, so many times.
pub(super) fn all_in_turns(
    rounds: usize,
    mut measurements: Vec<Box<dyn FnMut() -> Cost + '_>>,
) -> Vec<Vec<Cost>> {
    let mut costs = vec![Vec::new(); measurements.len()];
    for _ in 0..rounds {
        for (costs, measure) in costs.iter_mut().zip(&mut measurements) {
            costs.push(measure());
        }
    }
    costs
}

pub(super) fn head(title: &str) {
    println!("\n{title:<36} {:>8} {:>10}", "ns", "Mpps");
}

/// Prints the medians, and those of the ratio to and the distance from a peer in the same round.
pub(super) fn row(name: &str, costs: &[Cost], peer: Option<(&str, &[Cost])>) {
    let median_of = |value: fn(&Cost) -> f64| median(costs.iter().map(value).collect());
    print!(
        "  {name:<34} {:8.0} {:10.3}",
        median_of(|cost| cost.ns),
        median_of(|cost| cost.rate) / 1e6
    );
    if let Some((peer, others)) = peer {
        let pairs = || costs.iter().zip(others);
        let mut ratios: Vec<f64> = pairs().map(|(cost, other)| cost.ns / other.ns).collect();
        ratios.sort_by(f64::total_cmp);
        let [low, ratio, high] = [1, 2, 3].map(|quarter| ratios[ratios.len() * quarter / 4]);
        let distance = median(pairs().map(|(cost, other)| cost.ns - other.ns).collect());
        print!("   {ratio:.2} ({low:.2} to {high:.2}) of {peer}, {distance:+.0}");
    }
    println!();
}

/// An IPv4/UDP frame like testpmd's, for nobody on this host.
pub(super) fn frame(length: usize) -> Vec<u8> {
    let mut frame = vec![0; length];
    frame[..14].copy_from_slice(&[2, 0, 0, 0, 0, 0, 0x52, 0x54, 0, 0x77, 0, 2, 8, 0]);
    frame[14] = 0x45;
    frame[16..18].copy_from_slice(&((length - 14) as u16).to_be_bytes());
    frame[22..24].copy_from_slice(&[64, 17]);
    frame[26..34].copy_from_slice(&[198, 18, 0, 1, 198, 18, 0, 2]);
    frame[34..40].copy_from_slice(&[0, 9, 0, 9, 0, (length - 34).min(255) as u8]);
    frame
}

/// Frames that the device has received and sent, as the kernel counts them.
fn moved(device: &str) -> [u64; 2] {
    let text = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let device = format!("{device}:");
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix(&device)).unwrap();
    let numbers: Vec<u64> = line.split_whitespace().map(|word| word.parse().unwrap()).collect();
    [numbers[1], numbers[9]]
}

pub(super) fn received(device: &str) -> u64 {
    moved(device)[0]
}

pub(super) fn sent(device: &str) -> u64 {
    moved(device)[1]
}

/// Has the guest send frames for ever.
pub(super) fn send_frames(guest: &mut Testpmd, length: usize) {
    guest.command("stop");
    guest.command("set fwd txonly");
    guest.command(&format!("set txpkts {length}"));
    guest.command("start");
}

/// Has it receive them.
pub(super) fn receive_frames(guest: &mut Testpmd) {
    guest.command("stop");
    guest.command("set fwd rxonly");
    guest.command("start");
}
