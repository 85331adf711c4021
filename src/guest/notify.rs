//! The lock-free exchange of indexes and notification requests between the two sides of a ring.
//!
//! Invariant: no wake-up is lost. One side [publishes](publish_index) its index, and wakes the other side if
//! that requested it. The other side, before it sleeps, [requests](request_notify) a notification and reads
//! the index once more. Each side stores its own field, and then reads the other's. Without a full fence in
//! between, each could read the other's old value, because both stores are still in a store buffer; then the
//! sleeping side would never be woken (virtio 1.3, sections 2.7.7.1 and 2.7.13.4.1; Linux
//! virtqueue_enable_cb_prepare and virtio_mb). With the used ring the driver sleeps; with the available ring
//! this daemon does.

use std::sync::atomic::{AtomicU16, Ordering, fence};

/// A 16-bit field of a ring, shared with the other side.
pub(super) trait Shared {
    fn load(&self, order: Ordering) -> u16;
    fn store(&self, value: u16, order: Ordering);
    /// Orders all earlier stores before all later loads.
    fn fence();
}

/// Stores our `index`; returns the other side's notification setting `event`.
#[inline]
pub(super) fn publish_index<S: Shared>(index: &S, value: u16, event: &S) -> u16 {
    // Release: the ring entries must be visible before the index that covers them.
    index.store(value, Ordering::Release);
    S::fence();
    event.load(Ordering::Relaxed)
}

/// Stores our notification setting `event`; returns the other side's `index`.
#[inline]
pub(super) fn request_notify<S: Shared>(event: &S, value: u16, index: &S) -> u16 {
    event.store(value, Ordering::Relaxed);
    S::fence();
    load_index(index)
}

/// Returns the other side's `index`.
#[inline]
pub(super) fn load_index<S: Shared>(index: &S) -> u16 {
    // Acquire pairs with the other side's barrier between its writes of descriptors and ring entry and its
    // store of the index (virtio 1.3, section 2.7.13.3).
    index.load(Ordering::Acquire)
}

/// A little-endian field in guest memory.
pub(super) struct LittleEndian<'a>(pub(super) &'a AtomicU16);

impl Shared for LittleEndian<'_> {
    #[inline]
    fn load(&self, order: Ordering) -> u16 {
        u16::from_le(self.0.load(order))
    }

    #[inline]
    fn store(&self, value: u16, order: Ordering) {
        self.0.store(value.to_le(), order);
    }

    #[inline]
    fn fence() {
        fence(Ordering::SeqCst);
    }
}

/// Model checks, by loom, of all orders in which two CPUs may see each other's stores.
#[cfg(test)]
mod tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::sync::atomic as model;

    /// A modelled field, with the fence or without it.
    struct Field<const FENCED: bool>(model::AtomicU16);

    impl<const FENCED: bool> Shared for Field<FENCED> {
        fn load(&self, order: Ordering) -> u16 {
            self.0.load(order)
        }

        fn store(&self, value: u16, order: Ordering) {
            self.0.store(value, order);
        }

        fn fence() {
            if FENCED {
                model::fence(Ordering::SeqCst);
            }
        }
    }

    const QUIET: u16 = 0;
    const WAKE: u16 = 1;

    /// Runs a waker that publishes two entries, and a sleeper that reads entries and sleeps when none is left.
    fn sleeper_and_waker<const FENCED: bool>() {
        loom::model(|| {
            let field = |value| Field::<FENCED>(model::AtomicU16::new(value));
            let shared = Arc::new((field(0), field(QUIET), [0, 1].map(|_| UnsafeCell::new(0))));
            let its = shared.clone();
            let waker = loom::thread::spawn(move || {
                let (index, event, entries) = &*its;
                let mut woken = 0;
                for moved in 1..=2u16 {
                    // SAFETY: the sleeper reads an entry after the index that covers it.
                    entries[usize::from(moved) - 1].with_mut(|entry| unsafe { *entry = moved });
                    if publish_index(index, moved, event) == WAKE {
                        woken = moved;
                    }
                }
                woken
            });
            let (index, event, entries) = &*shared;
            let mut seen = load_index(index);
            // As a worker does: sleep only if the index has not moved after the request.
            loop {
                for entry in &entries[..usize::from(seen)] {
                    // SAFETY: the index covers the entry, and the waker does not write it again.
                    let entry = entry.with(|entry| unsafe { *entry });
                    assert_ne!(entry, 0, "read before it was there");
                }
                let now = request_notify(event, WAKE, index);
                if now == seen {
                    break;
                }
                seen = now;
            }
            let woken = waker.join().unwrap();
            assert!(seen == 2 || woken > seen, "asleep at {seen} of 2, and never woken");
        });
    }

    #[test]
    fn no_store_order_loses_a_wake_up() {
        sleeper_and_waker::<true>();
    }

    #[test]
    #[should_panic(expected = "never woken")]
    fn missing_fence_loses_a_wake_up() {
        sleeper_and_waker::<false>();
    }
}
