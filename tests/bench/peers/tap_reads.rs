//! Ways to read a TAP's frames in user space, as bare loops.

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::{BufRingEntry, Fixed, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost_user_net::sys::tap::Queue;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::cases::Measurements;
use crate::af_xdp::Load;
use crate::measure::{BATCH, Cost, bare};
use crate::support::guest::Ram;
use crate::support::network::ip;

/// Buffers that frames are read to, one after the other.
const BUFFERS: u16 = 256;
/// Bytes of each.
const BUFFER: u64 = 2048;

/// A TAP of its own, with `load` sending to it.
struct Reader {
    file: File,
    memory: Ram,
    next: u64,
    _queue: Queue,
}

impl Reader {
    fn new(name: &str) -> Self {
        let queue = Queue::open(name, false).unwrap();
        queue.set_header_length(12).unwrap();
        ip(&format!("link set {name} up"));
        let file = File::from(queue.as_fd().try_clone_to_owned().unwrap());
        let memory = Ram::new(0, u64::from(BUFFERS) * BUFFER);
        Reader { file, memory, next: 0, _queue: queue }
    }

    fn next_buffer(&mut self) -> u64 {
        self.next += 1;
        self.next % u64::from(BUFFERS) * BUFFER
    }

    fn address(&self, place: u64) -> *mut u8 {
        self.memory.memory().get_host_address(GuestAddress(place)).unwrap()
    }

    fn wait(&self) {
        let mut fds = [PollFd::new(self.file.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(10u16)).unwrap();
    }
}

/// All of them, each with what `load` sends to a device.
pub(super) fn all<'a>(load: impl Fn(&str) -> Load + Copy + 'a) -> Measurements<'a> {
    vec![
        ("bare read loop", Box::new(move || one_by_one(load))),
        ("bare io_uring loop, reads", Box::new(move || batches(load))),
        ("bare io_uring loop, multishot read", Box::new(move || multishot(load))),
    ]
}

/// A `read` for each frame.
fn one_by_one(load: impl Fn(&str) -> Load) -> Cost {
    let mut reader = Reader::new("reads0");
    let _load = load("reads0");
    bare(|| {
        let place = reader.next_buffer();
        match reader.memory.fetch(place, BUFFER as usize, &mut reader.file) {
            Ok(_) => 1,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                reader.wait();
                0
            }
            Err(error) => panic!("{error}"),
        }
    })
}

/// A submission of as many reads as a batch has.
#[allow(unsafe_code)]
fn batches(load: impl Fn(&str) -> Load) -> Cost {
    let mut reader = Reader::new("reads1");
    let mut uring: IoUring = IoUring::builder().setup_coop_taskrun().build(BATCH as u32).unwrap();
    uring.submitter().register_files(&[reader.file.as_raw_fd()]).unwrap();
    let _load = load("reads1");
    bare(|| {
        for _ in 0..BATCH {
            let place = reader.next_buffer();
            let read = opcode::Read::new(Fixed(0), reader.address(place), BUFFER as u32).build();
            // SAFETY: the buffer lives as long as the reader, and all reads are waited for.
            unsafe { uring.submission().push(&read).unwrap() };
        }
        uring.submit_and_wait(BATCH).unwrap();
        let frames = uring.completion().filter(|it| it.result() > 0).count() as u64;
        if frames == 0 {
            reader.wait();
        }
        frames
    })
}

/// One read that goes on for ever, to buffers that it takes from a ring.
#[allow(unsafe_code)]
fn multishot(load: impl Fn(&str) -> Load) -> Cost {
    let reader = Reader::new("reads2");
    fcntl(&reader.file, FcntlArg::F_SETFL(OFlag::empty())).unwrap();
    let entries = u32::from(BUFFERS);
    let mut uring: IoUring = IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_cqsize(2 * entries)
        .build(8)
        .unwrap();
    uring.submitter().register_files(&[reader.file.as_raw_fd()]).unwrap();
    let provided = Ram::new(0, 4096);
    let ring = provided.memory().get_host_address(GuestAddress(0)).unwrap().cast::<BufRingEntry>();
    // SAFETY: the ring is a page of memory that outlives the instance.
    unsafe { uring.submitter().register_buf_ring_with_flags(ring as u64, BUFFERS, 0, 0).unwrap() };
    // SAFETY: the tail is in the ring, and is written by atomic stores alone.
    let tail = unsafe { AtomicU16::from_ptr(BufRingEntry::tail(ring).cast_mut()) };
    let provide = |buffer: u16, at: u16| {
        // SAFETY: an entry of the ring that the kernel does not look at before the tail is beyond it.
        let entry = unsafe { &mut *ring.add(usize::from(at % BUFFERS)) };
        entry.set_addr(reader.address(u64::from(buffer) * BUFFER) as u64);
        entry.set_len(BUFFER as u32);
        entry.set_bid(buffer);
    };
    (0..BUFFERS).for_each(|buffer| provide(buffer, buffer));
    tail.store(BUFFERS, Ordering::Release);
    let read = opcode::ReadMulti::new(Fixed(0), 0, 0).build();
    // SAFETY: it reads to buffers of the ring alone.
    unsafe { uring.submission().push(&read).unwrap() };
    let load = load("reads2");
    let cost = bare(|| {
        let mut frames = 0;
        let mut again = false;
        let mut end = tail.load(Ordering::Relaxed);
        for completion in uring.completion() {
            if completion.result() > 0 {
                let buffer = cqueue::buffer_select(completion.flags()).unwrap();
                provide(buffer, end);
                end = end.wrapping_add(1);
                frames += 1;
            }
            again |= !cqueue::more(completion.flags());
        }
        tail.store(end, Ordering::Release);
        if again {
            // SAFETY: as above.
            unsafe { uring.submission().push(&read).unwrap() };
        }
        let limit = Timespec::new().nsec(10_000_000);
        match uring.submitter().submit_with_args(1, &SubmitArgs::new().timespec(&limit)) {
            Err(error) if error.raw_os_error() != Some(libc::ETIME) => panic!("{error}"),
            _ => {}
        }
        frames
    });
    drop(uring);
    drop(load);
    cost
}
