//! Network namespaces, and the host's end of a TAP or veth.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::Command;

use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::{
    AddressFamily, MsgFlags, MultiHeaders, SockFlag, SockProtocol, SockType, bind, recv, send,
    sendmmsg, setsockopt, socket, sockopt::RcvBufForce,
};

/// Moves this thread, and its later children, into a new network namespace, which ends with them.
pub(crate) fn enter_new_namespace() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    ip("link set lo up");
}

/// Enters a new network namespace in which the kernel sends no frames itself, such as router solicitations.
pub(crate) fn enter_quiet_namespace() {
    enter_new_namespace();
    silence_kernel();
}

/// Disables IPv6 in this thread's network namespace, so that the kernel sends no frames itself.
pub(crate) fn silence_kernel() {
    std::fs::write("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1").unwrap();
}

/// Enters a new namespace with a veth: `veth0` for the daemon, `veth1` for the test.
pub(crate) fn enter_namespace_with_veth(queues: u32) {
    enter_quiet_namespace();
    make_veth(queues);
}

/// Enters a new, quiet namespace with a TAP, `tap0`.
pub(crate) fn enter_namespace_with_tap(multi_queue: bool) {
    enter_quiet_namespace();
    let several = if multi_queue { " multi_queue" } else { "" };
    ip(&format!("tuntap add dev tap0 mode tap vnet_hdr{several}"));
    ip("link set tap0 up");
}

/// Enters a new namespace with the device that `port` names, `tap0` or `veth0`. `port` is an option or a
/// line of a file. Returns the host's end of the device.
pub(crate) fn enter_namespace_for(port: &str) -> Wire {
    if port.contains("tap0") {
        enter_namespace_with_tap(false);
        Wire::open("tap0")
    } else {
        assert!(port.contains("veth0"), "{port}");
        enter_namespace_with_veth(1);
        Wire::open("veth1")
    }
}

/// Creates a veth with `queues` queues at each end.
pub(crate) fn make_veth(queues: u32) {
    let many = format!("numrxqueues {queues} numtxqueues {queues}");
    ip(&format!("link add veth0 {many} type veth peer name veth1 {many}"));
    ip("link set veth0 up");
    ip("link set veth1 up");
}

/// Runs `ip`, which must succeed.
#[track_caller]
pub(crate) fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().unwrap();
    assert!(status.success(), "ip {words}");
}

/// Waits until the kernel delivers frames to a TAP that was just opened. Before, the kernel drops them
/// silently, under load for a second.
#[track_caller]
pub(crate) fn wait_for_carrier(tap: &str) {
    super::eventually("the TAP has a carrier", || {
        output("ip", &format!("link show {tap}")).contains("state UP")
    });
}

/// Runs a command. Returns its standard output and standard error.
pub(crate) fn output(program: &str, words: &str) -> String {
    let output = Command::new(program).args(words.split(' ')).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// A packet socket on a network device, which receives the guest's frames and sends frames to the guest.
#[derive(Debug)]
pub(crate) struct Wire(OwnedFd);

/// Ethertype of the tests' frames, which no protocol of the host answers (IEEE 802.1 local experimental).
pub(crate) const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Socket option of linux/if_packet.h.
const PACKET_VNET_HDR: libc::c_int = 15;

impl Wire {
    pub(crate) fn open(device: &str) -> Self {
        Self::try_open(device).unwrap_or_else(|| panic!("there is no {device}"))
    }

    /// Opens a packet socket, if the device exists.
    pub(crate) fn try_open(device: &str) -> Option<Self> {
        let protocol = Some(SockProtocol::EthAll);
        let fd = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_NONBLOCK, protocol)
            .unwrap();
        // The default holds only 256 small frames.
        setsockopt(&fd, RcvBufForce, &(4 << 20)).unwrap();
        let address = getifaddrs()
            .unwrap()
            .filter(|interface| interface.interface_name == device)
            .find_map(|interface| interface.address?.as_link_addr().copied())?;
        bind(fd.as_raw_fd(), &address).ok()?;
        Some(Wire(fd))
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        self.try_send(frame).unwrap();
    }

    /// Sends a frame, if the device exists, is up and has room.
    pub(crate) fn try_send(&self, frame: &[u8]) -> nix::Result<()> {
        send(self.0.as_raw_fd(), frame, MsgFlags::empty()).map(|sent| assert_eq!(sent, frame.len()))
    }

    /// Puts a virtio header of 10 bytes before each sent and received frame (PACKET_VNET_HDR of packet(7)).
    #[allow(unsafe_code)]
    pub(crate) fn has_header(&self) {
        let on: libc::c_int = 1;
        let (fd, length) = (self.0.as_raw_fd(), size_of_val(&on) as u32);
        // SAFETY: the value is an int, and lives through the call.
        let result = unsafe {
            libc::setsockopt(fd, libc::SOL_PACKET, PACKET_VNET_HDR, (&raw const on).cast(), length)
        };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }

    /// Sends the frame 32 times with one system call, and ignores losses. For the benchmark.
    #[allow(dead_code)]
    pub(crate) fn flood(&self, frame: &[u8]) {
        let mut headers = MultiHeaders::<()>::preallocate(32, None);
        let slices = [[IoSlice::new(frame)]; 32];
        let _ =
            sendmmsg(self.0.as_raw_fd(), &mut headers, &slices, [None; 32], [], MsgFlags::empty());
    }

    /// Returns the next frame of the tests' ethertype that arrives within `milliseconds`.
    pub(crate) fn receive(&self, milliseconds: u16) -> Option<Vec<u8>> {
        loop {
            let frame = self.receive_any(milliseconds)?;
            if frame.get(12..14) == Some(&ETHERTYPE) {
                return Some(frame);
            }
        }
    }

    /// Returns the next frame that arrives within `milliseconds`.
    pub(crate) fn receive_any(&self, milliseconds: u16) -> Option<Vec<u8>> {
        let mut frame = vec![0; 70_000];
        loop {
            match recv(self.0.as_raw_fd(), &mut frame, MsgFlags::empty()) {
                Ok(length) => {
                    frame.truncate(length);
                    return Some(frame);
                }
                Err(nix::errno::Errno::EAGAIN) => {
                    let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
                    if poll(&mut fds, PollTimeout::from(milliseconds)).unwrap() == 0 {
                        return None;
                    }
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}
