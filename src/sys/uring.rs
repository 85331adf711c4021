//! One system call for a burst of writes: io_uring, used as a vector of `writev`. It saves a system call
//! per frame, with the filter before it, and costs a submission and a completion.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use io_uring::{IoUring, opcode, types};

use crate::guest::Segment;

/// Writes of one burst at the most.
pub const MAX_WRITES: usize = 64;

/// An io_uring instance for writes to one file.
///
/// The file is registered with it, which saves looking it up for each write. The kernel lets go of
/// registered files some 30 ms after a process was killed, and until then a TAP device is busy for
/// the next one; a process that ends by itself takes them back first.
pub struct Writer {
    ring: IoUring,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Writer")
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Fails if there are none.
        let _ = self.ring.submitter().unregister_files();
    }
}

impl Writer {
    /// Makes an instance for the file behind `target`, which it keeps open.
    ///
    /// # Errors
    /// EPERM or ENOSYS where io_uring is not permitted or not there.
    pub fn new(target: impl AsFd) -> io::Result<Self> {
        let ring = IoUring::builder().setup_coop_taskrun().build(MAX_WRITES as u32)?;
        ring.submitter().register_files(&[target.as_fd().as_raw_fd()])?;
        Ok(Writer { ring })
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
    pub fn write_all<'a>(
        &mut self,
        frames: impl ExactSizeIterator<Item = &'a [Segment<'a>]>,
        results: &mut [i32],
    ) -> io::Result<()> {
        let count = frames.len();
        assert!(count <= MAX_WRITES && count <= results.len(), "a burst has at most 64 frames");
        let target = types::Fixed(0);
        let mut queue = self.ring.submission();
        for (index, segments) in frames.enumerate() {
            let entry = match segments {
                // Saves the kernel a copy of the list.
                [only] => opcode::Write::new(target, only.start(), only.len() as u32).build(),
                _ => opcode::Writev::new(target, segments.as_ptr().cast(), segments.len() as u32)
                    .build(),
            }
            .user_data(index as u64);
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
