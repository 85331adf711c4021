//! The XDP program. It redirects frames of each queue that has a socket, and passes and counts all others.
//!
//! In copy mode the program also writes the virtio-net header before each frame. The daemon then does not
//! access the buffer, whose cache lines move from the sender's CPU to the guest's.
//!
//! A device runs one program, so all daemons with ports on a device share it. The first daemon loads and
//! attaches the program; later ones open its link. The kernel detaches the program after the last of these
//! daemons has ended, even by a crash.
//!
//! If a port has a filter or counts peers, its queues have a program of their own, the queue program
//! (`code`). The port's daemon loads it and puts it into a map.
//!
//! The daemon assembles the programs, some sixty instructions each: aya and libbpf take ELF objects, which
//! take clang or a nightly compiler to make.

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
    btf, possible_cpus,
};
use crate::sys::{ethtool, link};
use crate::traffic::MAX_ROWS;

/// Name of the device's program, by which other daemons recognise it.
pub const NAME: &str = "vhost_user_net";
/// Name of a queue program.
const QUEUE_PROGRAM_NAME: &str = "vun_queue";
const SOCKETS: &str = "vun_sockets";
const COUNTERS: &str = "vun_counters";
const QUEUE_SETTINGS: &str = "vun_queues";
const PROGRAMS: &str = "vun_programs";
const PEERS: &str = "vun_peers";
/// Mask of a queue's settings: length in bytes of the virtio-net header before each frame.
const HEADER_LENGTH: u32 = 0xffff;
/// Bit of a queue's settings: the queue has a queue program.
const HAS_QUEUE_PROGRAM: u32 = 1 << 16;
/// Bit of the first queue's settings: the device's program restores VLAN tags.
const RESTORES_TAGS: u32 = 1 << 17;
/// Number of counters of a queue.
const COUNTED: usize = 4;
/// Number of queues of a device that can have a socket: the first ones.
const QUEUES: u32 = 1024;
/// Most attempts to attach the program, or to join another daemon's.
const ATTEMPTS: usize = 5;

/// The program's counters of one queue, since the program was attached, on behalf of all daemons.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Frames passed to the host, because the queue had no socket.
    pub passed: u64,
    /// Bytes of the passed frames.
    pub passed_bytes: u64,
    /// Frames that the filter of the queue's port denied.
    pub filtered: u64,
    /// Bytes of the denied frames.
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

/// The device's program, attached while any daemon has the link open.
#[derive(Debug)]
pub struct Attachment {
    link: Link,
    maps: Maps,
    device: u32,
    /// The program restores VLAN tags that the kernel or the driver keeps beside frames.
    pub restores_tags: bool,
}

/// Content of a port's queue program.
#[derive(Debug, Clone, Copy)]
pub struct QueueProgram<'a> {
    /// Filter that each frame must pass.
    pub filter: &'a Filter,
    /// Map in which the program counts passing frames by sender.
    pub peers: Option<&'a Peers>,
}

/// Numbers of frames and bytes by protocol and sender, as the filter has parsed them.
pub type Peers = Map<Recent<SEEN>>;

/// Creates a map for [`QueueProgram::peers`].
///
/// # Errors
/// EPERM without CAP_BPF.
pub fn peers() -> io::Result<Peers> {
    Map::new(PEERS, MAX_ROWS as u32)
}

/// Maps that the device's program and the daemons share, indexed by queue.
#[derive(Debug)]
struct Maps {
    sockets: Map<Sockets>,
    counters: Map<Counters<COUNTED>>,
    /// Settings: [`HEADER_LENGTH`], [`HAS_QUEUE_PROGRAM`], [`RESTORES_TAGS`].
    queues: Map<Numbers>,
    /// Queue programs.
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

    /// Opens the maps of a loaded program. Returns `None` if a map is missing or of another size.
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
    /// Attaches the program to the device `name`, or joins the attached one. If this process has attached it,
    /// joining takes no capabilities.
    ///
    /// # Errors
    /// The device has a foreign program, its driver cannot run one, or a capability is missing.
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
                    // The program was detached in between.
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
            "cannot attach an XDP program to {name}: another process keeps attaching and detaching its own; \
             stop that process"
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

    /// Opens the link of the attached program, if another of our daemons has loaded it.
    ///
    /// # Errors
    /// ENOENT if the program is gone; `InvalidInput`, with its name, if it is foreign.
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

    /// Returns true if the program is still attached to the device with index `device`.
    pub fn is_on(&self, device: u32) -> bool {
        let attached = self.link.info().ok().flatten().map(|info| info.device);
        self.device == device && attached == Some(device)
    }

    /// Redirects frames of a queue to the socket, with a virtio-net header of `header` bytes before each
    /// frame: 10 or 12, or 0 for none.
    pub fn redirect(&self, queue: u32, socket: &OwnedFd, header: u32) -> io::Result<()> {
        let settings = self.maps.queues.number(queue)? & !HEADER_LENGTH;
        self.maps.queues.set_number(queue, settings | header)?;
        self.maps.sockets.set_socket(queue, socket)
    }

    /// Removes a queue's socket: the program passes the queue's frames to the host again.
    pub fn pass(&self, queue: u32) -> io::Result<()> {
        self.maps.sockets.remove(queue)
    }

    /// Loads a queue program and sets it for these queues. Without filter and peers it removes theirs.
    ///
    /// # Errors
    /// Those of loading a program; the old program then stays in force.
    pub fn load_queue_program(
        &self,
        mut queues: Range<u32>,
        queue_program: &QueueProgram<'_>,
    ) -> io::Result<()> {
        let Maps { queues: settings, programs, .. } = &self.maps;
        if queue_program.filter.is_none() && queue_program.peers.is_none() {
            // The old program stays in the map, for frames that are between the two programs.
            return queues.try_for_each(|queue| {
                settings.set_number(queue, settings.number(queue)? & !HAS_QUEUE_PROGRAM)
            });
        }
        let program = Program::load(
            QUEUE_PROGRAM_NAME,
            &code::assemble(&self.maps, Some(queue_program), None),
        )?;
        queues.try_for_each(|queue| {
            programs.set_program(queue, &program)?;
            settings.set_number(queue, settings.number(queue)? | HAS_QUEUE_PROGRAM)
        })
    }

    /// Reads the counters of a queue.
    pub fn counters(&self, queue: u32) -> io::Result<QueueCounters> {
        let [passed, passed_bytes, filtered, filtered_bytes] =
            self.maps.counters.counters(queue)?;
        Ok(QueueCounters { passed, passed_bytes, filtered, filtered_bytes })
    }
}

/// Reads and keeps the files that a port's start needs, before the sandbox forbids opening them.
pub fn read_kernel_files() {
    // An error now is an error again at the port's start.
    let _ = possible_cpus();
    tag_function();
}

/// Returns the number of the kernel's function that gives a frame's VLAN tag to an XDP program (Linux 6.8).
fn tag_function() -> Option<i32> {
    static NUMBER: OnceLock<Option<i32>> = OnceLock::new();
    *NUMBER.get_or_init(|| btf::function("bpf_xdp_metadata_rx_vlan_tag"))
}

/// Loads the device's program with VLAN tag restoration. Returns `None` if the driver does not report tags,
/// or the kernel refuses the program.
fn load_restoring(maps: &Maps, device: u32) -> Option<Program> {
    let function = tag_function().filter(|_| ethtool::tells_vlan_tags(device).unwrap_or(false))?;
    let program = Program::load_for(NAME, &code::assemble(maps, None, Some(function)), device);
    program.inspect_err(|error| debug!("VLAN tags are not restored: {error}")).ok()
}

/// Returns true if a program in the device's driver can restore VLAN tags that are beside frames.
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

/// Returns the message for an attached program that could not be joined.
fn foreign(name: &str, id: u32, error: &io::Error) -> OpenError {
    OpenError(match error.kind() {
        io::ErrorKind::InvalidInput => format!(
            "{name} has another XDP program, '{error}' (id {id}): stop the process that uses it, or \
             detach it with 'ip link set dev {name} xdp off' or 'bpftool net detach xdp dev {name}'"
        ),
        io::ErrorKind::PermissionDenied => format!(
            "cannot share the XDP program (id {id}) of {name} with another daemon: it takes \
             CAP_SYS_ADMIN; run with that capability, or run one daemon for each device"
        ),
        _ => format!("cannot share the XDP program (id {id}) of {name}: {error}; try again"),
    })
}

/// Returns the message for a program that could not be attached, with the fix.
fn failed(name: &str, error: &io::Error) -> OpenError {
    let hint = match error.raw_os_error() {
        Some(libc::EPERM) => "; run with CAP_NET_ADMIN and CAP_BPF",
        Some(libc::EOPNOTSUPP) => "; the driver has no XDP: use attach=generic",
        Some(libc::EINVAL | libc::ERANGE) => {
            "; see the kernel's log: drivers refuse XDP with a large MTU, with offloads such as \
             LRO, or with too few queues; attach=generic works with every driver"
        }
        Some(libc::ENODEV) => "; the device does not exist",
        _ => "",
    };
    OpenError(format!("cannot attach an XDP program to {name}: {error}{hint}"))
}
