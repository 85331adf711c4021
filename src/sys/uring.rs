//! One system call for a burst of writes: io_uring, used as a vector of `writev`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use io_uring::{IoUring, opcode, squeue, types};

use crate::guest::Segment;

/// Writes of one burst at the most.
pub const MAX_WRITES: usize = 64;

/// An io_uring instance for writes to one descriptor.
///
/// The descriptor is not registered with it: the kernel lets go of registered files some time after
/// the process has ended, and until then a TAP device would be busy for the next one.
pub struct Writer {
    ring: IoUring,
    target: RawFd,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Writer")
    }
}

impl Writer {
    /// Makes an instance for `target`, which must stay open as long as it is used.
    ///
    /// # Errors
    /// EPERM or ENOSYS where io_uring is not permitted or not there.
    pub fn new(target: impl AsFd) -> io::Result<Self> {
        let ring = IoUring::builder().setup_coop_taskrun().build(MAX_WRITES as u32)?;
        Ok(Writer { ring, target: target.as_fd().as_raw_fd() })
    }

    /// Writes each of `frames` in order and puts the outcome of the n-th into `results[n]`:
    /// bytes written, or an error number made negative.
    ///
    /// A TAP's write never waits, so every write has completed when this returns.
    ///
    /// # Errors
    /// Those of `io_uring_enter`. The results are then void, and the instance must be dropped: it
    /// may hold writes that were not submitted.
    ///
    /// # Panics
    /// If there are more than [`MAX_WRITES`] frames, or fewer results than frames.
    pub fn write_all(
        &mut self,
        frames: &mut dyn ExactSizeIterator<Item = &[Segment<'_>]>,
        results: &mut [i32],
    ) -> io::Result<()> {
        let count = frames.len();
        assert!(count <= MAX_WRITES && count <= results.len(), "a burst has at most 64 frames");
        let mut queue = self.ring.submission();
        for (index, segments) in frames.enumerate() {
            let entry = opcode::Writev::new(
                types::Fd(self.target),
                segments.as_ptr().cast(),
                segments.len() as u32,
            )
            .build()
            .user_data(index as u64)
            .flags(squeue::Flags::empty());
            // SAFETY: the segments live until this function returns, and it does not return
            // before every submitted write has completed. What they point to is guest memory,
            // mapped for their lifetime, or memory of our own.
            unsafe { queue.push(&entry) }.expect("the queue was empty and holds a whole burst");
        }
        drop(queue);
        let mut pending = count;
        while pending > 0 {
            match self.ring.submit_and_wait(pending) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            for completion in self.ring.completion() {
                results[completion.user_data() as usize] = completion.result();
                pending -= 1;
            }
        }
        Ok(())
    }
}
