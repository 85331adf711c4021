//! What the kernel asks about frames for the guest, before they reach any of a TAP's queues.
//!
//! Invariant: each queue has the filter that was set last, whether frames are steered to it or not.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::policy::Filter;
use crate::policy::filter::classic;
use crate::sys::tap::{ProgramMemory, Queue};

/// The filter of a TAP, for all of its queues.
#[derive(Debug)]
pub struct TapFilter {
    queues: Vec<Arc<Queue>>,
    state: Mutex<State>,
    /// Counts how often another daemon may have set the device.
    generation: AtomicU64,
}

#[derive(Debug)]
struct State {
    filter: Filter,
    /// Where the program is, once there was one.
    memory: Option<ProgramMemory>,
}

impl TapFilter {
    /// Sets the first filter, in the stead of one that somebody may have left behind. Frames that
    /// wait were judged by nobody: they are dropped, if there is a filter now.
    ///
    /// # Errors
    /// Those of the device, which names what can be done.
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

    /// The filter of a TAP that another daemon serves. The device is not touched before
    /// [`reassert`](Self::reassert).
    pub fn of_predecessor(queues: Vec<Arc<Queue>>, filter: &Filter) -> Self {
        let state = Mutex::new(State { filter: filter.clone(), memory: None });
        TapFilter { queues, state, generation: AtomicU64::new(0) }
    }

    /// Sets the filter again, and has every queue set its device again when its next session begins:
    /// another daemon may have set them.
    ///
    /// # Errors
    /// Those of the device.
    pub fn reassert(&self) -> io::Result<()> {
        self.generation.fetch_add(1, Ordering::Release);
        let filter = self.get();
        if filter.is_none() { Ok(()) } else { self.set(&filter) }
    }

    /// Changes whenever another daemon may have set the device.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The filter that is in force.
    pub fn get(&self) -> Filter {
        self.lock().filter.clone()
    }

    /// Has the kernel judge frames by this filter from now on; those that wait in the queues were
    /// judged already. Queues that no frames are steered to (a guest that uses fewer than there are)
    /// get some for a moment, which are lost.
    ///
    /// # Errors
    /// Those of the device; it judges as before then.
    pub fn set(&self, filter: &Filter) -> io::Result<()> {
        let mut state = self.lock();
        let mut left_out = Vec::new();
        for queue in &self.queues {
            if queue.identity().multi_queue && !queue.is_attached()? {
                left_out.push(queue);
                queue.set_attached(true)?;
            }
        }
        let set = state.put(&self.queues[0], filter);
        for queue in left_out {
            queue.set_attached(false)?;
        }
        set
    }

    /// Has the kernel steer frames to one of the queues, or not.
    ///
    /// # Errors
    /// Those of the device.
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
                            "; it has too many rules for net.core.optmem_max: use fewer, or \
                             'sysctl -w net.core.optmem_max=131072'"
                        }
                        Some(libc::EINVAL) => "; does this kernel have filters for a TAP?",
                        _ => "",
                    };
                    io::Error::new(error.kind(), format!("set its filter: {error}{hint}"))
                })?;
            }
        }
        self.filter = filter.clone();
        Ok(())
    }
}
