//! Panics that tests request, in builds with debug assertions only.
//!
//! No guest or VMM can cause one: the daemon reads `VHOST_USER_NET_FAULT=PLACE:THREAD:NUMBER` from its environment,
//! once. `PLACE` names a call of [`panic_if`], and `THREAD` the thread that panics, once. The caller compares `NUMBER`
//! with a count of its own.

use std::env;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

const VARIABLE: &str = "VHOST_USER_NET_FAULT";

/// The panic that a test has requested.
struct Requested {
    place: String,
    thread: String,
    number: u64,
    done: AtomicBool,
}

fn parse(text: &str) -> Option<Requested> {
    let mut parts = text.split(':').map(str::to_owned);
    let (place, thread, number) = (parts.next()?, parts.next()?, parts.next()?.parse().ok()?);
    Some(Requested { place, thread, number, done: AtomicBool::new(false) })
}

/// Panics if the environment names `place` and the calling thread, and `now` returns true for its number.
pub(crate) fn panic_if(place: &str, now: impl FnOnce(u64) -> bool) {
    static REQUESTED: OnceLock<Option<Requested>> = OnceLock::new();
    let Some(requested) = REQUESTED.get_or_init(|| parse(&env::var(VARIABLE).ok()?)) else {
        return;
    };
    if requested.place == place
        && thread::current().name() == Some(&requested.thread)
        && now(requested.number)
        && !requested.done.swap(true, Ordering::Relaxed)
    {
        panic!("fault point {place}");
    }
}
