//! Network devices through the ioctls of netdevice(7).
//!
//! An index identifies a device. A name does not: it can change, another device can take it, and a device can have
//! alternative names.

use std::ffi::CString;
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::{check, link};

/// Longest primary name of a network device in bytes (`IFNAMSIZ` without its NUL).
pub const MAX_NAME: usize = libc::IFNAMSIZ - 1;
/// Longest alternative name of a network device in bytes (`ALTIFNAMSIZ` without its NUL).
pub const MAX_ALTERNATIVE_NAME: usize = 127;

/// Returns an `ifreq` with the given name, and zeros in all other fields.
///
/// # Errors
/// `InvalidInput` if the name has 0 bytes, more than [`MAX_NAME`], or a NUL.
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

/// Returns the name in an `ifreq`.
pub(super) fn name_in(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0);
    String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned()
}

/// Opens an AF_INET socket for requests to network devices; the seccomp filter of workers permits no AF_UNIX socket.
pub(super) fn control_socket() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?)
}

/// Returns the index of the device with this primary or alternative name; `None` if no device has it.
///
/// # Errors
/// An error of opening a socket, or of netlink, which finds names longer than [`MAX_NAME`].
pub fn index(name: &str) -> io::Result<Option<u32>> {
    let found = if name.len() > MAX_NAME {
        link::find(name).map(|link| link.index)
    } else {
        let mut request = request(name)?;
        let socket = control_socket()?;
        // SAFETY: SIOCGIFINDEX reads the name in one ifreq, and writes its index.
        unsafe {
            check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFINDEX, &mut request))
                .map(|_| request.ifr_ifru.ifru_ifindex as u32)
        }
    };
    match found {
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        found => found.map(Some),
    }
}

/// Returns the primary name of the device with this index.
///
/// # Errors
/// ENODEV if no device has the index.
pub fn name(index: u32) -> io::Result<String> {
    Ok(name_in(&named(&control_socket()?, index)?))
}

/// Returns an `ifreq` with the primary name of the device with this index.
fn named(socket: &OwnedFd, index: u32) -> io::Result<libc::ifreq> {
    // SAFETY: ifreq is plain old data, and all zeros is a valid one. SIOCGIFNAME reads its index, and writes its
    // name.
    unsafe {
        let mut request: libc::ifreq = mem::zeroed();
        request.ifr_ifru.ifru_ifindex = index as libc::c_int;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFNAME, &mut request))?;
        Ok(request)
    }
}

/// Returns the hardware address of the device `name`, with a socket as `fd`; with a TAP's queue as `fd`, of the queue's
/// own device.
pub(super) fn hardware_address(fd: BorrowedFd<'_>, name: &str) -> io::Result<[libc::c_char; 6]> {
    let mut request = request(name)?;
    // SAFETY: SIOCGIFHWADDR reads the name in one ifreq, and writes its address.
    let data = unsafe {
        check(libc::ioctl(fd.as_raw_fd(), libc::SIOCGIFHWADDR, &mut request))?;
        request.ifr_ifru.ifru_hwaddr.sa_data
    };
    Ok([data[0], data[1], data[2], data[3], data[4], data[5]])
}

/// Returns the index of the device of a TAP's queue, whose name is `name`; `None` if the device is in another network
/// namespace.
pub(super) fn index_of_queue(queue: BorrowedFd<'_>, name: &str) -> Option<u32> {
    let socket = control_socket().ok()?;
    let here = hardware_address(socket.as_fd(), name).ok()?;
    // In this process's namespace, the name may belong to another device, which has another hardware address.
    let is_here = here == hardware_address(queue, name).ok()?;
    index(name).ok()?.filter(|_| is_here)
}

/// Returns the MTU in bytes of the device with this index.
///
/// # Errors
/// ENODEV if no device has the index.
pub fn mtu(index: u32) -> io::Result<u32> {
    let socket = control_socket()?;
    let mut request = named(&socket, index)?;
    // SAFETY: SIOCGIFMTU reads and writes one ifreq, and sets its MTU.
    unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU, &mut request))?;
        Ok(request.ifr_ifru.ifru_mtu as u32)
    }
}

/// Sets the MTU of the device `name` in bytes.
///
/// # Errors
/// ENODEV if no device has the name, EPERM without CAP_NET_ADMIN, EINVAL if the device does not support the MTU.
pub fn set_mtu(name: &str, mtu: u32) -> io::Result<()> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_mtu = mtu as libc::c_int;
    // SAFETY: SIOCSIFMTU reads one ifreq.
    unsafe {
        check(libc::ioctl(control_socket()?.as_raw_fd(), libc::SIOCSIFMTU, &mut request))?;
    }
    Ok(())
}

/// Sets the device `name` up, as `ip link set NAME up` does.
///
/// # Errors
/// ENODEV if no device has the name, EPERM without CAP_NET_ADMIN.
pub fn set_up(name: &str) -> io::Result<()> {
    let mut request = request(name)?;
    let socket = control_socket()?;
    // SAFETY: SIOCGIFFLAGS fills the flags of one ifreq, SIOCSIFFLAGS reads them.
    unsafe {
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &mut request))?;
        request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &mut request))?;
    }
    Ok(())
}
