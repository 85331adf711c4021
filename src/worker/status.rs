//! State of a queue pair, which its worker writes and other threads read.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::counters::PairCounters;
use crate::port::Mode;
use crate::sys::eventfd::Waker;
use crate::sys::process::ThreadClock;

/// The state of one queue pair.
#[derive(Debug, Default)]
pub struct PairStatus {
    /// The queue pair's counters.
    pub counters: PairCounters,
    /// Start and CPU clock of the worker thread.
    thread: OnceLock<(Instant, ThreadClock)>,
    mode: AtomicU8,
    /// Waker for the case that the port's device stops working.
    on_device_loss: OnceLock<Arc<Waker>>,
    serving: AtomicBool,
    fault: Mutex<Option<String>>,
}

impl PairStatus {
    /// Creates a state whose counters continue from `counters`.
    pub fn with_counters(counters: PairCounters) -> Self {
        PairStatus { counters, ..PairStatus::default() }
    }

    /// Records that the worker thread has started; `clock` is its CPU clock.
    pub fn began(&self, clock: ThreadClock) {
        let _ = self.thread.set((Instant::now(), clock));
    }

    /// Returns the time that the thread has spent on a CPU and off it. Returns `None` before the thread has started
    /// and after it has ended.
    pub fn times(&self) -> Option<(Duration, Duration)> {
        let (since, clock) = self.thread.get()?;
        let busy = clock.elapsed()?;
        Some((busy, since.elapsed().saturating_sub(busy)))
    }

    /// Sets the waker to wake when the worker finds that the port's device does not work.
    pub fn wake_on_device_loss(&self, waker: Arc<Waker>) {
        let _ = self.on_device_loss.set(waker);
    }

    /// Records the worker's present way of moving frames.
    #[inline]
    pub fn set_mode(&self, mode: Mode) {
        let before = self.mode.load(Ordering::Relaxed);
        if before == mode as u8 {
            return;
        }
        self.mode.store(mode as u8, Ordering::Relaxed);
        if mode == Mode::Gone
            && let Some(waker) = self.on_device_loss.get()
        {
            waker.wake();
        }
    }

    /// Returns the worker's last way of moving frames.
    pub fn mode(&self) -> Mode {
        let number = self.mode.load(Ordering::Relaxed);
        Mode::ALL.into_iter().find(|mode| *mode as u8 == number).unwrap_or_default()
    }

    /// Records that the rings run, or that they do not.
    pub fn set_serving(&self, serving: bool) {
        self.serving.store(serving, Ordering::Relaxed);
    }

    /// Returns true if the rings run.
    pub fn is_serving(&self) -> bool {
        self.serving.load(Ordering::Relaxed)
    }

    /// Records the fault that has stopped the queue pair, or `None` when it resumes.
    pub fn set_fault(&self, fault: Option<String>) {
        // No thread panics while it holds the lock.
        *self.fault.lock().unwrap_or_else(PoisonError::into_inner) = fault;
    }

    /// Returns the fault that has stopped the queue pair, if any.
    pub fn fault(&self) -> Option<String> {
        self.fault.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
