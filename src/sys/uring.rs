//! io_uring as a vector of `writev`: one system call for a burst of writes.
//!
//! A burst saves one system call, with its seccomp filter, for each frame, and costs a submission and a
//! completion for each.
//!
//! Invariant: no write is in flight when a call returns, so the frames' segments need not outlive the call.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::thread;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::{IoUring, opcode, squeue, types};

use super::segment::ReadSegment;

/// Maximum number of writes in one burst.
pub const MAX_WRITES: usize = 64;

/// `IORING_UNREGISTER_FILES` of linux/io_uring.h.
pub const UNREGISTER_FILES: u8 = 3;

/// Pause before the completion queue is read again while `io_uring_enter` fails.
const RETRY: Duration = Duration::from_micros(50);

/// An io_uring instance for writes to one file.
///
/// The file is registered with the instance, which saves a look-up for each write. The kernel releases
/// registered files about 30 ms after a process is killed; until then a TAP device is busy for the next
/// process. A process that exits normally unregisters the file first.
pub struct Writer {
    ring: IoUring,
    /// Replacements for the next calls of `io_uring_enter`.
    #[cfg(test)]
    script: std::collections::VecDeque<fn(&IoUring) -> io::Result<usize>>,
}

/// Failure of `io_uring_enter` to submit a burst, or all of a burst.
#[derive(Debug)]
pub struct SubmitError {
    /// Number of frames that the kernel accepted, from the start of the burst. Each of them has its result;
    /// the others were not submitted.
    pub submitted: usize,
    /// Error of `io_uring_enter`.
    pub source: io::Error,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Writer")
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // Fails if no files are registered, which is harmless.
        let _ = self.ring.submitter().unregister_files();
    }
}

impl Writer {
    /// Creates an instance for the file behind `target`, and keeps that file open.
    ///
    /// # Errors
    /// EPERM if io_uring is not permitted, ENOSYS if the kernel has none.
    pub fn new(target: impl AsFd) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        let ring = builder.setup_coop_taskrun().setup_r_disabled().build(MAX_WRITES as u32)?;
        let submitter = ring.submitter();
        submitter.register_files(&[target.as_fd().as_raw_fd()])?;
        // Seccomp filters do not apply to io_uring's operations. The restrictions confine an attacker who
        // controls a worker to writes to this file.
        submitter.register_restrictions(&mut [
            Restriction::sqe_op(opcode::Write::CODE),
            Restriction::sqe_op(opcode::Writev::CODE),
            Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()),
            Restriction::register_op(UNREGISTER_FILES),
        ])?;
        submitter.register_enable_rings()?;
        Ok(Writer {
            ring,
            #[cfg(test)]
            script: Default::default(),
        })
    }

    /// Writes `frames` in order, and stores the result of the n-th in `results[n]`: the number of bytes
    /// written, or a negative error number.
    ///
    /// Returns when every write has completed; writes to a TAP do not block.
    ///
    /// # Errors
    /// [`SubmitError`] if `io_uring_enter` fails. Every frame that the kernel accepted has completed and has its
    /// result. The caller must drop the instance: its submission queue still has the other frames.
    ///
    /// # Panics
    /// If there are more than [`MAX_WRITES`] frames, or an earlier burst failed.
    pub fn write_all<'a>(
        &mut self,
        frames: impl Iterator<Item = &'a [ReadSegment<'a>]>,
        results: &mut [i32; MAX_WRITES],
    ) -> Result<(), SubmitError> {
        let target = types::Fixed(0);
        let mut queue = self.ring.submission();
        // Entries left from an earlier burst point to segments that may be unmapped.
        assert!(queue.is_empty(), "an instance that failed is not used again");
        let mut count = 0;
        for segments in frames {
            assert!(count < MAX_WRITES, "a burst has at most 64 frames");
            let entry = match segments {
                // A single segment saves the kernel a copy of the list.
                [only] => opcode::Write::new(target, only.start(), only.len() as u32).build(),
                _ => opcode::Writev::new(target, segments.as_ptr().cast(), segments.len() as u32)
                    .build(),
            }
            .user_data(count as u64);
            // SAFETY: the segments are borrowed until this function returns, and it returns only after every
            // submitted write has completed (`settle` waits after an error). The kernel never gets the other
            // entries: the assertion above refuses any further burst. A segment's memory is guest memory or our
            // own, mapped for the segment's lifetime.
            unsafe { queue.push(&entry) }.expect("the queue was empty and holds a whole burst");
            count += 1;
        }
        drop(queue);
        let mut pending = count;
        while pending > 0 {
            match self.submit_and_wait(pending) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.settle(count, pending, results, error)),
            }
            pending -= self.reap(results);
        }
        Ok(())
    }

    /// Returns true if both queues are empty; false after [`write_all`](Self::write_all) failed or panicked.
    pub fn is_idle(&mut self) -> bool {
        self.ring.submission().is_empty() && self.ring.completion().is_empty()
    }

    /// Stores the results of all available completions; returns their number.
    fn reap(&mut self, results: &mut [i32; MAX_WRITES]) -> usize {
        let mut count = 0;
        for completion in self.ring.completion() {
            results[completion.user_data() as usize] = completion.result();
            count += 1;
        }
        count
    }

    /// Waits, after an error, for all writes that the kernel accepted, because it reads their segments until
    /// they complete. They complete without further calls of `io_uring_enter`.
    #[cold]
    fn settle(
        &mut self,
        count: usize,
        mut pending: usize,
        results: &mut [i32; MAX_WRITES],
        source: io::Error,
    ) -> SubmitError {
        let unsubmitted = self.ring.submission().len();
        loop {
            pending -= self.reap(results);
            if pending == unsubmitted {
                return SubmitError { submitted: count - unsubmitted, source };
            }
            thread::sleep(RETRY);
        }
    }

    fn submit_and_wait(&mut self, pending: usize) -> io::Result<usize> {
        #[cfg(test)]
        if let Some(step) = self.script.pop_front() {
            return step(&self.ring);
        }
        self.ring.submit_and_wait(pending)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    /// Submits `N` entries and waits for none, as the kernel does when memory is short.
    fn submit_only<const N: u32>(ring: &IoUring) -> io::Result<usize> {
        // SAFETY: the call has no argument. The entries are those of `write_all`, which waits for them.
        unsafe { ring.submitter().enter::<libc::sigset_t>(N, 0, 0, None) }
    }

    fn fail(_: &IoUring) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(libc::EBUSY))
    }

    #[test]
    fn failed_submission_reports_the_frames_written() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let Ok(mut writer) = Writer::new(&ours) else {
            println!("skipped: io_uring is not permitted");
            return;
        };
        let frames: Vec<[u8; 1]> = (0..16).map(|number| [number]).collect();
        let segments: Vec<_> = frames.iter().map(|frame| [ReadSegment::of_bytes(frame)]).collect();
        let burst = || segments.iter().map(|segments| &segments[..]);
        writer.script = [submit_only::<8>, fail].into();
        let mut results = [0; MAX_WRITES];
        let error = writer.write_all(burst(), &mut results).unwrap_err();
        assert_eq!(error.submitted, 8);
        assert_eq!(error.source.raw_os_error(), Some(libc::EBUSY));
        assert_eq!(results, std::array::from_fn(|index| i32::from(index < 8)));
        let mut byte = [0];
        let arrived: Vec<u8> =
            std::iter::from_fn(|| theirs.recv(&mut byte).ok().map(|_| byte[0])).collect();
        assert_eq!(arrived, Vec::from_iter(0..8));
        // The entries left would be submitted with the next burst.
        let again = catch_unwind(AssertUnwindSafe(|| writer.write_all(burst(), &mut results)));
        assert!(again.is_err());
        assert!(theirs.recv(&mut byte).is_err());
    }

    #[test]
    fn ring_permits_only_writes_to_its_file() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let Ok(mut writer) = Writer::new(&ours) else { return };
        let byte = b"a".as_ptr();
        for entry in [
            opcode::Send::new(types::Fixed(0), byte, 1).build(),
            opcode::Write::new(types::Fd(ours.as_raw_fd()), byte, 1).build(),
        ] {
            // SAFETY: the byte is static, so it outlives the operation.
            unsafe { writer.ring.submission().push(&entry).unwrap() };
            writer.ring.submit_and_wait(1).unwrap();
            let result = writer.ring.completion().next().unwrap().result();
            assert_eq!(result, -libc::EACCES);
            assert!(theirs.recv(&mut [0]).is_err());
        }
    }

    #[test]
    fn partial_submission_is_completed() {
        let (ours, theirs) = UnixDatagram::pair().unwrap();
        let Ok(mut writer) = Writer::new(&ours) else { return };
        let segments = [[ReadSegment::of_bytes(b"a")], [ReadSegment::of_bytes(b"b")]];
        writer.script.push_back(submit_only::<1>);
        let mut results = [0; MAX_WRITES];
        writer.write_all(segments.iter().map(|segments| &segments[..]), &mut results).unwrap();
        assert_eq!(results[..2], [1, 1]);
        for expected in [b"a", b"b"] {
            let mut byte = [0];
            theirs.recv(&mut byte).unwrap();
            assert_eq!(&byte, expected);
        }
    }
}
