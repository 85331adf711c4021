//! The part of `bpf(2)` that an XDP program and its maps need.
//!
//! Each value owns a descriptor. The kernel frees a program or a map when its last user has gone,
//! and detaches a link's program when the link's last descriptor is closed, however its process
//! ended.

pub mod assembly;
pub mod instructions;

use std::ffi::CStr;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::time::Duration;

use super::check;

/// Commands of `enum bpf_cmd`.
mod command {
    pub(super) const MAP_CREATE: libc::c_long = 0;
    pub(super) const MAP_LOOKUP_ELEM: libc::c_long = 1;
    pub(super) const MAP_UPDATE_ELEM: libc::c_long = 2;
    pub(super) const MAP_DELETE_ELEM: libc::c_long = 3;
    pub(super) const MAP_GET_NEXT_KEY: libc::c_long = 4;
    pub(super) const PROG_LOAD: libc::c_long = 5;
    pub(super) const PROG_TEST_RUN: libc::c_long = 10;
    pub(super) const PROG_GET_FD_BY_ID: libc::c_long = 13;
    pub(super) const MAP_GET_FD_BY_ID: libc::c_long = 14;
    pub(super) const OBJ_GET_INFO_BY_FD: libc::c_long = 15;
    pub(super) const LINK_CREATE: libc::c_long = 28;
    pub(super) const LINK_GET_FD_BY_ID: libc::c_long = 30;
    pub(super) const LINK_GET_NEXT_ID: libc::c_long = 31;
}

const PROG_TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
const LINK_TYPE_XDP: u32 = 6;
/// Longest name of a program or a map in bytes (`BPF_OBJ_NAME_LEN` less its nul).
const MAX_NAME: usize = 15;

/// Calls bpf(2); returns what it returns.
///
/// # Safety
/// `attributes` must be what the command expects, and pointers in it valid.
unsafe fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_int> {
    let size = mem::size_of::<T>() as libc::c_long;
    // SAFETY: the attributes live through the call and have the size given; the rest is the
    // caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size) };
    check(result as libc::c_int)
}

/// The same for a command that returns a descriptor.
///
/// # Safety
/// As [`bpf`].
unsafe fn bpf_open<T>(command: libc::c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise; the descriptor is fresh and has no other owner.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(command, attributes)?)) }
}

fn open_by_id(command: libc::c_long, id: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        id: u32,
        next_id: u32,
        open_flags: u32,
    }
    // SAFETY: these commands read an id and flags, and have no pointers.
    unsafe { bpf_open(command, &mut Attributes { id, next_id: 0, open_flags: 0 }) }
}

/// Fills the start of the kernel's information about an object.
fn information<T>(fd: &OwnedFd, info: &mut T) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        fd: RawFd,
        length: u32,
        info: u64,
    }
    let mut attributes = Attributes {
        fd: fd.as_raw_fd(),
        length: mem::size_of::<T>() as u32,
        info: &raw mut *info as u64,
    };
    // SAFETY: the kernel writes `length` bytes of plain numbers to `info` at the most.
    unsafe { bpf(command::OBJ_GET_INFO_BY_FD, &mut attributes)? };
    Ok(())
}

fn name_bytes(name: &str) -> [u8; MAX_NAME + 1] {
    let mut bytes = [0; MAX_NAME + 1];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    bytes
}

fn name_from(bytes: &[u8]) -> String {
    CStr::from_bytes_until_nul(bytes).map_or_else(
        |_| String::from_utf8_lossy(bytes).into_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// What a map holds, under keys from 0 on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapKind {
    /// An AF_XDP socket for each queue (`BPF_MAP_TYPE_XSKMAP`).
    Sockets,
    /// A number for each key (`BPF_MAP_TYPE_ARRAY`).
    Numbers,
    /// Some `u64` for each key and processor (`BPF_MAP_TYPE_PERCPU_ARRAY`).
    Counters(usize),
    /// A program for each key (`BPF_MAP_TYPE_PROG_ARRAY`), which it loses with the last descriptor
    /// of the map.
    Programs,
    /// Two `u64` for each key of so many bytes: those used last, if there are more than so many
    /// (`BPF_MAP_TYPE_LRU_HASH`).
    Recent(usize),
}

/// A map.
#[derive(Debug)]
pub struct Map(OwnedFd);

impl Map {
    /// Makes a map. `name` has 15 bytes at the most.
    ///
    /// # Errors
    /// EPERM without CAP_BPF.
    pub fn new(kind: MapKind, name: &str, entries: u32) -> io::Result<Self> {
        const PERCPU_ARRAY: u32 = 6;
        const XSKMAP: u32 = 17;
        const ARRAY: u32 = 2;
        const PROG_ARRAY: u32 = 3;
        #[repr(C)]
        struct Attributes {
            kind: u32,
            key_size: u32,
            value_size: u32,
            entries: u32,
            flags: u32,
            inner_map: u32,
            numa_node: u32,
            name: [u8; MAX_NAME + 1],
        }
        const LRU_HASH: u32 = 9;
        let key_size = if let MapKind::Recent(bytes) = kind { bytes as u32 } else { 4 };
        let (kind, value_size) = match kind {
            MapKind::Recent(_) => (LRU_HASH, 16),
            MapKind::Sockets => (XSKMAP, 4),
            MapKind::Numbers => (ARRAY, 4),
            MapKind::Programs => (PROG_ARRAY, 4),
            MapKind::Counters(count) => (PERCPU_ARRAY, 8 * count as u32),
        };
        let mut attributes = Attributes {
            kind,
            key_size,
            value_size,
            entries,
            flags: 0,
            inner_map: 0,
            numa_node: 0,
            name: name_bytes(name),
        };
        possible_processors()?;
        // SAFETY: MAP_CREATE reads numbers only.
        unsafe { bpf_open(command::MAP_CREATE, &mut attributes) }.map(Map)
    }

    /// Opens a map that somebody has.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN, ENOENT if there is none.
    pub fn by_id(id: u32) -> io::Result<Self> {
        possible_processors()?;
        open_by_id(command::MAP_GET_FD_BY_ID, id).map(Map)
    }

    /// Its descriptor's number, by which a program to be loaded names it.
    pub fn descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Its name, and the length in bytes of a value in it.
    pub fn name_and_size(&self) -> io::Result<(String, u32)> {
        #[repr(C)]
        #[derive(Default)]
        struct Info {
            kind: u32,
            id: u32,
            key_size: u32,
            value_size: u32,
            entries: u32,
            flags: u32,
            name: [u8; MAX_NAME + 1],
        }
        let mut info = Info::default();
        information(&self.0, &mut info)?;
        Ok((name_from(&info.name), info.value_size))
    }

    /// Asks for, or changes, what is under a key that is at `key`; a value, or the next key, is at
    /// `value`.
    ///
    /// # Safety
    /// The kernel reads and writes there as many bytes as the map was made for.
    unsafe fn at(&self, command: libc::c_long, key: u64, value: u64) -> io::Result<libc::c_int> {
        #[repr(C)]
        struct Attributes {
            map: RawFd,
            key: u64,
            value: u64,
            flags: u64,
        }
        let mut attributes = Attributes { map: self.0.as_raw_fd(), key, value, flags: 0 };
        // SAFETY: as our caller says.
        unsafe { bpf(command, &mut attributes) }
    }

    fn element(&self, command: libc::c_long, key: u32, value: u64) -> io::Result<libc::c_int> {
        // SAFETY: keys of our maps have 4 bytes; callers vouch for what `value` points to.
        unsafe { self.at(command, &raw const key as u64, value) }
    }

    /// Puts a socket under `key`: frames that the program redirects to it arrive there from now.
    pub fn set_socket(&self, key: u32, socket: &OwnedFd) -> io::Result<()> {
        let value = socket.as_raw_fd();
        self.element(command::MAP_UPDATE_ELEM, key, &raw const value as u64).map(drop)
    }

    /// Puts a number under `key`.
    pub fn set_number(&self, key: u32, value: u32) -> io::Result<()> {
        self.element(command::MAP_UPDATE_ELEM, key, &raw const value as u64).map(drop)
    }

    /// The number under `key`.
    pub fn number(&self, key: u32) -> io::Result<u32> {
        let mut value = 0u32;
        self.element(command::MAP_LOOKUP_ELEM, key, &raw mut value as u64)?;
        Ok(value)
    }

    /// Puts a program under `key`, in the stead of the one that is there.
    pub fn set_program(&self, key: u32, program: &Program) -> io::Result<()> {
        let value = program.0.as_raw_fd();
        self.element(command::MAP_UPDATE_ELEM, key, &raw const value as u64).map(drop)
    }

    /// All that a map for recent keys of `N` bytes holds. What changes meanwhile may be missed.
    pub fn recent<const N: usize>(&self, most: usize) -> io::Result<Vec<([u8; N], [u64; 2])>> {
        let call = |command, key: *const [u8; N], value: u64| {
            // SAFETY: the map was made for keys of N bytes and values of 16, says our caller; the
            // next key, or a value, is written to where `value` points, which is as long.
            unsafe { self.at(command, key as u64, value) }
        };
        let (mut found, mut last) = (Vec::new(), None::<[u8; N]>);
        while found.len() < most {
            let mut key = [0; N];
            let from = last.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
            match call(command::MAP_GET_NEXT_KEY, from, &raw mut key as u64) {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
                other => other?,
            };
            let mut value = [0u64; 2];
            // It may have gone meanwhile.
            if call(command::MAP_LOOKUP_ELEM, &raw const key, &raw mut value as u64).is_ok() {
                found.push((key, value));
            }
            last = Some(key);
        }
        Ok(found)
    }

    /// Takes away what is under `key`.
    pub fn remove(&self, key: u32) -> io::Result<()> {
        self.element(command::MAP_DELETE_ELEM, key, 0).map(drop)
    }

    /// The `N` counters under `key`, each summed over all processors. The map must have been made
    /// for `N`.
    pub fn counters<const N: usize>(&self, key: u32) -> io::Result<[u64; N]> {
        let mut values = vec![[0u64; N]; possible_processors()?];
        self.element(command::MAP_LOOKUP_ELEM, key, values.as_mut_ptr() as u64)?;
        let sum = |index: usize| values.iter().map(|value| value[index]).sum();
        Ok(std::array::from_fn(sum))
    }
}

/// For how many processors the kernel keeps values (`num_possible_cpus`): a number that does not
/// change, read once, while files may still be opened.
fn possible_processors() -> io::Result<usize> {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    if let Some(processors) = PROCESSORS.get() {
        return Ok(*processors);
    }
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text.trim().rsplit([',', '-']).next().and_then(|number| number.parse().ok());
    let processors = last
        .map(|last: usize| last + 1)
        .ok_or_else(|| io::Error::other("read the list of processors"))?;
    Ok(*PROCESSORS.get_or_init(|| processors))
}

/// A verified program.
#[derive(Debug)]
pub struct Program(OwnedFd);

/// What a program said, and how many nanoseconds it took on the average.
struct TestRun {
    verdict: u32,
    duration: u32,
}

/// What the kernel knows of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramInfo {
    /// Its name.
    pub name: String,
    /// Ids of the first maps that it uses.
    pub maps: Vec<u32>,
}

impl Program {
    /// Loads an XDP program of `instructions` (`struct bpf_insn`). `name` has 15 bytes at the most.
    ///
    /// # Errors
    /// EPERM without CAP_BPF and CAP_NET_ADMIN; EINVAL or EACCES if the verifier refuses it, with
    /// the end of what it said.
    pub fn load(name: &str, instructions: &[u64]) -> io::Result<Self> {
        #[repr(C)]
        struct Attributes {
            kind: u32,
            count: u32,
            instructions: u64,
            license: u64,
            log_level: u32,
            log_size: u32,
            log: u64,
            kernel_version: u32,
            flags: u32,
            name: [u8; MAX_NAME + 1],
        }
        let load = |log: &mut [u8]| {
            let mut attributes = Attributes {
                kind: PROG_TYPE_XDP,
                count: instructions.len() as u32,
                instructions: instructions.as_ptr() as u64,
                license: c"Dual BSD/GPL".as_ptr() as u64,
                log_level: u32::from(!log.is_empty()),
                log_size: log.len() as u32,
                log: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
                kernel_version: 0,
                flags: 0,
                name: name_bytes(name),
            };
            // SAFETY: instructions, licence and log live through the call, with the lengths given.
            unsafe { bpf_open(command::PROG_LOAD, &mut attributes) }
        };
        load(&mut []).map(Program).map_err(|error| {
            if !matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EACCES)) {
                return error;
            }
            let mut log = vec![0; 1 << 16];
            let _ = load(&mut log);
            let text = name_from(&log);
            let end: Vec<&str> = text.trim().lines().rev().take(2).collect();
            io::Error::new(error.kind(), format!("{error}: {}", end.join("; ")))
        })
    }

    /// Opens a program that somebody has loaded.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN, ENOENT if there is none.
    pub fn by_id(id: u32) -> io::Result<Self> {
        open_by_id(command::PROG_GET_FD_BY_ID, id).map(Program)
    }

    /// Runs it on `count` copies of a frame, as if they had arrived on a device's first queue, and
    /// does with them what it says: a program that says XDP_TX sends them through the device, more
    /// than a million a second (Linux 5.18). The benchmark's source of frames.
    ///
    /// # Errors
    /// EINVAL without such a device.
    pub fn run_live(&self, device: u32, frame: &[u8], count: u32) -> io::Result<()> {
        const LIVE_FRAMES: u32 = 1 << 1;
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index,
        // egress_ifindex.
        let context = [0, frame.len() as u32, 0, device, 0, 0];
        self.test_run(frame, Some(&context), count, LIVE_FRAMES).map(drop)
    }

    /// Runs it on a frame, with which nothing happens; returns what it says.
    ///
    /// # Errors
    /// EINVAL if the frame has less than 14 bytes, or more than a page.
    pub fn verdict(&self, frame: &[u8]) -> io::Result<u32> {
        self.test_run(frame, None, 1, 0).map(|run| run.verdict)
    }

    /// How long it takes for a frame, on the average of so many times.
    ///
    /// # Errors
    /// As [`verdict`](Self::verdict).
    pub fn time(&self, frame: &[u8], times: u32) -> io::Result<Duration> {
        let run = self.test_run(frame, None, times, 0)?;
        Ok(Duration::from_nanos(run.duration.into()))
    }

    fn test_run(
        &self,
        frame: &[u8],
        context: Option<&[u32; 6]>,
        repeat: u32,
        flags: u32,
    ) -> io::Result<TestRun> {
        #[repr(C)]
        #[derive(Default)]
        struct Attributes {
            program: RawFd,
            verdict: u32,
            frame_length: u32,
            output_length: u32,
            frame: u64,
            output: u64,
            repeat: u32,
            duration: u32,
            context_length: u32,
            context_output_length: u32,
            context: u64,
            context_output: u64,
            flags: u32,
            cpu: u32,
            batch: u32,
            // The kernel wants zeros behind what it knows.
            rest: u32,
        }
        let mut attributes = Attributes {
            program: self.0.as_raw_fd(),
            frame_length: frame.len() as u32,
            frame: frame.as_ptr() as u64,
            repeat,
            context_length: context.map_or(0, mem::size_of_val) as u32,
            context: context.map_or(0, |context| context.as_ptr() as u64),
            flags,
            ..Attributes::default()
        };
        // SAFETY: frame and context live through the call, with the lengths given.
        unsafe { bpf(command::PROG_TEST_RUN, &mut attributes)? };
        let Attributes { verdict, duration, .. } = attributes;
        Ok(TestRun { verdict, duration })
    }

    /// What the kernel knows of it.
    pub fn info(&self) -> io::Result<ProgramInfo> {
        #[repr(C)]
        #[derive(Default)]
        struct Info {
            kind: u32,
            id: u32,
            tag: [u8; 8],
            jited_length: u32,
            translated_length: u32,
            jited: u64,
            translated: u64,
            load_time: u64,
            user: u32,
            map_count: u32,
            maps: u64,
            name: [u8; MAX_NAME + 1],
        }
        let mut maps = [0u32; 8];
        let mut info = Info {
            map_count: maps.len() as u32,
            maps: maps.as_mut_ptr() as u64,
            ..Info::default()
        };
        information(&self.0, &mut info)?;
        let count = (info.map_count as usize).min(maps.len());
        Ok(ProgramInfo { name: name_from(&info.name), maps: maps[..count].to_vec() })
    }
}

/// How an XDP program is run (`XDP_FLAGS_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// By the device's driver, before the kernel has made a packet of the frame.
    Native,
    /// By the kernel, for devices whose driver can't.
    Generic,
}

/// A program's attachment to a device, which ends with the last descriptor of it.
#[derive(Debug)]
pub struct Link(OwnedFd);

/// What the kernel knows of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkInfo {
    /// Id of the program.
    pub program: u32,
    /// Index of the device, in the namespace where it is; 0 if the device has gone.
    pub device: u32,
}

impl Link {
    /// Attaches a program to a network device.
    ///
    /// # Errors
    /// EBUSY or EEXIST if the device has a program, EOPNOTSUPP if its driver can't run one,
    /// EINVAL if it can't with the MTU, or the number of queues, that it has.
    pub fn attach(program: &Program, device: u32, hook: Hook) -> io::Result<Self> {
        #[repr(C)]
        struct Attributes {
            program: RawFd,
            device: u32,
            attach: u32,
            flags: u32,
        }
        let flags = match hook {
            Hook::Generic => 1 << 1,
            Hook::Native => 1 << 2,
        };
        let mut attributes =
            Attributes { program: program.0.as_raw_fd(), device, attach: ATTACH_XDP, flags };
        // SAFETY: LINK_CREATE reads numbers only.
        unsafe { bpf_open(command::LINK_CREATE, &mut attributes) }.map(Link)
    }

    /// The link that attaches program `program` to an XDP hook, whoever has it.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN, ENOENT if the program was not attached by a link.
    pub fn of_program(program: u32) -> io::Result<Self> {
        #[repr(C)]
        struct Attributes {
            start: u32,
            next: u32,
            open_flags: u32,
        }
        let mut attributes = Attributes { start: 0, next: 0, open_flags: 0 };
        loop {
            // SAFETY: LINK_GET_NEXT_ID reads and writes numbers only.
            unsafe { bpf(command::LINK_GET_NEXT_ID, &mut attributes)? };
            attributes.start = attributes.next;
            let link = match open_by_id(command::LINK_GET_FD_BY_ID, attributes.next) {
                // Gone meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
                other => Link(other?),
            };
            if link.info()?.is_some_and(|info| info.program == program) {
                return Ok(link);
            }
        }
    }

    /// What the kernel knows of it, if it is one of an XDP program.
    pub fn info(&self) -> io::Result<Option<LinkInfo>> {
        #[repr(C)]
        #[derive(Default)]
        struct Info {
            kind: u32,
            id: u32,
            program: u32,
            _align: u32,
            device: u32,
            _rest: u32,
        }
        let mut info = Info::default();
        information(&self.0, &mut info)?;
        let found = LinkInfo { program: info.program, device: info.device };
        Ok((info.kind == LINK_TYPE_XDP).then_some(found))
    }
}
