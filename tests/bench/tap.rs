//! What a frame costs the daemon through a TAP, with DPDK's testpmd as the guest, against bare
//! loops that write and read the same frames on a TAP of their own.

use std::cell::RefCell;
use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, types};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost_user_net::sys::process::pin_this_thread;
use vhost_user_net::sys::tap::Queue;
use vm_memory::{GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::af_xdp::Load;
use super::measure::{
    BATCH, Cost, Fresh, GUEST, LENGTHS, bare, cost, frame, head, in_turns, receive_frames,
    received, row, send_frames, sent,
};
use crate::support::daemon::Daemon;
use crate::support::driver::HEADER;
use crate::support::guest::Ram;
use crate::support::network::{enter_quiet_namespace, ip};
use crate::support::testpmd::Testpmd;

/// Places that a bare loop sends from and reads to, one after the other: as many as a guest's ring
/// has, in memory such as a guest's.
const PLACES: u64 = 1024;
/// Bytes from one to the next.
const PLACE: u64 = 2048;

/// A TAP, `bare0`, and nothing else.
pub(super) struct Bare {
    queue: Queue,
    file: File,
    uring: IoUring,
    memory: Arc<Ram>,
    /// Number of the next place.
    next: u64,
}

impl Bare {
    pub(super) fn new() -> Self {
        // It goes with the value.
        let queue = Queue::open("bare0", false).unwrap();
        queue.set_header_length(12).unwrap();
        ip("link set bare0 up");
        let file = File::from(queue.as_fd().try_clone_to_owned().unwrap());
        let uring = IoUring::new(BATCH as u32).unwrap();
        Bare { queue, file, uring, memory: Arc::new(Ram::new(0, PLACES * PLACE)), next: 0 }
    }

    /// Puts the frame, header first, wherever there is room for one; returns the number of places.
    fn prepare(&mut self, bytes: &[u8]) -> u64 {
        let places = PLACES * PLACE / (bytes.len() as u64).next_multiple_of(PLACE);
        let each = PLACES * PLACE / places;
        (0..places).for_each(|place| self.memory.write(place * each, bytes));
        places
    }

    /// Writes a frame, header first, by a system call.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Cost {
        let places = self.prepare(bytes);
        let each = PLACES * PLACE / places;
        bare(|| {
            self.next += 1;
            let place = self.next % places * each;
            let sent = self.memory.send(place, bytes.len(), &mut self.file).unwrap();
            assert_eq!(sent, bytes.len());
            1
        })
    }

    /// The same, a batch by a system call; with `header`, after a header of the loop's own before each frame: of
    /// a header that the guest could still change nothing is known.
    pub(super) fn write_batches(&mut self, bytes: &[u8], header: Option<&[u8; HEADER]>) -> Cost {
        self.prepare(bytes);
        bare(|| self.write_batch(bytes.len(), header))
    }

    /// The same, of frames that the other processor has just written.
    pub(super) fn write_fresh(&mut self, bytes: &[u8], header: Option<&[u8; HEADER]>) -> Cost {
        let (memory, bytes, first) = (self.memory.clone(), bytes.to_vec(), self.next + 1);
        let length = bytes.len();
        let write = move |number| memory.write((first + number) % PLACES * PLACE, &bytes);
        let mut fresh = Fresh::written_by(PLACES / 2, write);
        bare(|| {
            fresh.take(BATCH as u64);
            self.write_batch(length, header)
        })
    }

    /// The same as `write_batches`, after a sleep that another thread ends each `pace`.
    pub(super) fn write_batches_woken(&mut self, bytes: &[u8], pace: Duration) -> Cost {
        self.prepare(bytes);
        let event = EventFd::new(0).unwrap();
        let (kick, mut load) = (event.try_clone().unwrap(), Load::default());
        load.run_each(pace, move || kick.write(1).unwrap());
        bare(|| {
            event.read().unwrap();
            self.write_batch(bytes.len(), None)
        })
    }

    /// Writes a batch of frames of `length` bytes, header included; returns their number.
    #[allow(unsafe_code)]
    fn write_batch(&mut self, length: usize, header: Option<&[u8; HEADER]>) -> u64 {
        let start = self.memory.memory().get_host_address(GuestAddress(0)).unwrap();
        let tap = types::Fd(self.file.as_raw_fd());
        let mut pieces = Vec::with_capacity(2 * BATCH);
        for _ in 0..BATCH {
            self.next += 1;
            let place = start.wrapping_add((self.next % PLACES * PLACE) as usize);
            let piece = |base: *const u8, length| libc::iovec {
                iov_base: base.cast_mut().cast(),
                iov_len: length,
            };
            pieces.extend(header.map(|header| piece(header.as_ptr(), HEADER)));
            let skip = if header.is_some() { HEADER } else { 0 };
            pieces.push(piece(place.wrapping_add(skip), length - skip));
        }
        let mut queue = self.uring.submission();
        for pieces in pieces.chunks(pieces.len() / BATCH) {
            let write = match pieces {
                [one] => opcode::Write::new(tap, one.iov_base.cast(), one.iov_len as u32).build(),
                _ => opcode::Writev::new(tap, pieces.as_ptr(), pieces.len() as u32).build(),
            };
            // SAFETY: the memory lives as long as the instance, the list through this function, and
            // this waits for all writes.
            unsafe { queue.push(&write).unwrap() };
        }
        drop(queue);
        self.uring.submit_and_wait(BATCH).unwrap();
        assert!(self.uring.completion().all(|it| it.result() == length as i32));
        BATCH as u64
    }

    /// Reads the frames that `load` sends to the device of this name, by a system call each.
    pub(super) fn read(&mut self, load: impl FnOnce(&str) -> Load) -> Cost {
        let _load = load("bare0");
        bare(|| {
            let place = self.next % PLACES * PLACE;
            match self.memory.fetch(place, PLACE as usize, &mut self.file) {
                Ok(_) => {
                    self.next += 1;
                    1
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.wait(),
                Err(error) => panic!("{error}"),
            }
        })
    }

    /// The same, as many as a batch has by a system call. A multishot read of a TAP fails with EBADFD (Linux 7.3).
    #[allow(unsafe_code)]
    pub(super) fn read_batches(&mut self, load: impl FnOnce(&str) -> Load) -> Cost {
        let mut uring = IoUring::builder().setup_coop_taskrun().build(BATCH as u32).unwrap();
        uring.submitter().register_files(&[self.file.as_raw_fd()]).unwrap();
        let _load = load("bare0");
        let start = self.memory.memory().get_host_address(GuestAddress(0)).unwrap();
        bare(|| {
            for _ in 0..BATCH {
                self.next += 1;
                let place = start.wrapping_add((self.next % PLACES * PLACE) as usize);
                let read = opcode::Read::new(types::Fixed(0), place, PLACE as u32).build();
                // SAFETY: the memory lives as long as the instance, and this waits for all reads.
                unsafe { uring.submission().push(&read).unwrap() };
            }
            uring.submit_and_wait(BATCH).unwrap();
            match uring.completion().filter(|it: &cqueue::Entry| it.result() > 0).count() {
                0 => self.wait(),
                frames => frames as u64,
            }
        })
    }

    /// Waits for a frame; none was read.
    fn wait(&self) -> u64 {
        let mut fds = [PollFd::new(self.queue.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(100u16)).unwrap();
        0
    }
}

pub(super) fn run() {
    enter_quiet_namespace();
    pin_this_thread(0).unwrap();
    let tap = RefCell::new(Bare::new());
    let daemon = Daemon::start(&["--tap=tap0", "--cpu-affinity=1"]);
    let method = daemon.log().lines().find(|line| line.contains("tx by")).map(str::to_owned);
    println!("\n{}", method.unwrap_or_default());
    let cpu = || daemon.cpu_nanoseconds();

    for length in LENGTHS {
        head(&format!("tap, frames of {length} bytes"));
        let bytes = [&[0; 12][..], &frame(length)].concat();
        let mut guest = Testpmd::start_on("0", &daemon.socket(), 1, 256, GUEST);
        send_frames(&mut guest, length);
        guest.pause();
        let [write, uring, tx] = in_turns([
            &mut || tap.borrow_mut().write(&bytes),
            &mut || tap.borrow_mut().write_batches(&bytes, None),
            &mut || {
                guest.resume();
                let cost = cost(|| received("tap0"), cpu);
                guest.pause();
                cost
            },
        ]);
        drop(guest);
        row("bare write loop", &write, None);
        row("bare io_uring loop, batches of 32", &uring, None);
        row("vhost-user-net tx", &tx, Some(("io_uring", &uring)));

        let mut guest = Testpmd::start_on("0", &daemon.socket(), 1, 1024, GUEST);
        receive_frames(&mut guest);
        guest.pause();
        let [read, rx] = in_turns([
            &mut || tap.borrow_mut().read(|tap| Load::flooding(tap, length)),
            &mut || {
                guest.resume();
                let sender = Load::flooding("tap0", length);
                let cost = cost(|| sent("tap0"), cpu);
                drop(sender);
                guest.pause();
                cost
            },
        ]);
        row("bare read loop", &read, None);
        row("vhost-user-net rx", &rx, Some(("read", &read)));
    }
}
