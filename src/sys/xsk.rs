//! AF_XDP sockets (`Documentation/networking/af_xdp.rst`, `linux/if_xdp.h`): the calls that set
//! them up, and their four rings.

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

/// The kernel reads or writes this many bytes at the most for one address: it is a page, which
/// costs the least of its memory for each byte of guest memory registered.
pub const CHUNK: u32 = 4096;
/// Bytes that the kernel leaves before a received frame (`XDP_PACKET_HEADROOM`), beside the
/// headroom that is asked for.
pub const KERNEL_HEADROOM: u32 = 256;
/// Bytes of `struct xsk_tx_metadata`, which stands right before a frame to be sent.
pub const TX_METADATA: usize = 24;
/// The part of an address that is a place; above it stands an offset that the kernel adds to it
/// (`XSK_UNALIGNED_BUF_OFFSET_SHIFT`).
pub const ADDRESS_BITS: u32 = 48;

/// How many frames one call sends in copy mode (Linux 6.17); libc does not have it.
const XDP_MAX_TX_SKB_BUDGET: libc::c_int = 9;

/// `struct xdp_desc`: a frame to be sent, or one received.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Descriptor {
    /// Where the frame starts in the UMEM.
    pub address: u64,
    /// Its length in bytes.
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
    /// Says that [`TX_METADATA`] bytes of metadata stand before the frame.
    pub const HAS_METADATA: u32 = libc::XDP_TX_METADATA;
    /// Says that the frame goes on in the next descriptor.
    pub const CONTINUES: u32 = libc::XDP_PKT_CONTD;

    /// The same frame, with a number below 65536 in the part of its address that the kernel only adds to the
    /// rest. The kernel completes an address as it got it, so the number comes back.
    #[inline(always)]
    #[must_use]
    pub fn tagged(self, number: usize) -> Self {
        let number = number as u64;
        Descriptor { address: (self.address - number) | number << ADDRESS_BITS, ..self }
    }
}

/// `struct xsk_tx_metadata` with a request to complete the checksum.
pub fn checksum_request(start: u16, offset: u16) -> [u8; TX_METADATA] {
    let mut bytes = [0; TX_METADATA];
    bytes[..8].copy_from_slice(&u64::from(libc::XDP_TXMD_FLAGS_CHECKSUM).to_ne_bytes());
    bytes[8..10].copy_from_slice(&start.to_ne_bytes());
    bytes[10..12].copy_from_slice(&offset.to_ne_bytes());
    bytes
}

/// Entries of each of a socket's rings: powers of two.
#[derive(Debug, Clone, Copy)]
pub struct RingSizes {
    /// Of the fill ring and the rx ring, which so has room for every buffer that is posted.
    pub rx: u32,
    /// Of the tx ring and the completion ring.
    pub tx: u32,
}

/// How a socket is bound to its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    /// Index of the network device.
    pub device: u32,
    /// Number of the queue.
    pub queue: u32,
    /// Whether the driver moves frames itself, or the kernel copies them.
    pub zero_copy: bool,
    /// Whether a frame may have several descriptors (Linux 6.6). The port does without: the
    /// benchmark shows what it costs.
    pub multi_buffer: bool,
}

/// What the kernel counted for a socket (`struct xdp_statistics`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Frames lost because no buffer was posted, or they were longer than a buffer.
    pub rx_dropped: u64,
    /// Times that no buffer was posted.
    pub rx_no_buffer: u64,
    /// Frames lost because the rx ring was full.
    pub rx_ring_full: u64,
    /// Addresses in the fill ring that were refused. We check them before: it is a fault of ours.
    pub rx_invalid: u64,
    /// Descriptors in the tx ring that were refused; likewise.
    pub tx_invalid: u64,
}

impl Statistics {
    /// Frames lost on the way to the guest.
    pub fn lost(&self) -> u64 {
        self.rx_dropped + self.rx_ring_full
    }

    /// Of those, the ones that were longer than a buffer, in copy mode (`__xsk_rcv` of
    /// net/xdp/xsk.c): drivers with zero copy look for buffers when no frame is there, too.
    pub fn too_long(&self) -> u64 {
        self.rx_dropped.saturating_sub(self.rx_no_buffer)
    }
}

/// Memory that can be registered with a socket: its UMEM.
///
/// # Safety
/// The `length` bytes from `start` must stay mapped, readable and writable, for as long as the value
/// lives, and must not be seen as Rust references: the kernel reads and writes them at any moment.
pub unsafe trait Registrable: fmt::Debug + Send + Sync {
    /// First address in this process.
    fn start(&self) -> usize;

    /// Length in bytes.
    fn length(&self) -> usize;
}

/// A socket that is set up and not yet bound. It takes buffers into its fill ring already.
#[derive(Debug)]
pub struct Socket {
    // Dropped in this order: the kernel lets go of a socket when its last mapping has gone.
    /// Frames that have arrived.
    pub rx: Consumer<Descriptor>,
    /// Frames to be sent.
    pub tx: Producer<Descriptor>,
    /// Buffers for frames to come.
    pub fill: Producer<u64>,
    /// Addresses of frames that were sent.
    pub completion: Consumer<u64>,
    fd: Arc<OwnedFd>,
    /// What the rings' addresses are offsets into, kept as long as the kernel uses it.
    _umem: Arc<dyn Registrable>,
}

/// Whose memory a new socket is to use.
#[derive(Debug, Clone)]
pub enum Registration<'a> {
    /// Registered with this socket: all of the UMEM is pinned.
    New {
        /// Bytes left free before each received frame, beside [`KERNEL_HEADROOM`].
        headroom: u32,
        /// Whether frames to be sent may carry metadata (Linux 6.8).
        metadata: bool,
    },
    /// As registered with that socket, which must be bound.
    Shared(BorrowedFd<'a>),
}

impl Socket {
    /// Makes a socket with its rings.
    ///
    /// # Errors
    /// ENOBUFS if the UMEM is more than may be locked (RLIMIT_MEMLOCK without CAP_IPC_LOCK),
    /// EINVAL if the kernel does not know a flag (metadata before Linux 6.8), EAFNOSUPPORT
    /// without AF_XDP, EPERM without CAP_NET_RAW.
    pub fn new(
        umem: &Arc<impl Registrable + 'static>,
        sizes: RingSizes,
        registration: &Registration<'_>,
    ) -> io::Result<Self> {
        // SAFETY: the descriptor is fresh and has no other owner.
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
        // An older kernel sends 32 frames by a call, and is called again.
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
    /// EBUSY if the queue has a socket, or had one until some 30 ms ago; EINVAL if there is no
    /// such queue; EOPNOTSUPP if its driver has no zero copy; ENODEV, ENETDOWN without the device.
    pub fn bind(&self, to: Binding, registration: &Registration<'_>) -> io::Result<()> {
        let (flags, shared) = match registration {
            // The mode is that of the first socket.
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

    /// The descriptor, for a map of sockets or for others to share its UMEM. Whoever keeps it
    /// keeps the socket alive.
    pub fn descriptor(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Whether it is bound in zero-copy mode.
    pub fn is_zero_copy(&self) -> io::Result<bool> {
        let options: libc::xdp_options = get_option(&self.fd, libc::SOL_XDP, libc::XDP_OPTIONS)?;
        Ok(options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0)
    }

    /// What the kernel has counted since it was made.
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

    /// Lets frames to be sent take this many bytes of the kernel's memory at a time, beyond the
    /// system's limit if we may.
    pub fn set_send_buffer(&self, bytes: u32) {
        let forced = set_option(&self.fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &bytes);
        if forced.is_err() {
            // As much as there is: frames then wait for room.
            let _ = set_option(&self.fd, libc::SOL_SOCKET, libc::SO_SNDBUF, &bytes);
        }
    }

    /// Has [`send`](Self::send) and [`receive`](Self::receive) do the driver's work, and its
    /// interrupts held back meanwhile (Linux 5.11).
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

    /// Has the kernel send what the tx ring holds.
    ///
    /// # Errors
    /// EAGAIN if it has sent a part, and is to be called again; EBUSY if the device dropped a
    /// frame, and is to be called again; ENOBUFS without memory; ENETDOWN, ENXIO if the device is
    /// down or gone.
    pub fn send(&self) -> io::Result<()> {
        // SAFETY: sends nothing from our side: no buffer, no address.
        let result = unsafe {
            libc::sendto(self.fd.as_raw_fd(), ptr::null(), 0, libc::MSG_DONTWAIT, ptr::null(), 0)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Has the driver look at the fill ring, and receive, if frames are busily polled for.
    pub fn receive(&self) -> io::Result<()> {
        // SAFETY: receives nothing on our side: no buffer, no address.
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

/// Reads an option that is plain numbers; a kernel that knows fewer of them leaves zeros.
fn get_option<T: Plain>(fd: &OwnedFd, level: libc::c_int, option: libc::c_int) -> io::Result<T> {
    let mut value: T = zeros();
    let mut length = mem::size_of::<T>() as libc::socklen_t;
    let place = (&raw mut value).cast();
    // SAFETY: the kernel writes `length` bytes at the most, which may be any.
    unsafe { check(libc::getsockopt(fd.as_raw_fd(), level, option, place, &mut length))? };
    Ok(value)
}
