//! Unix stream sockets, which send and receive bytes with descriptors; and packet sockets.

use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, connect, getpeername, getsockopt,
    setsockopt, socket, sockopt,
};
use nix::{getsockopt_impl, setsockopt_impl, sockopt_impl};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::check;

/// Most descriptors that one read can receive.
pub const MAX_DESCRIPTORS: usize = 32;

/// SO_PASSRIGHTS (Linux 6.16).
const SO_PASSRIGHTS: libc::c_int = 83;
sockopt_impl!(
    /// True if the socket accepts descriptors.
    PassRights, SetOnly, libc::SOL_SOCKET, SO_PASSRIGHTS, libc::c_int
);
sockopt_impl!(
    /// Address family of the socket.
    Domain, GetOnly, libc::SOL_SOCKET, libc::SO_DOMAIN, libc::c_int
);

/// Longest path of a unix socket in bytes (`sun_path` without its NUL).
pub const MAX_PATH: usize = 107;

/// Result of one read.
#[derive(Debug, Default)]
pub struct Received {
    /// Bytes read; 0 is the end of the connection.
    pub bytes: usize,
    /// Descriptors that came with the bytes.
    pub files: Vec<File>,
}

/// Reads once, and receives at most `most` descriptors. Does not block if the socket is non-blocking.
///
/// # Errors
/// `WouldBlock` if the socket is empty, or an error of the socket. Fails also if descriptors are lost: more than
/// `most` came, or the process can open no more. All descriptors of the read are then closed.
pub fn receive(socket: &UnixStream, buffer: &mut [u8], most: usize) -> io::Result<Received> {
    let mut descriptors: [RawFd; MAX_DESCRIPTORS] = [-1; MAX_DESCRIPTORS];
    let mut iovec = [libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() }];
    // SAFETY: the iovec describes `buffer`, which lives through the call and to which any bytes
    // may be written.
    let received =
        unsafe { socket.recv_with_fds(&mut iovec, &mut descriptors[..most.min(MAX_DESCRIPTORS)]) };
    let (bytes, count) = received.map_err(|error| match error.errno() {
        // The kernel has dropped descriptors (MSG_CTRUNC), and does not say why.
        libc::ENOBUFS => io::Error::other(match socket.try_clone() {
            Ok(_) => "too many descriptors with one message".to_owned(),
            Err(error) => format!("descriptors of a message are lost: {error}"),
        }),
        number => io::Error::from_raw_os_error(number),
    })?;
    // SAFETY: the kernel has just made these descriptors for this process; each gets one owner.
    let files = descriptors[..count].iter().map(|&fd| unsafe { File::from_raw_fd(fd) });
    let files: Vec<File> = files.collect();
    for file in &files {
        // The helper process, which starts later, must not inherit them.
        fcntl(file, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    Ok(Received { bytes, files })
}

/// Makes the kernel refuse descriptors on a listening socket's connections (SO_PASSRIGHTS, Linux 6.16). The sender of
/// a descriptor can decide how long closing it takes. Older kernels pass descriptors.
pub fn refuse_descriptors(listener: BorrowedFd<'_>) {
    let _ = setsockopt(&listener, PassRights, &0);
}

/// Sends as many bytes as the socket accepts, with a descriptor if there is one. Returns the number of bytes.
///
/// # Errors
/// An error of `sendmsg` or `write`.
pub fn send_some(
    mut socket: &UnixStream,
    bytes: &[u8],
    file: Option<BorrowedFd<'_>>,
) -> io::Result<usize> {
    let Some(file) = file else { return socket.write(bytes) };
    socket
        .send_with_fd(bytes, file.as_raw_fd())
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Sends all of `bytes`, and all descriptors with the first byte.
///
/// # Errors
/// An error of `sendmsg` or `write`. The first bytes may have been sent.
pub fn send_message(
    mut socket: &UnixStream,
    bytes: &[u8],
    files: &[BorrowedFd<'_>],
) -> io::Result<()> {
    if files.is_empty() {
        return socket.write_all(bytes);
    }
    let numbers: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let sent = loop {
        match socket.send_with_fds(&[bytes], &numbers) {
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(io::Error::from_raw_os_error(error.errno())),
            Ok(sent) => break sent,
        }
    };
    socket.write_all(&bytes[sent..])
}

/// Sends `files`, then all of `bytes`. Each 32 files go with one byte `carrier`.
///
/// # Errors
/// An error of `sendmsg` or `write`.
pub fn send_with_files(
    mut socket: &UnixStream,
    bytes: &[u8],
    files: &[BorrowedFd<'_>],
    carrier: u8,
) -> io::Result<()> {
    for chunk in files.chunks(MAX_DESCRIPTORS) {
        send_message(socket, &[carrier], chunk)?;
    }
    socket.write_all(bytes)
}

fn stream_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok(socket(AddressFamily::Unix, SockType::Stream, flags, None)?)
}

/// Opens a packet socket that sends whole frames on the device with index `device`, and receives none.
///
/// # Errors
/// EPERM without CAP_NET_RAW, ENODEV if the device does not exist.
pub fn packet_socket(device: u32) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    // Protocol 0 receives nothing (packet(7)).
    let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
    // SAFETY: all zeros is a valid address; the address lives through the call.
    unsafe {
        let mut address: libc::sockaddr_ll = mem::zeroed();
        address.sll_family = libc::AF_PACKET as libc::sa_family_t;
        address.sll_ifindex = device as libc::c_int;
        let length = mem::size_of_val(&address) as libc::socklen_t;
        check(libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length))?;
    }
    Ok(socket)
}

/// Connects to the socket at `path`, or fails at once. Unlike [`UnixStream::connect`], it does not wait while the
/// listener's queue is full.
///
/// # Errors
/// `WouldBlock` if the queue is full, `NotFound`, `ConnectionRefused`, or another error of `connect`.
pub fn connect_now(path: &Path) -> io::Result<UnixStream> {
    let socket = stream_socket()?;
    connect(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(socket.into())
}

/// Binds a socket to `path`; it does not listen yet. Its file has the permissions `mode`, without the umask's bits,
/// from the start.
///
/// # Errors
/// `AddrInUse` if a file exists at `path`, or another error of `bind`.
pub fn bind(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let (address, socket) = (UnixAddr::new(path)?, File::from(stream_socket()?));
    socket.set_permissions(Permissions::from_mode(mode))?;
    nix::sys::socket::bind(socket.as_raw_fd(), &address)?;
    Ok(OwnedFd::from(socket).into())
}

/// Listens, with the longest queue that the host allows (`net.core.somaxconn`). May be called again.
pub fn listen(listener: &UnixListener) -> io::Result<()> {
    Ok(nix::sys::socket::listen(listener, Backlog::MAXALLOWABLE)?)
}

/// Kind of an inherited socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inherited {
    /// A unix stream socket that listens.
    Listener,
    /// A unix stream socket with a peer.
    Connection,
}

/// Returns whether `fd` is a listening or a connected unix stream socket.
///
/// # Errors
/// `InvalidInput` for any other descriptor; the text says what it is.
pub fn classify(fd: BorrowedFd<'_>) -> io::Result<Inherited> {
    let wrong = |what: &str| {
        let name = super::process::describe(fd);
        Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name} is {what}")))
    };
    match getsockopt(&fd, Domain) {
        Err(Errno::ENOTSOCK) => return wrong("no socket"),
        Err(error) => return Err(error.into()),
        Ok(libc::AF_UNIX) => {}
        Ok(_) => return wrong("not a unix socket"),
    }
    if getsockopt(&fd, sockopt::SockType)? != SockType::Stream {
        return wrong("not a stream socket");
    }
    if getsockopt(&fd, sockopt::AcceptConn)? {
        return Ok(Inherited::Listener);
    }
    match getpeername::<UnixAddr>(fd.as_raw_fd()) {
        Ok(_) => Ok(Inherited::Connection),
        Err(_) => wrong("a socket that neither listens nor is connected"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn classify_accepts_unix_stream_sockets_only() {
        let (connected, _peer) = UnixStream::pair().unwrap();
        assert_eq!(classify(connected.as_fd()).unwrap(), Inherited::Connection);
        let (datagram, _peer) = UnixDatagram::pair().unwrap();
        assert!(classify(datagram.as_fd()).unwrap_err().to_string().contains("stream"));
        let file = File::open("/").unwrap();
        assert!(classify(file.as_fd()).unwrap_err().to_string().contains("no socket"));
    }

    #[test]
    fn received_descriptors_are_closed_on_exec() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = File::open("/").unwrap();
        send_message(&theirs, b"x", &[file.as_fd(), file.as_fd()]).unwrap();
        let received = receive(&ours, &mut [0; 16], MAX_DESCRIPTORS).unwrap();
        assert_eq!(received.files.len(), 2);
        for file in received.files {
            // SAFETY: reads a flag of a descriptor that is open.
            let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFD) };
            assert_eq!(flags, libc::FD_CLOEXEC);
        }
    }

    #[test]
    fn too_many_descriptors_fail_the_read_and_are_closed() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (mut read_end, write_end) = io::pipe().unwrap();
        let many = vec![write_end.as_raw_fd(); 200];
        theirs.send_with_fds(&[&b"x"[..]], &many).unwrap();
        drop(write_end);
        assert!(receive(&ours, &mut [0; 16], 8).is_err());
        // The end of file proves that no copy of the write end is open.
        assert_eq!(io::Read::read(&mut read_end, &mut [0]).unwrap(), 0);
    }
}
