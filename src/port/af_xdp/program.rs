//! The XDP program: it redirects the frames of each queue that has a socket, and passes all others to
//! the host, and counts these. Where the kernel copies frames to the guest, it puts the virtio header
//! before them: the daemon then does not touch the buffer, whose cache lines come from the sender's
//! processor and go to the guest's.
//!
//! A device takes one program, so all daemons with ports on one device share it: the first loads
//! and attaches it, those that follow find it there and hold on to its link. The kernel detaches
//! it when the last of them has ended, however it ended.
//!
//! Frames of a queue whose port has a filter, or counts who sends them, are seen to by a program of
//! that queue's (`code`), which the daemon that has the queue loads and puts into a map.
//!
//! It is assembled here, some sixty instructions: the loaders of the field (aya, libbpf) take an
//! ELF object, and making one takes clang or a nightly compiler.

mod code;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use log::{debug, info};

use super::{Attach, OpenError};
use crate::policy::Filter;
use crate::policy::filter::SEEN;
use crate::sys::bpf::{
    Counters, FoundMap, Hook, Link, Map, Numbers, Program, ProgramInfo, Programs, Recent, Sockets,
    btf, possible_processors,
};
use crate::sys::{ethtool, link};
use crate::traffic::MAX_ROWS;

/// The program's name, by which another daemon knows it.
pub const NAME: &str = "vhost_user_net";
/// That of a queue's own program.
const OWN_NAME: &str = "vun_queue";
const SOCKETS: &str = "vun_sockets";
const COUNTERS: &str = "vun_counters";
const QUEUE_SETTINGS: &str = "vun_queues";
const PROGRAMS: &str = "vun_programs";
const PEERS: &str = "vun_peers";
/// Of a queue's settings: length in bytes of the virtio header before each frame.
const HEADER_LENGTH: u32 = 0xffff;
/// Frames are seen to by a program of the queue's own.
const OWN_PROGRAM: u32 = 1 << 16;
/// Of the first queue's settings: the device's program puts VLAN tags back into frames.
const RESTORES_TAGS: u32 = 1 << 17;
/// Numbers that are counted for a queue.
const COUNTED: usize = 4;
/// Queues of a device at the most that can have a socket.
const QUEUES: u32 = 1024;
/// Attempts to attach, or to find who was faster.
const ATTEMPTS: usize = 5;

/// What the program has counted on one queue, on behalf of all that used it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Frames passed to the host, since the queue had no socket.
    pub passed: u64,
    /// Bytes of those.
    pub passed_bytes: u64,
    /// Frames that the filter of the queue's port denied.
    pub filtered: u64,
    /// Bytes of those.
    pub filtered_bytes: u64,
}

impl fmt::Display for QueueCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} frames, {} bytes passed to the host", self.passed, self.passed_bytes)?;
        if self.filtered > 0 {
            let QueueCounters { filtered, filtered_bytes, .. } = self;
            write!(f, ", {filtered} frames, {filtered_bytes} bytes dropped by its filter")?;
        }
        Ok(())
    }
}

/// The program, attached to a device for as long as somebody holds it.
#[derive(Debug)]
pub struct Attachment {
    link: Link,
    maps: Maps,
    device: u32,
    /// Whether it puts VLAN tags back that the kernel, or the driver, keeps beside frames.
    pub restores_tags: bool,
}

/// What a port wants done with frames for its queues.
#[derive(Debug, Clone, Copy)]
pub struct QueueProgram<'a> {
    /// What they are judged by.
    pub filter: &'a Filter,
    /// Where those that pass are counted by who sends them.
    pub peers: Option<&'a Peers>,
}

/// Frames and bytes by what the filter has seen of a frame: protocol and sender.
pub type Peers = Map<Recent<SEEN>>;

/// A map for [`QueueProgram::peers`].
///
/// # Errors
/// EPERM without CAP_BPF.
pub fn peers() -> io::Result<Peers> {
    Map::new(PEERS, MAX_ROWS as u32)
}

/// What the program and those who use it share, by queue.
#[derive(Debug)]
struct Maps {
    sockets: Map<Sockets>,
    counters: Map<Counters<COUNTED>>,
    /// What is done with a frame: [`HEADER_LENGTH`], [`OWN_PROGRAM`].
    queues: Map<Numbers>,
    /// The queues' own programs.
    programs: Map<Programs>,
}

impl Maps {
    fn new() -> io::Result<Self> {
        Ok(Maps {
            sockets: Map::new(SOCKETS, QUEUES)?,
            counters: Map::new(COUNTERS, QUEUES)?,
            queues: Map::new(QUEUE_SETTINGS, QUEUES)?,
            programs: Map::new(PROGRAMS, QUEUES)?,
        })
    }

    /// Those of a program that is loaded; nothing if it has others.
    fn of(info: &ProgramInfo) -> io::Result<Option<Self>> {
        let maps =
            info.maps.iter().map(|id| FoundMap::by_id(*id)).collect::<io::Result<Vec<_>>>()?;
        let mut named: HashMap<String, FoundMap> =
            maps.into_iter().map(|map| (map.name(), map)).collect();
        Ok((|| {
            Some(Maps {
                sockets: named.remove(SOCKETS)?.into_map(QUEUES)?,
                counters: named.remove(COUNTERS)?.into_map(QUEUES)?,
                queues: named.remove(QUEUE_SETTINGS)?.into_map(QUEUES)?,
                programs: named.remove(PROGRAMS)?.into_map(QUEUES)?,
            })
        })())
    }
}

impl Attachment {
    /// Attaches the program to the device `name`, or joins those who did: without rights of ours if
    /// that was this process.
    ///
    /// # Errors
    /// The device has a foreign program, its driver can't run one, or we may not attach one.
    pub fn new(name: &str, device: u32, attach: Attach) -> Result<Arc<Self>, OpenError> {
        static HELD: Mutex<Vec<Weak<Attachment>>> = Mutex::new(Vec::new());
        let mut held = HELD.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|attachment| attachment.strong_count() > 0);
        let ours = held.iter().filter_map(Weak::upgrade);
        if let Some(ours) = ours.into_iter().find(|attachment| attachment.is_on(device)) {
            return Ok(ours);
        }
        let attachment = Arc::new(Self::attach_or_join(name, device, attach)?);
        held.push(Arc::downgrade(&attachment));
        Ok(attachment)
    }

    fn attach_or_join(name: &str, device: u32, attach: Attach) -> Result<Self, OpenError> {
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
        let maps = Maps::new()?;
        let restoring = match attach {
            Attach::Generic => None,
            Attach::Auto | Attach::Native => load_restoring(&maps, device),
        };
        let plain = Program::load(NAME, &code::assemble(&maps, None, None))?;
        let native = restoring.iter().map(|program| (program, Hook::Native, true));
        let native = native.chain([(&plain, Hook::Native, false)]);
        let generic = [(&plain, Hook::Generic, false)];
        let attempts: Vec<_> = match attach {
            Attach::Auto => native.chain(generic).collect(),
            Attach::Native => native.collect(),
            Attach::Generic => generic.into(),
        };
        let mut last = None;
        for (program, hook, restores_tags) in attempts {
            match Link::attach(program, device, hook) {
                Ok(link) => {
                    let why = match &last {
                        Some(error) if hook == Hook::Generic => {
                            format!(", since its driver refused it: {error}")
                        }
                        _ => String::new(),
                    };
                    info!("af_xdp {name}: XDP program attached, {hook}{why}");
                    if restores_tags {
                        maps.queues.set_number(0, maps.queues.number(0)? | RESTORES_TAGS)?;
                    }
                    return Ok(Attachment { link, maps, device, restores_tags });
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
        let Some(maps) = Maps::of(&info)? else { return Err(foreign()) };
        let link = Link::of_program(id)?;
        let restores_tags = maps.queues.number(0)? & RESTORES_TAGS != 0;
        Ok(Attachment { link, maps, device, restores_tags })
    }

    /// Whether it is still attached to the device of that index.
    pub fn is_on(&self, device: u32) -> bool {
        let attached = self.link.info().ok().flatten().map(|info| info.device);
        self.device == device && attached == Some(device)
    }

    /// Has frames of a queue redirected to the socket, with a virtio header of so many bytes
    /// before each (10 or 12; 0: none).
    pub fn redirect(&self, queue: u32, socket: &OwnedFd, header: u32) -> io::Result<()> {
        let settings = self.maps.queues.number(queue)? & !HEADER_LENGTH;
        self.maps.queues.set_number(queue, settings | header)?;
        self.maps.sockets.set_socket(queue, socket)
    }

    /// Has frames of a queue passed to the host again.
    pub fn pass(&self, queue: u32) -> io::Result<()> {
        self.maps.sockets.remove(queue)
    }

    /// Has frames for the sockets of these queues judged, and counted, so from now on.
    ///
    /// # Errors
    /// Those of loading a program; frames are judged as before then.
    pub fn load_queue_program(
        &self,
        mut queues: Range<u32>,
        own: &QueueProgram<'_>,
    ) -> io::Result<()> {
        let Maps { queues: settings, programs, .. } = &self.maps;
        if own.filter.is_none() && own.peers.is_none() {
            // A program that was there stays, for frames that are just on their way to it.
            return queues.try_for_each(|queue| {
                settings.set_number(queue, settings.number(queue)? & !OWN_PROGRAM)
            });
        }
        let program = Program::load(OWN_NAME, &code::assemble(&self.maps, Some(own), None))?;
        queues.try_for_each(|queue| {
            programs.set_program(queue, &program)?;
            settings.set_number(queue, settings.number(queue)? | OWN_PROGRAM)
        })
    }

    /// What the program has counted on a queue.
    pub fn counters(&self, queue: u32) -> io::Result<QueueCounters> {
        let [passed, passed_bytes, filtered, filtered_bytes] =
            self.maps.counters.counters(queue)?;
        Ok(QueueCounters { passed, passed_bytes, filtered, filtered_bytes })
    }
}

/// Reads what a port's start reads of files, while they may still be opened; it is read once.
pub fn read_kernel_files() {
    // What cannot be read now is missed by whoever needs it.
    let _ = possible_processors();
    tag_function();
}

/// The kernel's function that tells an XDP program of a frame's VLAN tag (Linux 6.8).
fn tag_function() -> Option<i32> {
    static NUMBER: OnceLock<Option<i32>> = OnceLock::new();
    *NUMBER.get_or_init(|| btf::function("bpf_xdp_metadata_rx_vlan_tag"))
}

/// The device's program with VLAN tags put back; nothing where the driver does not tell of them, or
/// the kernel does not load it.
fn load_restoring(maps: &Maps, device: u32) -> Option<Program> {
    let function = tag_function().filter(|_| ethtool::tells_vlan_tags(device).unwrap_or(false))?;
    let program = Program::load_for(NAME, &code::assemble(maps, None, Some(function)), device);
    program.inspect_err(|error| debug!("VLAN tags are not put back: {error}")).ok()
}

/// Whether VLAN tags that are beside frames can be put back on a device, where the program runs in
/// its driver.
///
/// # Errors
/// EPERM without CAP_BPF and CAP_NET_ADMIN.
pub fn can_restore_tags(device: u32) -> io::Result<bool> {
    Ok(load_restoring(&Maps::new()?, device).is_some())
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
