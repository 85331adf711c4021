//! One system call for a burst of writes: io_uring, used as a vector of `writev`.
//!
//! Whether that pays is a matter of the machine: it saves a system call per frame and costs a
//! submission and a completion. [`compare`] measures both.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

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

/// What a frame costs by each way of writing, without what the device does with it.
#[derive(Debug, Clone, Copy)]
pub struct Comparison {
    /// By io_uring, in bursts of 32.
    pub io_uring: Duration,
    /// By one `writev` per frame.
    pub writev: Duration,
}

/// Writes small frames to `/dev/null` both ways, once in a process; takes about a millisecond.
///
/// # Errors
/// Those of [`Writer::new`], and of opening `/dev/null`.
pub fn compare() -> Result<Comparison, &'static str> {
    static RESULT: OnceLock<Result<Comparison, String>> = OnceLock::new();
    let result = RESULT.get_or_init(|| measure().map_err(|error| error.to_string()));
    result.as_ref().copied().map_err(String::as_str)
}

fn measure() -> io::Result<Comparison> {
    const BURST: usize = 32;
    const ROUNDS: usize = 40;
    let null = File::options().write(true).open("/dev/null")?;
    let mut writer = Writer::new(&null)?;
    let (header, frame) = ([0; 12], [0; 64]);
    let segments = [Segment::of_bytes(&header), Segment::of_bytes(&frame)];
    let frames = [&segments[..]; BURST];
    let mut results = [0; BURST];
    let mut best = Comparison { io_uring: Duration::MAX, writev: Duration::MAX };
    // The fastest round: whatever else runs on the machine can only add to it.
    for _ in 0..ROUNDS {
        let started = Instant::now();
        writer.write_all(frames.into_iter(), &mut results)?;
        best.io_uring = best.io_uring.min(started.elapsed() / BURST as u32);
        let started = Instant::now();
        for segments in frames {
            super::write_segments(null.as_fd(), segments)?;
        }
        best.writev = best.writev.min(started.elapsed() / BURST as u32);
    }
    Ok(best)
}
