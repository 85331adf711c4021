//! Panics that tests ask for, in builds with debug assertions only. No tenant can cause one: the daemon
//! reads `VHOST_USER_NET_FAULT=PLACE:THREAD:NUMBER` from its environment, once. `PLACE` is a call of
//! [`panic_if`], `THREAD` the name of the thread that is to panic, once, and `NUMBER` says when.

use std::env;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

const VARIABLE: &str = "VHOST_USER_NET_FAULT";

struct Wanted {
    place: String,
    thread: String,
    number: u64,
    done: AtomicBool,
}

fn parse(text: &str) -> Option<Wanted> {
    let mut parts = text.split(':').map(str::to_owned);
    let (place, thread, number) = (parts.next()?, parts.next()?, parts.next()?.parse().ok()?);
    Some(Wanted { place, thread, number, done: AtomicBool::new(false) })
}

/// Panics if the environment asks for that, at this place and in this thread, and `now` holds for the
/// number that it has.
pub(crate) fn panic_if(place: &str, now: impl FnOnce(u64) -> bool) {
    static WANTED: OnceLock<Option<Wanted>> = OnceLock::new();
    let Some(wanted) = WANTED.get_or_init(|| parse(&env::var(VARIABLE).ok()?)) else { return };
    if wanted.place == place
        && thread::current().name() == Some(&wanted.thread)
        && now(wanted.number)
        && !wanted.done.swap(true, Ordering::Relaxed)
    {
        panic!("fault point {place}");
    }
}
