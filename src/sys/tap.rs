//! TUN/TAP devices: opening their queues, and the ioctls of `linux/if_tun.h`.

mod filter;

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::ptr::NonNull;

use super::check;
use crate::guest::{ReadSegment, Segment};

pub use filter::ProgramMemory;

/// Longest name of a network device in bytes, as the kernel has it (`IFNAMSIZ` less its nul).
pub const MAX_NAME: usize = libc::IFNAMSIZ - 1;

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNGETFEATURES: libc::c_ulong = 0x8004_54cf;
const TUNGETIFF: libc::c_ulong = 0x8004_54d2;
const TUNGETSNDBUF: libc::c_ulong = 0x8004_54d3;
const TUNGETVNETHDRSZ: libc::c_ulong = 0x8004_54d7;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const TUNSETCARRIER: libc::c_ulong = 0x4004_54e2;
const TUNSETVNETLE: libc::c_ulong = 0x4004_54dc;

/// `TUN_F_*` of `linux/if_tun.h`: what the reader of a TAP accepts in the frames it reads.
pub mod offload {
    /// Checksums may be left to the reader.
    pub const CSUM: u32 = 0x01;
    /// TCP over IPv4 may come unsegmented.
    pub const TSO4: u32 = 0x02;
    /// TCP over IPv6 may come unsegmented.
    pub const TSO6: u32 = 0x04;
    /// Unsegmented TCP may carry ECN bits.
    pub const TSO_ECN: u32 = 0x08;
    /// UDP over IPv4 may come unsegmented (Linux 6.2).
    pub const USO4: u32 = 0x20;
    /// UDP over IPv6 may come unsegmented (Linux 6.2).
    pub const USO6: u32 = 0x40;
}

/// How a TAP's queue was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The device's name.
    pub name: String,
    /// Whether the device has `IFF_MULTI_QUEUE`.
    pub multi_queue: bool,
}

/// One queue of a TAP device, non-blocking, with a virtio header before each frame.
#[derive(Debug)]
pub struct Queue {
    file: File,
    identity: Identity,
}

/// Whether a network device of that name is there, of whatever kind.
pub fn device_exists(name: &str) -> io::Result<bool> {
    let mut request = request(name)?;
    // SAFETY: SIOCGIFINDEX reads and writes one ifreq.
    let result =
        unsafe { libc::ioctl(control_socket()?.as_raw_fd(), libc::SIOCGIFINDEX, &mut request) };
    Ok(result >= 0)
}

/// Sets the MTU of the network device `name` in bytes.
///
/// # Errors
/// There is no such device, or we may not set it.
pub fn set_mtu(name: &str, mtu: u32) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_mtu = mtu as libc::c_int;
    // SAFETY: SIOCSIFMTU reads one ifreq.
    unsafe {
        check(libc::ioctl(control_socket()?.as_raw_fd(), libc::SIOCSIFMTU, &mut request))?;
    }
    Ok(())
}

/// The flags (`IFF_*` of `linux/if_tun.h`) that the kernel knows for TUN and TAP devices.
///
/// # Errors
/// Those of opening `/dev/net/tun`.
pub fn features() -> io::Result<u32> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut flags: libc::c_uint = 0;
    // SAFETY: TUNGETFEATURES writes one unsigned int.
    unsafe { check(libc::ioctl(file.as_raw_fd(), TUNGETFEATURES, &mut flags))? };
    Ok(flags)
}

/// An `ifreq` with the given name in it and all else zero.
pub(super) fn request(name: &str) -> io::Result<libc::ifreq> {
    let text = CString::new(name)?;
    if name.is_empty() || name.len() > MAX_NAME {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a network device's name has 1 to {MAX_NAME} bytes"),
        ));
    }
    // SAFETY: ifreq is plain old data, and all zeros is a valid one.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(text.as_bytes()) {
        *to = *from as libc::c_char;
    }
    Ok(request)
}

impl Queue {
    /// Opens one more queue of the TAP `name`, which is made if it is missing.
    ///
    /// # Errors
    /// Those of `/dev/net/tun` and TUNSETIFF: EBUSY if the device has another user, EINVAL if
    /// `multi_queue` is not what the device has, EPERM without the right to open it.
    pub fn open(name: &str, multi_queue: bool) -> io::Result<Self> {
        let mut request = request(name)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")?;
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if multi_queue {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        request.ifr_ifru.ifru_flags = flags as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes one ifreq.
        unsafe { check(libc::ioctl(file.as_raw_fd(), TUNSETIFF, &mut request))? };
        Queue { file, identity: Identity { name: String::new(), multi_queue } }.identified()
    }

    /// Takes over a TAP queue that another process opened for us.
    ///
    /// # Errors
    /// `InvalidInput` if the descriptor is no TAP, or was opened without `IFF_VNET_HDR`.
    pub fn inherit(fd: OwnedFd) -> io::Result<Self> {
        // SAFETY: sets flags of a descriptor that we own.
        unsafe {
            let flags = check(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))?;
            check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK))?;
        }
        let unknown = Identity { name: String::new(), multi_queue: false };
        let queue = Queue { file: File::from(fd), identity: unknown };
        if let Err(error) = queue.ask() {
            let name = super::process::describe(queue.as_fd());
            let text = format!("{name} is no TAP queue: {error}");
            return Err(io::Error::new(error.kind(), text));
        }
        queue.identified()
    }

    /// Takes over a queue that another daemon has opened. The kernel is not asked for the device, which
    /// may be renamed or gone by now.
    pub fn identified_as(fd: OwnedFd, identity: &Identity) -> Self {
        Queue { file: File::from(fd), identity: identity.clone() }
    }

    /// Asks the kernel which device this queue belongs to now, and how it was opened.
    fn ask(&self) -> io::Result<(String, libc::c_int)> {
        // SAFETY: ifreq is plain old data; TUNGETIFF fills one.
        let answer = unsafe {
            let mut answer: libc::ifreq = mem::zeroed();
            check(libc::ioctl(self.file.as_raw_fd(), TUNGETIFF, &mut answer))?;
            answer
        };
        // SAFETY: TUNGETIFF has just set the flags; every bit pattern of them is valid.
        let flags = i32::from(unsafe { answer.ifr_ifru.ifru_flags }) & 0xffff;
        let name: Vec<u8> =
            answer.ifr_name.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0).collect();
        Ok((String::from_utf8_lossy(&name).into_owned(), flags))
    }

    /// Fills in which device this queue belongs to.
    fn identified(mut self) -> io::Result<Self> {
        let (name, flags) = self.ask()?;
        self.identity.name = name;
        self.identity.multi_queue = flags & libc::IFF_MULTI_QUEUE != 0;
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

    fn set(&self, code: libc::c_ulong, value: libc::c_int) -> io::Result<()> {
        // SAFETY: the TUNSET* codes used here read one int.
        unsafe { check(libc::ioctl(self.file.as_raw_fd(), code, &value))? };
        Ok(())
    }

    /// Sets the length in bytes of the header before each frame, and its byte order to little
    /// endian. Applies to the whole device.
    pub fn set_header_length(&self, bytes: usize) -> io::Result<()> {
        self.set(TUNSETVNETHDRSZ, bytes as libc::c_int)?;
        self.set(TUNSETVNETLE, 1)
    }

    /// Tells the kernel which of [`offload`]'s the reader accepts. Applies to the whole device.
    pub fn set_offload(&self, offloads: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        unsafe {
            check(libc::ioctl(self.file.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(offloads)))?
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
            check(libc::ioctl(self.file.as_raw_fd(), TUNSETQUEUE, &mut request))
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

    /// Sets the device's link up or down, as the host sees it.
    pub fn set_carrier(&self, up: bool) -> io::Result<()> {
        let up = libc::c_int::from(up);
        // SAFETY: TUNSETCARRIER reads one int.
        unsafe { check(libc::ioctl(self.file.as_raw_fd(), TUNSETCARRIER, &up))? };
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
        unsafe { check(libc::ioctl(self.file.as_raw_fd(), TUNGETVNETHDRSZ, &mut length))? };
        let header = vec![0; usize::try_from(length).unwrap_or(0)];
        self.write(&[ReadSegment::of_bytes(&header), ReadSegment::of_bytes(frame)]).map(|_| ())
    }

    /// Whether a write can be refused because too much is under way. Without a limit (the
    /// kernel's default) a write to a TAP either succeeds or fails for good.
    pub fn has_send_limit(&self) -> bool {
        let mut limit: libc::c_int = 0;
        // SAFETY: TUNGETSNDBUF writes one int.
        let result = unsafe { libc::ioctl(self.file.as_raw_fd(), TUNGETSNDBUF, &mut limit) };
        result < 0 || limit != libc::c_int::MAX
    }

    /// The device's MTU in bytes, whatever its name is by now.
    pub fn mtu(&self) -> io::Result<u32> {
        let mut request = request(&self.ask()?.0)?;
        // SAFETY: SIOCGIFMTU reads and writes one ifreq, and sets its MTU.
        unsafe {
            check(libc::ioctl(control_socket()?.as_raw_fd(), libc::SIOCGIFMTU, &mut request))?;
            Ok(request.ifr_ifru.ifru_mtu as u32)
        }
    }

    /// Sets the device's MTU in bytes.
    pub fn set_mtu(&self, mtu: u32) -> io::Result<()> {
        set_mtu(&self.identity.name, mtu)
    }

    /// Sets the device up, as `ip link set NAME up` does.
    pub fn set_up(&self) -> io::Result<()> {
        let mut request = request(&self.identity.name)?;
        let socket = control_socket()?;
        // SAFETY: SIOCGIFFLAGS fills the flags of one ifreq, SIOCSIFFLAGS reads them.
        unsafe {
            check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request))?;
            request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
            check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &mut request))?;
        }
        Ok(())
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

/// A socket for the interface ioctls that do not go through the TAP's own descriptor.
fn control_socket() -> io::Result<OwnedFd> {
    // SAFETY: a fresh descriptor, owned from here on.
    unsafe {
        let fd = check(libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}
