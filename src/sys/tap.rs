//! TAP devices: their queues, and the ioctls of `linux/if_tun.h`.

mod filter;

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use super::process::set_nonblocking;
use super::segment::{ReadSegment, Segment};
use super::{check, device};

pub use filter::ProgramMemory;

/// `TUN_F_*` of `linux/if_tun.h`: offloads that the reader of a TAP accepts in frames.
pub mod offload {
    /// Frames may have partial checksums.
    pub const CSUM: u32 = libc::TUN_F_CSUM;
    /// GSO frames of TCP over IPv4.
    pub const TSO4: u32 = libc::TUN_F_TSO4;
    /// GSO frames of TCP over IPv6.
    pub const TSO6: u32 = libc::TUN_F_TSO6;
    /// GSO frames of TCP may have ECN bits.
    pub const TSO_ECN: u32 = libc::TUN_F_TSO_ECN;
    /// GSO frames of UDP over IPv4 (Linux 6.2).
    pub const USO4: u32 = libc::TUN_F_USO4;
    /// GSO frames of UDP over IPv6 (Linux 6.2).
    pub const USO6: u32 = libc::TUN_F_USO6;
}

/// Time after which [`Queue::drain`] ends although frames still arrive.
const DRAIN_TIME: Duration = Duration::from_millis(50);
/// Frames that [`Queue::drain`] takes at least: twice the default length of a queue (`TUN_READQ_SIZE`).
const DRAINED_FRAMES: usize = 1000;

/// The device of a TAP's queue, as of the time when the queue was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Primary name of the device; it can have changed since.
    pub name: String,
    /// Index of the device; `None` if the device is in another network namespace.
    pub index: Option<u32>,
    /// True if the device has `IFF_MULTI_QUEUE`, so that the kernel can detach a queue. False for a macvtap.
    pub multi_queue: bool,
    /// True if the device is a macvtap or an ipvtap, which has neither filters nor a carrier to set.
    pub is_macvtap: bool,
}

/// One queue of a TAP device, non-blocking, with a virtio header before each frame.
#[derive(Debug)]
pub struct Queue {
    file: File,
    identity: Identity,
}

/// Returns the flags (`IFF_*` of `linux/if_tun.h`) that the kernel supports for TUN and TAP devices.
///
/// # Errors
/// An error of opening `/dev/net/tun`.
pub fn features() -> io::Result<u32> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut flags: libc::c_uint = 0;
    // SAFETY: TUNGETFEATURES writes one unsigned int.
    unsafe { check(libc::ioctl(file.as_raw_fd(), libc::TUNGETFEATURES, &mut flags))? };
    Ok(flags)
}

impl Queue {
    /// Opens one more queue of the TAP `name`. The kernel creates a missing TAP.
    ///
    /// # Errors
    /// Errors of `/dev/net/tun` and TUNSETIFF: EBUSY if another process has the device open, EINVAL if `multi_queue`
    /// differs from the device, EPERM without the right to open or create it.
    pub fn open(name: &str, multi_queue: bool) -> io::Result<Self> {
        Self::set_up(name, multi_queue, 0)
    }

    /// Creates the TAP `name`, which exists as long as a queue of it is open, and opens its first queue.
    ///
    /// # Errors
    /// As for [`open`](Self::open); EBUSY also if a device has this name.
    pub fn make(name: &str, multi_queue: bool) -> io::Result<Self> {
        Self::set_up(name, multi_queue, libc::IFF_TUN_EXCL)
    }

    fn set_up(name: &str, multi_queue: bool, more: libc::c_int) -> io::Result<Self> {
        let mut request = device::request(name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")?;
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more;
        if multi_queue {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq.
        unsafe { check(libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &mut request))? };
        Self::unidentified(file).identified()
    }

    /// Creates a queue from the descriptor of a TAP queue that another process has opened.
    ///
    /// # Errors
    /// The descriptor is no TAP queue. `InvalidInput` if it was opened without `IFF_TAP`, `IFF_NO_PI` or
    /// `IFF_VNET_HDR`.
    pub fn inherit(fd: OwnedFd) -> io::Result<Self> {
        set_nonblocking(fd.as_fd())?;
        let queue = Self::unidentified(File::from(fd));
        if let Err(error) = queue.ask() {
            let name = super::process::describe(queue.as_fd());
            let text = format!("{name} is no TAP queue: {error}");
            return Err(io::Error::new(error.kind(), text));
        }
        queue.identified()
    }

    /// Creates a queue from a descriptor that another daemon has opened. Only a missing index is read from the kernel,
    /// because the device may have another name by then, or be gone.
    pub fn identified_as(fd: OwnedFd, identity: &Identity) -> Self {
        let mut queue = Queue { file: File::from(fd), identity: identity.clone() };
        if identity.index.is_none()
            && let Ok((name, _)) = queue.ask()
        {
            queue.identity.index = device::index_of_queue(queue.as_fd(), &name);
        }
        queue
    }

    fn unidentified(file: File) -> Self {
        let identity =
            Identity { name: String::new(), index: None, multi_queue: false, is_macvtap: false };
        Queue { file, identity }
    }

    /// Reads the current name of the queue's device, and the flags of the queue, from the kernel.
    fn ask(&self) -> io::Result<(String, libc::c_int)> {
        // SAFETY: ifreq is plain old data; TUNGETIFF fills one.
        let answer = unsafe {
            let mut answer: libc::ifreq = mem::zeroed();
            check(libc::ioctl(self.file.as_raw_fd(), libc::TUNGETIFF, &mut answer))?;
            answer
        };
        // SAFETY: TUNGETIFF has just set the flags; every bit pattern of them is valid.
        let flags = i32::from(unsafe { answer.ifr_ifru.ifru_flags }) & 0xffff;
        Ok((device::name_in(&answer), flags))
    }

    /// Reads the queue's identity from the kernel.
    ///
    /// # Errors
    /// `InvalidInput` without `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`; otherwise an error of TUNGETIFF.
    fn identified(mut self) -> io::Result<Self> {
        let (name, flags) = self.ask()?;
        let is_macvtap = !is_tun(&self.file)?;
        self.identity = Identity {
            index: device::index_of_queue(self.file.as_fd(), &name),
            multi_queue: flags & libc::IFF_MULTI_QUEUE != 0 && !is_macvtap,
            is_macvtap,
            name,
        };
        let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if flags & wanted != wanted {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{} was not opened with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR",
                    self.identity.name
                ),
            ));
        }
        Ok(self)
    }

    /// Returns the device of this queue.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Passes `value` to one of the TUNSET* ioctls that read an int.
    fn set(&self, code: libc::Ioctl, value: libc::c_int) -> io::Result<()> {
        // SAFETY: the TUNSET* codes used here read one int.
        unsafe { check(libc::ioctl(self.file.as_raw_fd(), code, &value))? };
        Ok(())
    }

    /// Sets the length in bytes of the virtio-net header, and its byte order to little endian, for the whole device.
    pub fn set_header_length(&self, bytes: usize) -> io::Result<()> {
        self.set(libc::TUNSETVNETHDRSZ, bytes as libc::c_int)?;
        self.set(libc::TUNSETVNETLE, 1)
    }

    /// Sets the offloads that the reader accepts, flags of [`offload`], for the whole device.
    pub fn set_offload(&self, offloads: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        unsafe {
            check(libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offloads),
            ))?
        };
        Ok(())
    }

    /// Attaches the queue, so that the kernel steers frames to it, or detaches it. Succeeds also if another daemon has
    /// done so before.
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        // SAFETY: TUNSETQUEUE reads one ifreq, of which only the flags count.
        let set = unsafe {
            let mut request: libc::ifreq = mem::zeroed();
            request.ifr_ifru.ifru_flags = flag as libc::c_short;
            check(libc::ioctl(self.file.as_raw_fd(), libc::TUNSETQUEUE, &mut request))
        };
        match set {
            // With a filter, the kernel attaches the queue and returns this error: see `filter`.
            Err(error) if attached && error.raw_os_error() == Some(libc::EFAULT) => {
                if self.is_attached()? { Ok(()) } else { Err(error) }
            }
            // Another daemon has attached or detached the queue before.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                if self.is_attached()? == attached { Ok(()) } else { Err(error) }
            }
            set => set.map(drop),
        }
    }

    /// Returns whether the queue is attached, so that the kernel steers frames to it.
    pub fn is_attached(&self) -> io::Result<bool> {
        Ok(self.ask()?.1 & libc::IFF_DETACH_QUEUE == 0)
    }

    /// Discards one waiting frame; returns whether there was one.
    pub fn discard(&self) -> bool {
        // The kernel truncates the frame to this buffer, which holds at least the virtio-net header.
        let mut start = [0; 64];
        (&self.file).read(&mut start).is_ok()
    }

    /// Discards all waiting frames. If frames still arrive, this ends after 50 ms and at least 1000 frames.
    pub fn drain(&self) {
        let end = Instant::now() + DRAIN_TIME;
        let is_enough = |frame| frame >= DRAINED_FRAMES && Instant::now() > end;
        (0..).find(|&frame| is_enough(frame) || !self.discard());
    }

    /// Sets the user who can open the device without CAP_NET_ADMIN. Every user can open a device that has neither
    /// owner nor group.
    pub fn set_owner(&self, user: u32) -> io::Result<()> {
        // SAFETY: TUNSETOWNER takes its argument by value.
        unsafe {
            check(libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOWNER, libc::c_ulong::from(user)))?
        };
        Ok(())
    }

    /// Sets the device's carrier on or off, which is the link state on the host.
    pub fn set_carrier(&self, up: bool) -> io::Result<()> {
        let up = libc::c_int::from(up);
        // SAFETY: TUNSETCARRIER reads one int.
        unsafe { check(libc::ioctl(self.file.as_raw_fd(), libc::TUNSETCARRIER, &up))? };
        Ok(())
    }

    /// Returns the same queue with a duplicate of its descriptor.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Queue { file: self.file.try_clone()?, identity: self.identity.clone() })
    }

    /// Writes one frame that needs no offload, after a zeroed header of the device's length.
    pub fn write_plain(&self, frame: &[u8]) -> io::Result<()> {
        let mut length: libc::c_int = 0;
        // SAFETY: TUNGETVNETHDRSZ writes one int.
        unsafe { check(libc::ioctl(self.file.as_raw_fd(), libc::TUNGETVNETHDRSZ, &mut length))? };
        let header = vec![0; usize::try_from(length).unwrap_or(0)];
        self.write(&[ReadSegment::of_bytes(&header), ReadSegment::of_bytes(frame)]).map(|_| ())
    }

    /// Returns whether the TAP's send buffer is limited, so that a write can return `WouldBlock`. Without a limit, the
    /// kernel's default, the kernel accepts a frame or rejects it for good.
    pub fn has_send_limit(&self) -> bool {
        let mut limit: libc::c_int = 0;
        // SAFETY: TUNGETSNDBUF writes one int.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNGETSNDBUF, &mut limit) };
        result < 0 || limit != libc::c_int::MAX
    }

    /// Reads the device's MTU in bytes, by the device's index.
    ///
    /// # Errors
    /// The device is gone, or in another network namespace.
    pub fn mtu(&self) -> io::Result<u32> {
        let elsewhere = || io::Error::other("the device is in another network namespace");
        device::mtu(self.identity.index.ok_or_else(elsewhere)?)
    }

    /// Reads one frame, header first, into `window`; returns its length in bytes.
    ///
    /// The kernel truncates a frame that is longer than the window, and does not report it.
    ///
    /// # Errors
    /// `WouldBlock` if no frame waits; otherwise an error of the device.
    #[inline]
    pub fn read(&self, window: &[Segment<'_>]) -> io::Result<usize> {
        super::read_segments(self.as_fd(), window)
    }

    /// Reads one frame as [`read`](Self::read) does, with one more byte after the window. If the result is longer than
    /// the window, the frame was truncated.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    pub fn read_watching(&self, window: &mut Vec<Segment<'_>>) -> io::Result<usize> {
        let mut overflow = [0u8; 1];
        // SAFETY: `overflow` lives to the end of this function, and its segment leaves the window
        // before that.
        window.push(unsafe { Segment::new(NonNull::from(&mut overflow).cast(), 1) });
        let read = self.read(window);
        window.pop();
        read
    }

    /// Writes one frame, header first.
    ///
    /// # Errors
    /// `WouldBlock` if the send buffer is limited and full; otherwise an error of the device.
    pub fn write(&self, segments: &[ReadSegment<'_>]) -> io::Result<usize> {
        super::write_segments(self.as_fd(), segments)
    }
}

impl From<Queue> for OwnedFd {
    fn from(queue: Queue) -> Self {
        queue.file.into()
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Returns whether a descriptor is of `/dev/net/tun` (Documentation/networking/tuntap.rst: character device 10, 200).
/// A macvtap has its own device file, which supports fewer requests.
fn is_tun(file: &File) -> io::Result<bool> {
    let metadata = file.metadata()?;
    Ok(metadata.file_type().is_char_device() && metadata.rdev() == libc::makedev(10, 200))
}
