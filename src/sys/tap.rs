//! TUN/TAP devices: opening their queues, and the ioctls of `linux/if_tun.h`.

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

/// `TUN_F_*` of `linux/if_tun.h`: what the reader of a TAP accepts in the frames it reads.
pub mod offload {
    /// Checksums may be left to the reader.
    pub const CSUM: u32 = libc::TUN_F_CSUM;
    /// TCP over IPv4 may come unsegmented.
    pub const TSO4: u32 = libc::TUN_F_TSO4;
    /// TCP over IPv6 may come unsegmented.
    pub const TSO6: u32 = libc::TUN_F_TSO6;
    /// Unsegmented TCP may carry ECN bits.
    pub const TSO_ECN: u32 = libc::TUN_F_TSO_ECN;
    /// UDP over IPv4 may come unsegmented (Linux 6.2).
    pub const USO4: u32 = libc::TUN_F_USO4;
    /// UDP over IPv6 may come unsegmented (Linux 6.2).
    pub const USO6: u32 = libc::TUN_F_USO6;
}

/// Time after which a queue that never gets empty counts as drained.
const DRAIN_TIME: Duration = Duration::from_millis(50);
/// Frames that are taken however long that takes: those that a queue holds by default (`TUN_READQ_SIZE`),
/// and as many again.
const DRAINED_FRAMES: usize = 1000;

/// How a TAP's queue was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The device's primary name when the queue was opened.
    pub name: String,
    /// The device's index; `None` if the device is in another network namespace.
    pub index: Option<u32>,
    /// Whether the device has `IFF_MULTI_QUEUE`, and the kernel can leave a queue out. A macvtap's
    /// queues count as all it has.
    pub multi_queue: bool,
    /// Whether the device is a macvtap or an ipvtap, which has neither filters nor a carrier to set.
    pub is_macvtap: bool,
}

/// One queue of a TAP device, non-blocking, with a virtio header before each frame.
#[derive(Debug)]
pub struct Queue {
    file: File,
    identity: Identity,
}

/// The flags (`IFF_*` of `linux/if_tun.h`) that the kernel knows for TUN and TAP devices.
///
/// # Errors
/// Those of opening `/dev/net/tun`.
pub fn features() -> io::Result<u32> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut flags: libc::c_uint = 0;
    // SAFETY: TUNGETFEATURES writes one unsigned int.
    unsafe { check(libc::ioctl(file.as_raw_fd(), libc::TUNGETFEATURES, &mut flags))? };
    Ok(flags)
}

impl Queue {
    /// Opens one more queue of the TAP `name`, which is made if it is missing.
    ///
    /// # Errors
    /// Those of `/dev/net/tun` and TUNSETIFF: EBUSY if the device has another user, EINVAL if
    /// `multi_queue` is not what the device has, EPERM without the right to open it.
    pub fn open(name: &str, multi_queue: bool) -> io::Result<Self> {
        Self::set_up(name, multi_queue, 0)
    }

    /// Makes the TAP `name`, for as long as it has a queue, and opens its first.
    ///
    /// # Errors
    /// Those of [`open`](Self::open); EBUSY if there is a device of that name.
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

    /// Takes over a TAP queue that another process opened for us.
    ///
    /// # Errors
    /// `InvalidInput` if the descriptor is no TAP, or was opened without `IFF_VNET_HDR`.
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

    /// Takes over a queue that another daemon has opened. The kernel is only asked for an index that is not
    /// told: the device may be renamed or gone by now.
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

    /// Asks the kernel which device this queue belongs to now, and how it was opened.
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

    /// Fills in which device this queue belongs to.
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

    /// Which device this queue belongs to.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    fn set(&self, code: libc::Ioctl, value: libc::c_int) -> io::Result<()> {
        // SAFETY: the TUNSET* codes used here read one int.
        unsafe { check(libc::ioctl(self.file.as_raw_fd(), code, &value))? };
        Ok(())
    }

    /// Sets the length in bytes of the header before each frame, and its byte order to little
    /// endian. Applies to the whole device.
    pub fn set_header_length(&self, bytes: usize) -> io::Result<()> {
        self.set(libc::TUNSETVNETHDRSZ, bytes as libc::c_int)?;
        self.set(libc::TUNSETVNETLE, 1)
    }

    /// Tells the kernel which of [`offload`]'s the reader accepts. Applies to the whole device.
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

    /// Has the kernel steer frames to this queue, or none. It may be so already: another daemon has had
    /// the queue.
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        let flag = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
        // SAFETY: TUNSETQUEUE reads one ifreq, of which only the flags count.
        let set = unsafe {
            let mut request: libc::ifreq = mem::zeroed();
            request.ifr_ifru.ifru_flags = flag as libc::c_short;
            check(libc::ioctl(self.file.as_raw_fd(), libc::TUNSETQUEUE, &mut request))
        };
        match set {
            // With a filter the kernel says so, and does it: see `filter`.
            Err(error) if attached && error.raw_os_error() == Some(libc::EFAULT) => {
                if self.is_attached()? { Ok(()) } else { Err(error) }
            }
            // It is so already: another daemon has had the queue.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                if self.is_attached()? == attached { Ok(()) } else { Err(error) }
            }
            set => set.map(drop),
        }
    }

    /// Whether the kernel steers frames to this queue.
    pub fn is_attached(&self) -> io::Result<bool> {
        Ok(self.ask()?.1 & libc::IFF_DETACH_QUEUE == 0)
    }

    /// Takes a frame that waits, and throws it away; says whether there was one.
    pub fn discard(&self) -> bool {
        // The kernel cuts the frame to this, which is room for the virtio header.
        let mut start = [0; 64];
        (&self.file).read(&mut start).is_ok()
    }

    /// Takes all frames that wait, and throws them away. Where more come all the time, this ends after
    /// 50 ms, and at least 1000 frames.
    pub fn drain(&self) {
        let end = Instant::now() + DRAIN_TIME;
        let is_enough = |frame| frame >= DRAINED_FRAMES && Instant::now() > end;
        (0..).find(|&frame| is_enough(frame) || !self.discard());
    }

    /// Sets the user that can open the device without CAP_NET_ADMIN. Everybody can open a device
    /// without owner and group.
    pub fn set_owner(&self, user: u32) -> io::Result<()> {
        // SAFETY: TUNSETOWNER takes its argument by value.
        unsafe {
            check(libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOWNER, libc::c_ulong::from(user)))?
        };
        Ok(())
    }

    /// Sets the device's link up or down, as the host sees it.
    pub fn set_carrier(&self, up: bool) -> io::Result<()> {
        let up = libc::c_int::from(up);
        // SAFETY: TUNSETCARRIER reads one int.
        unsafe { check(libc::ioctl(self.file.as_raw_fd(), libc::TUNSETCARRIER, &up))? };
        Ok(())
    }

    /// The same queue by another descriptor.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Queue { file: self.file.try_clone()?, identity: self.identity.clone() })
    }

    /// Writes one frame without any offload, whatever header the device is set to.
    pub fn write_plain(&self, frame: &[u8]) -> io::Result<()> {
        let mut length: libc::c_int = 0;
        // SAFETY: TUNGETVNETHDRSZ writes one int.
        unsafe { check(libc::ioctl(self.file.as_raw_fd(), libc::TUNGETVNETHDRSZ, &mut length))? };
        let header = vec![0; usize::try_from(length).unwrap_or(0)];
        self.write(&[ReadSegment::of_bytes(&header), ReadSegment::of_bytes(frame)]).map(|_| ())
    }

    /// Whether a write can be refused because too much is under way. Without a limit (the
    /// kernel's default) a write to a TAP either succeeds or fails for good.
    pub fn has_send_limit(&self) -> bool {
        let mut limit: libc::c_int = 0;
        // SAFETY: TUNGETSNDBUF writes one int.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNGETSNDBUF, &mut limit) };
        result < 0 || limit != libc::c_int::MAX
    }

    /// The device's MTU in bytes, whatever its name is by now.
    pub fn mtu(&self) -> io::Result<u32> {
        let elsewhere = || io::Error::other("the device is in another network namespace");
        device::mtu(self.identity.index.ok_or_else(elsewhere)?)
    }

    /// Reads one frame, header first, into `window`.
    ///
    /// The kernel cuts a frame to the buffers that it is given and says nothing: one that fills the
    /// window may have been longer.
    ///
    /// # Errors
    /// `WouldBlock` if no frame waits; otherwise those of the device.
    #[inline]
    pub fn read(&self, window: &[Segment<'_>]) -> io::Result<usize> {
        super::read_segments(self.as_fd(), window)
    }

    /// The same with one byte of our own behind the window: a result longer than the window means
    /// that the frame was longer, and is lost.
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
    /// `WouldBlock` if a send limit is reached; otherwise those of the device.
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

/// Whether a descriptor is of `/dev/net/tun` (Documentation/networking/tuntap.rst: character device 10,
/// 200), and not of a macvtap's device file, which knows fewer requests.
fn is_tun(file: &File) -> io::Result<bool> {
    let metadata = file.metadata()?;
    Ok(metadata.file_type().is_char_device() && metadata.rdev() == libc::makedev(10, 200))
}
