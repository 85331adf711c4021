//! How the two sides of a ring tell each other about their progress, without a lock and without
//! losing a wake-up.
//!
//! One side [shows](show) that it has moved on, and wakes the other if that wished for it. The
//! other, before it sleeps, [asks](ask) to be woken, and looks once more. Each stores its own field
//! and then reads the other's. Without a full fence in between, each could read the other's old
//! value (both stores still on their way), and a sleeper would never be woken (virtio 1.3, sections
//! 2.7.7.1 and 2.7.13.4.1; Linux virtqueue_enable_cb_prepare and virtio_mb). We are either side:
//! with the used ring the driver sleeps, with the avail ring we do.

use std::sync::atomic::{AtomicU16, Ordering, fence};

/// A 16-bit field of a ring that both sides see.
pub(super) trait Shared {
    fn load(&self, order: Ordering) -> u16;
    fn store(&self, value: u16, order: Ordering);
    /// Orders all stores before it with all loads after it.
    fn fence();
}

/// Shows the other side how far we are; returns what it wishes for.
#[inline]
pub(super) fn show<S: Shared>(progress: &S, value: u16, wish: &S) -> u16 {
    // Release: what it covers must be visible before the index that covers it.
    progress.store(value, Ordering::Release);
    S::fence();
    wish.load(Ordering::Relaxed)
}

/// Tells the other side what we wish for; returns how far it is by now.
#[inline]
pub(super) fn ask<S: Shared>(wish: &S, value: u16, progress: &S) -> u16 {
    wish.store(value, Ordering::Relaxed);
    S::fence();
    look(progress)
}

/// How far the other side is.
#[inline]
pub(super) fn look<S: Shared>(progress: &S) -> u16 {
    // Acquire pairs with the other side's barrier between filling ring entry and descriptors and
    // storing the index (virtio 1.3, section 2.7.13.3).
    progress.load(Ordering::Acquire)
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

/// Every order in which two processors may see each other's stores, by loom.
#[cfg(test)]
mod tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::sync::atomic as model;

    /// A field; without fences it is what must not be.
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

    /// One side moves on twice, the other takes what is there and sleeps when there is no more.
    fn sleeper_and_waker<const FENCED: bool>() {
        loom::model(|| {
            let field = |value| Field::<FENCED>(model::AtomicU16::new(value));
            let shared = Arc::new((field(0), field(QUIET), [0, 1].map(|_| UnsafeCell::new(0))));
            let its = shared.clone();
            let waker = loom::thread::spawn(move || {
                let (progress, wish, entries) = &*its;
                let mut woken = 0;
                for moved in 1..=2u16 {
                    // SAFETY: the sleeper reads an entry after the index that covers it.
                    entries[usize::from(moved) - 1].with_mut(|entry| unsafe { *entry = moved });
                    if show(progress, moved, wish) == WAKE {
                        woken = moved;
                    }
                }
                woken
            });
            let (progress, wish, entries) = &*shared;
            let mut seen = look(progress);
            // As a worker's turns: until nothing is new after it has asked.
            loop {
                for entry in &entries[..usize::from(seen)] {
                    // SAFETY: it is covered by the index, and not written again.
                    let entry = entry.with(|entry| unsafe { *entry });
                    assert_ne!(entry, 0, "read before it was there");
                }
                let now = ask(wish, WAKE, progress);
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
    fn no_wake_up_is_lost_in_any_order() {
        sleeper_and_waker::<true>();
    }

    #[test]
    #[should_panic(expected = "never woken")]
    fn without_the_fence_one_is() {
        sleeper_and_waker::<false>();
    }
}
