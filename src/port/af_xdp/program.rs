//! The XDP program: it redirects the frames of each queue that has a socket, passes all others to
//! the host, and counts both. Where the kernel copies frames to the guest, it puts the virtio header
//! before them: the daemon then does not touch the buffer, whose cache lines come from the sender's
//! processor and go to the guest's.
//!
//! A device takes one program, so all daemons with ports on one device share it: the first loads
//! and attaches it, those that follow find it there and hold on to its link. The kernel detaches
//! it when the last of them has ended, however it ended.
//!
//! It is assembled here, some fifty instructions: the loaders of the field (aya, libbpf) take an
//! ELF object, and making one takes clang or a nightly compiler.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use log::info;

use super::OpenError;
use crate::config::Attach;
use crate::sys::bpf::instructions::{
    add, add_register, call, copy, exit, if_equal, if_greater, if_not_equal, instruction, jump,
    load32, load64, put16, put32, put64, set, store32, store64, subtract_register,
};
use crate::sys::bpf::{Hook, Link, Map, MapKind, Program};
use crate::sys::link;

/// The program's name, by which another daemon knows it.
const NAME: &str = "vhost_user_net";
const SOCKETS: &str = "vun_sockets";
const COUNTERS: &str = "vun_counters";
const HEADERS: &str = "vun_headers";
/// Queues of a device at the most that can have a socket.
const QUEUES: u32 = 1024;
/// Attempts to attach, or to find who was faster.
const ATTEMPTS: usize = 5;

/// What the program has counted on one queue, on behalf of all that used it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Frames redirected to the queue's socket.
    pub redirected: u64,
    /// Bytes of those.
    pub redirected_bytes: u64,
    /// Frames passed to the host, since the queue had no socket.
    pub passed: u64,
    /// Bytes of those.
    pub passed_bytes: u64,
}

impl fmt::Display for QueueCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} frames, {} bytes redirected, {} frames, {} bytes passed to the host",
            self.redirected, self.redirected_bytes, self.passed, self.passed_bytes
        )
    }
}

/// The program, attached to a device for as long as somebody holds it.
#[derive(Debug)]
pub struct Attachment {
    link: Link,
    sockets: Map,
    counters: Map,
    headers: Map,
    device: u32,
}

impl Attachment {
    /// Attaches the program to the device `name`, or joins those who did.
    ///
    /// # Errors
    /// The device has a foreign program, its driver can't run one, or we may not attach one.
    pub fn new(name: &str, device: u32, attach: Attach) -> Result<Self, OpenError> {
        for _ in 0..ATTEMPTS {
            if let Some(program) = link::at(device).map_err(|e| failed(name, &e))?.program {
                match Self::join(device, program) {
                    Ok(attachment) => return Ok(attachment),
                    // It was detached meanwhile.
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
                    Err(error) => return Err(foreign(name, program, &error)),
                }
            }
            match Self::load(name, device, attach) {
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST)) => {}
                Ok(attachment) => return Ok(attachment),
                Err(error) => return Err(failed(name, &error)),
            }
        }
        Err(OpenError(format!(
            "attach an XDP program to {name}: others attach and detach theirs all the time"
        )))
    }

    fn load(name: &str, device: u32, attach: Attach) -> io::Result<Self> {
        let sockets = Map::new(MapKind::Sockets, SOCKETS, QUEUES)?;
        let counters = Map::new(MapKind::Counters(4), COUNTERS, QUEUES)?;
        let headers = Map::new(MapKind::Numbers, HEADERS, QUEUES)?;
        let program = Program::load(NAME, &assemble(&sockets, &counters, &headers))?;
        let hooks: &[Hook] = match attach {
            Attach::Auto => &[Hook::Native, Hook::Generic],
            Attach::Native => &[Hook::Native],
            Attach::Generic => &[Hook::Generic],
        };
        let mut last = None;
        for hook in hooks {
            match Link::attach(&program, device, *hook) {
                Ok(link) => {
                    let why = match &last {
                        Some(error) => format!(", since its driver refused it: {error}"),
                        None => String::new(),
                    };
                    info!("af_xdp {name}: XDP program attached, {hook}{why}");
                    return Ok(Attachment { link, sockets, counters, headers, device });
                }
                Err(error) => last = Some(error),
            }
        }
        Err(last.expect("there is a hook to try"))
    }

    /// Holds on to the program that is attached already, if it is one of ours.
    ///
    /// # Errors
    /// ENOENT if it has gone; `InvalidInput`, with its name, if it is foreign.
    fn join(device: u32, id: u32) -> io::Result<Self> {
        let info = Program::by_id(id)?.info()?;
        let foreign = || io::Error::new(io::ErrorKind::InvalidInput, info.name.clone());
        if info.name != NAME {
            return Err(foreign());
        }
        let maps = info.maps.iter().map(|id| Map::by_id(*id)).collect::<io::Result<Vec<_>>>()?;
        let (mut sockets, mut counters, mut headers) = (None, None, None);
        for map in maps {
            match map.name()?.as_str() {
                SOCKETS => sockets = Some(map),
                COUNTERS => counters = Some(map),
                HEADERS => headers = Some(map),
                _ => {}
            }
        }
        let (Some(sockets), Some(counters), Some(headers)) = (sockets, counters, headers) else {
            return Err(foreign());
        };
        let link = Link::of_program(id)?;
        Ok(Attachment { link, sockets, counters, headers, device })
    }

    /// Whether it is still attached to the device of that index.
    pub fn is_on(&self, device: u32) -> bool {
        let attached = self.link.info().ok().flatten().map(|info| info.device);
        self.device == device && attached == Some(device)
    }

    /// Has frames of a queue redirected to the socket, with a virtio header of so many bytes
    /// before each (10 or 12; 0: none).
    pub fn redirect(&self, queue: u32, socket: &OwnedFd, header: u32) -> io::Result<()> {
        self.headers.set_number(queue, header)?;
        self.sockets.set_socket(queue, socket)
    }

    /// Has frames of a queue passed to the host again.
    pub fn pass(&self, queue: u32) -> io::Result<()> {
        self.sockets.remove(queue)
    }

    /// What the program has counted on a queue.
    pub fn counters(&self, queue: u32) -> io::Result<QueueCounters> {
        let [redirected, redirected_bytes, passed, passed_bytes] = self.counters.counters(queue)?;
        Ok(QueueCounters { redirected, redirected_bytes, passed, passed_bytes })
    }
}

impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Hook::Native => "native",
            Hook::Generic => "generic",
        })
    }
}

fn foreign(name: &str, id: u32, error: &io::Error) -> OpenError {
    OpenError(match error.kind() {
        io::ErrorKind::InvalidInput => format!(
            "{name} has another XDP program, '{error}' (id {id}): stop whoever uses it, or detach \
             it with 'ip link set dev {name} xdp off' or 'bpftool net detach xdp dev {name}'"
        ),
        io::ErrorKind::PermissionDenied => format!(
            "{name} has an XDP program (id {id}), and to share it with another daemon takes \
             CAP_SYS_ADMIN"
        ),
        _ => format!("share the XDP program (id {id}) of {name}: {error}"),
    })
}

fn failed(name: &str, error: &io::Error) -> OpenError {
    let hint = match error.raw_os_error() {
        Some(libc::EPERM) => "; run with CAP_NET_ADMIN and CAP_BPF",
        Some(libc::EOPNOTSUPP) => "; its driver has no XDP: use attach=generic",
        Some(libc::EINVAL | libc::ERANGE) => {
            "; see the kernel's log: drivers refuse XDP with a large MTU, with offloads such as \
             LRO, or with too few queues. attach=generic works with all"
        }
        Some(libc::ENODEV) => "; there is no such device",
        _ => "",
    };
    OpenError(format!("attach an XDP program to {name}: {error}{hint}"))
}

/// Assembles the program (`Documentation/bpf/standardization/instruction-set.rst`).
fn assemble(sockets: &Map, counters: &Map, headers: &Map) -> Vec<u64> {
    // Helpers of linux/bpf.h.
    const MAP_LOOKUP_ELEM: i32 = 1;
    const XDP_ADJUST_HEAD: i32 = 44;
    const REDIRECT_MAP: i32 = 51;
    const XDP_GET_BUFF_LEN: i32 = 188;
    // Verdicts of `enum xdp_action`.
    const DROP: i32 = 1;
    const PASS: i32 = 2;
    const REDIRECT: i32 = 4;
    /// Where `struct xdp_md` has the queue's number.
    const RX_QUEUE_INDEX: i16 = 16;

    let map = |target, map: &Map| {
        // BPF_PSEUDO_MAP_FD
        [instruction(0x18, target, 1, 0, map.descriptor()), 0]
    };

    let mut program = vec![
        copy(9, 1), // r9: the frame
        load32(6, 1, RX_QUEUE_INDEX),
        call(XDP_GET_BUFF_LEN),
        copy(7, 0), // r7: the frame's length
    ];
    program.extend(map(1, sockets));
    program.extend([
        copy(2, 6),
        set(3, PASS), // what to do if the queue has no socket
        call(REDIRECT_MAP),
        copy(8, 0), // r8: the verdict
        store32(10, 6, -4),
    ]);
    program.extend(map(1, counters));
    program.extend([
        copy(2, 10),
        add(2, -4),
        call(MAP_LOOKUP_ELEM),
        if_equal(0, 0, 8), // a queue beyond the map: do not count
        if_equal(8, REDIRECT, 1),
        add(0, 16), // the second pair of counters
        load64(1, 0, 0),
        add(1, 1),
        store64(0, 1, 0),
        load64(1, 0, 8),
        add_register(1, 7),
        store64(0, 1, 8),
        if_not_equal(8, REDIRECT, 23),
    ]);
    program.extend(map(1, headers));
    program.extend([
        copy(2, 10),
        add(2, -4),
        call(MAP_LOOKUP_ELEM),
        if_equal(0, 0, 17),
        load32(7, 0, 0), // r7: length of the header
        if_equal(7, 0, 15),
        copy(1, 9),
        set(2, 0),
        subtract_register(2, 7),
        call(XDP_ADJUST_HEAD),
        if_not_equal(0, 0, 12), // no room
        load32(1, 9, 0),        // data
        load32(2, 9, 4),        // data_end
        copy(3, 1),
        add(3, 12),
        if_greater(3, 2, 7),
        put64(1, 0, 0),
        if_equal(7, 12, 2),
        put16(1, 8, 0), // ten bytes
        jump(1),
        put32(1, 8, 1 << 16), // in one buffer
        copy(0, 8),
        exit(),
        set(0, DROP),
        exit(),
    ]);
    program
}
