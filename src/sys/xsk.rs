//! AF_XDP sockets (`Documentation/networking/af_xdp.rst`, `linux/if_xdp.h`): their set-up, their system
//! calls, and their four rings.

mod rings;

use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::time::Duration;

use rings::Mapped;
pub use rings::{Consumer, Producer};

use super::{Plain, check, zeros};

/// Size of a chunk in bytes: the most that the kernel reads or writes for one address. It is a page, the size
/// that costs the least kernel memory for each byte of guest memory.
pub const CHUNK: u32 = 4096;
/// Bytes that the kernel leaves free before a received frame (`XDP_PACKET_HEADROOM`), beside the UMEM's
/// headroom.
pub const KERNEL_HEADROOM: u32 = 256;
/// Size in bytes of `struct xsk_tx_metadata`, which precedes a frame to be sent.
pub const TX_METADATA: usize = 24;
/// Number of low bits of an address that are its base. The upper bits are an offset that the kernel adds to
/// the base (`XSK_UNALIGNED_BUF_OFFSET_SHIFT`).
pub const ADDRESS_BITS: u32 = 48;

/// Socket option: most frames that one call sends in copy mode (Linux 6.17). libc lacks it.
const XDP_MAX_TX_SKB_BUDGET: libc::c_int = 9;

/// A frame to be sent, or a received one (`struct xdp_desc`).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// UMEM address of the frame's first byte.
    pub address: u64,
    /// Length of the frame in bytes.
    pub length: u32,
    /// `XDP_TX_METADATA`, `XDP_PKT_CONTD`.
    pub options: u32,
}

// SAFETY: 8, 4 and 4 bytes of integers.
unsafe impl Plain for Descriptor {}
// SAFETY: structures of integers, as the kernel has them, without padding.
unsafe impl Plain for libc::xdp_umem_reg {}
// SAFETY: as above.
unsafe impl Plain for libc::xdp_mmap_offsets {}
// SAFETY: as above.
unsafe impl Plain for libc::xdp_options {}
// SAFETY: as above.
unsafe impl Plain for libc::xdp_statistics {}

impl Descriptor {
    /// Option: [`TX_METADATA`] bytes of metadata precede the frame.
    pub const HAS_METADATA: u32 = libc::XDP_TX_METADATA;
    /// Option: the frame continues in the next descriptor.
    pub const CONTINUES: u32 = libc::XDP_PKT_CONTD;

    /// Returns this descriptor with a number below 65536 in the upper bits of the address, which the kernel
    /// adds to the base. The completion ring returns the address unchanged, and so the number.
    #[inline(always)]
    #[must_use]
    pub fn tagged(self, number: usize) -> Self {
        let number = number as u64;
        Descriptor { address: (self.address - number) | number << ADDRESS_BITS, ..self }
    }
}

/// Returns a `struct xsk_tx_metadata` that requests the checksum over all bytes from `start` on, at `start +
/// offset`.
pub fn checksum_request(start: u16, offset: u16) -> [u8; TX_METADATA] {
    let mut bytes = [0; TX_METADATA];
    bytes[..8].copy_from_slice(&u64::from(libc::XDP_TXMD_FLAGS_CHECKSUM).to_ne_bytes());
    bytes[8..10].copy_from_slice(&start.to_ne_bytes());
    bytes[10..12].copy_from_slice(&offset.to_ne_bytes());
    bytes
}

/// Numbers of entries of a socket's rings: powers of two.
#[derive(Debug, Clone, Copy)]
pub struct RingSizes {
    /// Entries of the fill ring and of the rx ring, which so has room for every posted buffer.
    pub rx: u32,
    /// Entries of the tx ring and of the completion ring.
    pub tx: u32,
}

/// Queue and mode of a bound socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    /// Index of the network device.
    pub device: u32,
    /// Number of the queue.
    pub queue: u32,
    /// Zero-copy mode: the device reads and writes the UMEM. Else the kernel copies frames.
    pub zero_copy: bool,
    /// A frame may have several descriptors (Linux 6.6). Only a benchmark uses this, to measure the cost.
    pub multi_buffer: bool,
}

/// The kernel's counters of a socket (`struct xdp_statistics`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Frames lost because no buffer was posted, or they were longer than a buffer.
    pub rx_dropped: u64,
    /// Attempts of the kernel to take a buffer when none was posted.
    pub rx_no_buffer: u64,
    /// Frames lost because the rx ring was full.
    pub rx_ring_full: u64,
    /// Refused addresses in the fill ring. The port checks addresses before, so any is a bug of the daemon.
    pub rx_invalid: u64,
    /// Refused descriptors in the tx ring; any is a bug of the daemon.
    pub tx_invalid: u64,
}

impl Statistics {
    /// Returns the number of frames lost on the way to the guest.
    pub fn lost(&self) -> u64 {
        self.rx_dropped + self.rx_ring_full
    }

    /// Returns the number of lost frames that were longer than a buffer. Valid in copy mode only (`__xsk_rcv`
    /// in net/xdp/xsk.c): zero-copy drivers try to take buffers before frames arrive.
    pub fn too_long(&self) -> u64 {
        self.rx_dropped.saturating_sub(self.rx_no_buffer)
    }
}

/// Memory that can be registered with a socket as its UMEM.
///
/// # Safety
/// While the value lives, the `length` bytes from `start` must stay mapped, readable and writable. There must
/// be no Rust references to them: the kernel reads and writes them at any moment.
pub unsafe trait Registrable: fmt::Debug + Send + Sync {
    /// Returns the first address in this process.
    fn start(&self) -> usize;

    /// Returns the length in bytes.
    fn length(&self) -> usize;
}

/// A socket and its mapped rings. The fill ring takes buffers even before the socket is bound.
#[derive(Debug)]
pub struct Socket {
    // Dropped in this order: the kernel closes a socket only after its last mapping is gone.
    /// Received frames.
    pub rx: Consumer<Descriptor>,
    /// Frames to be sent.
    pub tx: Producer<Descriptor>,
    /// Empty buffers for received frames.
    pub fill: Producer<u64>,
    /// Addresses of sent frames.
    pub completion: Consumer<u64>,
    fd: Arc<OwnedFd>,
    /// UMEM of the rings' addresses, mapped while the kernel uses it.
    _umem: Arc<dyn Registrable>,
}

/// Registration of a new socket's UMEM.
#[derive(Debug, Clone)]
pub enum Registration<'a> {
    /// Registers the UMEM, and so pins all of its memory.
    New {
        /// Bytes left free before each received frame, beside [`KERNEL_HEADROOM`].
        headroom: u32,
        /// Frames to be sent may have metadata (Linux 6.8).
        metadata: bool,
    },
    /// Uses the UMEM of that socket, which must be bound.
    Shared(BorrowedFd<'a>),
}

impl Socket {
    /// Creates a socket with its rings.
    ///
    /// # Errors
    /// ENOBUFS if the UMEM exceeds the limit of locked memory (RLIMIT_MEMLOCK without CAP_IPC_LOCK); EINVAL
    /// if the kernel does not support metadata (before Linux 6.8); EAFNOSUPPORT if the kernel has no AF_XDP;
    /// EPERM without CAP_NET_RAW.
    pub fn new(
        umem: &Arc<impl Registrable + 'static>,
        sizes: RingSizes,
        registration: &Registration<'_>,
    ) -> io::Result<Self> {
        // SAFETY: the descriptor is new and has no other owner.
        let fd = unsafe {
            let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
            OwnedFd::from_raw_fd(check(libc::socket(libc::AF_XDP, flags, 0))?)
        };
        if let Registration::New { headroom, metadata } = *registration {
            let mut flags = libc::XDP_UMEM_UNALIGNED_CHUNK_FLAG;
            if metadata {
                flags |= libc::XDP_UMEM_TX_METADATA_LEN;
            }
            let request = libc::xdp_umem_reg {
                addr: umem.start() as u64,
                len: umem.length() as u64,
                chunk_size: CHUNK,
                headroom,
                flags,
                tx_metadata_len: if metadata { TX_METADATA as u32 } else { 0 },
            };
            set_option(&fd, libc::SOL_XDP, libc::XDP_UMEM_REG, &request)?;
        }
        for (option, size) in [
            (libc::XDP_UMEM_FILL_RING, sizes.rx),
            (libc::XDP_RX_RING, sizes.rx),
            (libc::XDP_UMEM_COMPLETION_RING, sizes.tx),
            (libc::XDP_TX_RING, sizes.tx),
        ] {
            set_option(&fd, libc::SOL_XDP, option, &size)?;
        }
        // A kernel before Linux 6.17 lacks this option. It sends 32 frames in a call, and is called again.
        let _ = set_option(&fd, libc::SOL_XDP, XDP_MAX_TX_SKB_BUDGET, &sizes.tx);
        let offsets: libc::xdp_mmap_offsets =
            get_option(&fd, libc::SOL_XDP, libc::XDP_MMAP_OFFSETS)?;
        let fill = libc::XDP_UMEM_PGOFF_FILL_RING as libc::off_t;
        let completion = libc::XDP_UMEM_PGOFF_COMPLETION_RING as libc::off_t;
        Ok(Socket {
            rx: Consumer::new(Mapped::new(&fd, &offsets.rx, sizes.rx, libc::XDP_PGOFF_RX_RING)?),
            tx: Producer::new(Mapped::new(&fd, &offsets.tx, sizes.tx, libc::XDP_PGOFF_TX_RING)?),
            fill: Producer::new(Mapped::new(&fd, &offsets.fr, sizes.rx, fill)?),
            completion: Consumer::new(Mapped::new(&fd, &offsets.cr, sizes.tx, completion)?),
            fd: Arc::new(fd),
            _umem: umem.clone(),
        })
    }

    /// Binds the socket to a queue. Frames arrive once an XDP program redirects them to it.
    ///
    /// # Errors
    /// EBUSY if the queue has a socket, or had one until some 30 ms ago; EINVAL if there is no such queue;
    /// EOPNOTSUPP if the driver has no zero copy; ENODEV or ENETDOWN if the device is gone or down.
    pub fn bind(&self, to: Binding, registration: &Registration<'_>) -> io::Result<()> {
        let (flags, shared) = match registration {
            // The kernel uses the mode of the first socket.
            Registration::Shared(first) => (libc::XDP_SHARED_UMEM, first.as_raw_fd() as u32),
            Registration::New { .. } => {
                let mode = if to.zero_copy { libc::XDP_ZEROCOPY } else { libc::XDP_COPY };
                let pieces = if to.multi_buffer { libc::XDP_USE_SG } else { 0 };
                (mode | pieces | libc::XDP_USE_NEED_WAKEUP, 0)
            }
        };
        let address = libc::sockaddr_xdp {
            sxdp_family: libc::AF_XDP as u16,
            sxdp_flags: flags,
            sxdp_ifindex: to.device,
            sxdp_queue_id: to.queue,
            sxdp_shared_umem_fd: shared,
        };
        let length = mem::size_of_val(&address) as libc::socklen_t;
        // SAFETY: the address lives through the call, and has the length given.
        unsafe {
            check(libc::bind(self.fd.as_raw_fd(), (&raw const address).cast(), length))?;
        }
        Ok(())
    }

    /// Returns the descriptor, for a map of sockets, or for a socket that shares the UMEM. Each clone keeps
    /// the socket open.
    pub fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Returns true if the socket is bound in zero-copy mode.
    pub fn is_zero_copy(&self) -> io::Result<bool> {
        let options: libc::xdp_options = get_option(&self.fd, libc::SOL_XDP, libc::XDP_OPTIONS)?;
        Ok(options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0)
    }

    /// Reads the kernel's counters since the socket's creation.
    pub fn statistics(&self) -> io::Result<Statistics> {
        let counts: libc::xdp_statistics =
            get_option(&self.fd, libc::SOL_XDP, libc::XDP_STATISTICS)?;
        Ok(Statistics {
            rx_dropped: counts.rx_dropped,
            rx_no_buffer: counts.rx_fill_ring_empty_descs,
            rx_ring_full: counts.rx_ring_full,
            rx_invalid: counts.rx_invalid_descs,
            tx_invalid: counts.tx_invalid_descs,
        })
    }

    /// Sets the kernel memory in bytes that frames to be sent may take, beyond the system's limit if
    /// CAP_NET_ADMIN permits.
    pub fn set_send_buffer(&self, bytes: u32) {
        let forced = set_option(&self.fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &bytes);
        if forced.is_err() {
            // Up to the system's limit: further frames then wait.
            let _ = set_option(&self.fd, libc::SOL_SOCKET, libc::SO_SNDBUF, &bytes);
        }
    }

    /// Makes [`send`](Self::send) and [`receive`](Self::receive) poll the driver, and defers its interrupts
    /// (Linux 5.11). `time` is SO_BUSY_POLL, `budget` the most frames of one poll.
    pub fn prefer_busy_poll(&self, time: Duration, budget: u32) -> io::Result<()> {
        let microseconds = time.as_micros().min(u32::MAX.into()) as u32;
        for (option, value) in [
            (libc::SO_PREFER_BUSY_POLL, 1),
            (libc::SO_BUSY_POLL, microseconds),
            (libc::SO_BUSY_POLL_BUDGET, budget),
        ] {
            set_option(&self.fd, libc::SOL_SOCKET, option, &value)?;
        }
        Ok(())
    }

    /// Calls the kernel to send the frames in the tx ring.
    ///
    /// # Errors
    /// EAGAIN if frames are left, and EBUSY if the device dropped a frame: call again. ENOBUFS without
    /// memory; ENETDOWN or ENXIO if the device is down or gone.
    pub fn send(&self) -> io::Result<()> {
        // SAFETY: the call has neither buffer nor address.
        let result = unsafe {
            libc::sendto(self.fd.as_raw_fd(), ptr::null(), 0, libc::MSG_DONTWAIT, ptr::null(), 0)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Wakes the driver to read the fill ring. With busy polling the driver also receives frames.
    pub fn receive(&self) -> io::Result<()> {
        // SAFETY: the call has neither buffer nor address.
        let result = unsafe {
            libc::recvfrom(
                self.fd.as_raw_fd(),
                ptr::null_mut(),
                0,
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
                ptr::null_mut(),
            )
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Sets a socket option.
fn set_option<T: Plain>(
    fd: &OwnedFd,
    level: libc::c_int,
    option: libc::c_int,
    value: &T,
) -> io::Result<()> {
    let length = mem::size_of::<T>() as libc::socklen_t;
    // SAFETY: the value lives through the call, and has the length given.
    unsafe {
        check(libc::setsockopt(fd.as_raw_fd(), level, option, (&raw const *value).cast(), length))?;
    }
    Ok(())
}

/// Reads a socket option. Fields that an older kernel does not know are 0.
fn get_option<T: Plain>(fd: &OwnedFd, level: libc::c_int, option: libc::c_int) -> io::Result<T> {
    let mut value: T = zeros();
    let mut length = mem::size_of::<T>() as libc::socklen_t;
    let place = (&raw mut value).cast();
    // SAFETY: the kernel writes at most `length` bytes, and every bit pattern is valid for `T`.
    unsafe { check(libc::getsockopt(fd.as_raw_fd(), level, option, place, &mut length))? };
    Ok(value)
}
