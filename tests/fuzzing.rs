//! The fuzzer's entries, run on its corpus and on seeded variations of it, with a stable compiler and without
//! a sanitizer.

#[allow(unreachable_pub)]
#[path = "fuzz/entries.rs"]
mod entries;

use std::fs;
use std::path::Path;

/// Number of variations of each input.
const VARIATIONS: usize = 8;

/// A pseudo-random sequence from a fixed seed (xorshift).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % limit.max(1)
    }
}

/// Calls `entry` with every input of its corpus, and with variations of each.
fn replay(target: &str, entry: fn(&[u8])) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let mut files: Vec<_> =
        fs::read_dir(&directory).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort_unstable();
    assert!(files.len() > 5, "{} is nearly empty", directory.display());
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for file in &files {
        let input = fs::read(file).unwrap();
        println!("{}", file.display());
        entry(&input);
        for _ in 0..VARIATIONS {
            let mut varied = input.clone();
            for _ in 0..1 + numbers.below(4) {
                let place = numbers.below(varied.len());
                match numbers.below(4) {
                    0 if !varied.is_empty() => varied[place] = numbers.below(256) as u8,
                    1 if !varied.is_empty() => varied[place] ^= 1 << numbers.below(8),
                    2 => varied.truncate(place),
                    _ => varied.insert(place, numbers.below(256) as u8),
                }
            }
            entry(&varied);
        }
    }
}

#[test]
fn arbitrary_frames_and_limits_are_checked() {
    replay("policy", entries::policy);
}

#[test]
fn arbitrary_messages_cause_no_panic() {
    replay("messages", entries::messages);
}

#[test]
fn arbitrary_rings_yield_only_guest_memory() {
    replay("rings", entries::rings);
}

#[test]
fn changing_rings_yield_only_guest_memory() {
    replay("race", entries::race);
}

#[test]
fn arbitrary_headers_are_validated() {
    replay("headers", entries::headers);
}

#[test]
fn filters_agree_with_a_receiver() {
    replay("filters", entries::filters);
}

#[test]
fn arbitrary_requests_round_trip() {
    replay("requests", entries::requests);
}

#[test]
fn arbitrary_device_states_lower_no_counter() {
    replay("states", entries::states);
}
