//! Ways to read a TAP's frames in user space, as bare loops. A multishot read of a TAP fails with EBADFD (Linux
//! 7.3).

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd};

use io_uring::types::Fixed;
use io_uring::{IoUring, opcode};
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
