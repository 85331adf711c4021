//! The packet filter of frames to the guest: a socket filter that the kernel runs before a frame reaches a queue of
//! the TAP.
//!
//! Invariant: each queue has the filter that was set last, whether the kernel steers frames to the queue or not.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::policy::Filter;
use crate::policy::filter::classic;
use crate::sys::tap::{ProgramMemory, Queue};

/// The filter of a TAP, for all its queues.
#[derive(Debug)]
pub struct TapFilter {
    queues: Vec<Arc<Queue>>,
    state: Mutex<State>,
    /// Number of times that another daemon may have changed the device's settings.
    generation: AtomicU64,
}

#[derive(Debug)]
struct State {
    filter: Filter,
    /// Memory of the program, since the first filter was set.
    memory: Option<ProgramMemory>,
}

impl TapFilter {
    /// Sets the first filter, and removes one that another process may have left. Frames that wait in the queues
    /// have passed no filter, so they are dropped unless the filter is `none`.
    ///
    /// # Errors
    /// The device refuses the filter. The error names the fix.
    pub fn new(queues: Vec<Arc<Queue>>, filter: &Filter) -> io::Result<Self> {
        let state = Mutex::new(State { filter: Filter::default(), memory: None });
        let tap = TapFilter { queues, state, generation: AtomicU64::new(0) };
        tap.queues[0].clear_filter()?;
        tap.set(filter)?;
        if !filter.is_none() {
            tap.queues.iter().for_each(|queue| queue.drain());
        }
        Ok(tap)
    }

    /// Creates the filter of a TAP that another daemon serves. The device stays unchanged until
    /// [`reassert`](Self::reassert).
    pub fn of_predecessor(queues: Vec<Arc<Queue>>, filter: &Filter) -> Self {
        let state = Mutex::new(State { filter: filter.clone(), memory: None });
        TapFilter { queues, state, generation: AtomicU64::new(0) }
    }

    /// Sets the filter again, and has each queue's next session set the device again: another daemon may have
    /// changed the settings.
    ///
    /// # Errors
    /// The device refuses the filter.
    pub fn reassert(&self) -> io::Result<()> {
        self.generation.fetch_add(1, Ordering::Release);
        let filter = self.get();
        if filter.is_none() { Ok(()) } else { self.set(&filter) }
    }

    /// A number that changes whenever another daemon may have changed the device's settings.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The filter in force.
    pub fn get(&self) -> Filter {
        self.lock().filter.clone()
    }

    /// Replaces the filter. Frames that wait in the queues have passed the previous filter already.
    ///
    /// The kernel sets a filter for attached queues only, so detached queues are attached meanwhile (the guest may
    /// use fewer queues than the TAP has). Frames that the kernel steers to these queues meanwhile are lost.
    ///
    /// # Errors
    /// The device refuses the filter. The previous filter stays in force.
    pub fn set(&self, filter: &Filter) -> io::Result<()> {
        let mut state = self.lock();
        let mut detached = Vec::new();
        for queue in &self.queues {
            if queue.identity().multi_queue && !queue.is_attached()? {
                detached.push(queue);
                queue.set_attached(true)?;
            }
        }
        let set = state.put(&self.queues[0], filter);
        for queue in detached {
            queue.set_attached(false)?;
        }
        set
    }

    /// Attaches or detaches one of the queues: the kernel steers frames to attached queues only.
    ///
    /// # Errors
    /// The device refuses.
    pub fn set_attached(&self, queue: &Queue, attached: bool) -> io::Result<()> {
        let _state = self.lock();
        queue.set_attached(attached)
    }
}

impl State {
    fn put(&mut self, queue: &Queue, filter: &Filter) -> io::Result<()> {
        if filter.is_none() {
            queue.clear_filter()?;
        } else if queue.identity().is_macvtap {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "cannot set rx-filter: a macvtap takes no filter; remove rx-filter, or use a TAP",
            ));
        } else {
            if self.memory.is_none() {
                self.memory = Some(ProgramMemory::new()?);
            }
            if let Some(memory) = &mut self.memory {
                memory.set(queue, &classic(filter)).map_err(|error| {
                    let hint = match error.raw_os_error() {
                        Some(libc::ENOMEM) => {
                            "; its program is larger than net.core.optmem_max: use fewer rules, or \
                             run 'sysctl -w net.core.optmem_max=131072'"
                        }
                        Some(libc::EINVAL) => "; this kernel may have no socket filters for a TAP",
                        _ => "",
                    };
                    io::Error::new(error.kind(), format!("cannot set rx-filter: {error}{hint}"))
                })?;
            }
        }
        self.filter = filter.clone();
        Ok(())
    }
}
