//! The part of `bpf(2)` that an XDP program and its maps need.
//!
//! Each value owns a descriptor. The kernel frees a program or a map when its last user has gone,
//! and detaches a link's program when the link's last descriptor is closed, however its process
//! ended.

pub mod assembly;
pub mod btf;
pub mod instructions;

use std::ffi::CStr;
use std::io;
use std::marker::PhantomData;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::time::Duration;

use super::{Plain, check, zeros};

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
///
/// # Safety
/// `info` must be integers, as the kernel has them, and pointers in it valid for the lengths in it.
unsafe fn information<T>(fd: &OwnedFd, info: &mut T) -> io::Result<()> {
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
    // SAFETY: the kernel writes `length` bytes to `info` at the most; the rest is the caller's promise.
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

/// What a map holds, and how the kernel keeps it. Only the kinds of this module are.
pub trait MapKind: private::Layout {}

impl<K: private::Layout> MapKind for K {}

mod private {
    use super::Plain;

    /// What the kernel must say of a map for it to be of a kind.
    pub trait Layout {
        /// `BPF_MAP_TYPE_*`.
        const TYPE: u32;
        type Key: Plain;
        /// A value, of each processor where there are several.
        type Value: Plain;
    }

    /// A kind whose maps have one value for each key, not one of each processor.
    pub trait Single: Layout {}
}

use private::{Layout, Single};

/// An AF_XDP socket for each key (`BPF_MAP_TYPE_XSKMAP`).
#[derive(Debug)]
pub enum Sockets {}

impl Layout for Sockets {
    const TYPE: u32 = 17;
    type Key = u32;
    type Value = u32;
}

/// A number for each key (`BPF_MAP_TYPE_ARRAY`).
#[derive(Debug)]
pub enum Numbers {}

impl Layout for Numbers {
    const TYPE: u32 = 2;
    type Key = u32;
    type Value = u32;
}

/// A program for each key (`BPF_MAP_TYPE_PROG_ARRAY`), which it loses with the last descriptor of the
/// map.
#[derive(Debug)]
pub enum Programs {}

impl Layout for Programs {
    const TYPE: u32 = 3;
    type Key = u32;
    type Value = u32;
}

/// `N` counters for each key and processor (`BPF_MAP_TYPE_PERCPU_ARRAY`).
#[derive(Debug)]
pub enum Counters<const N: usize> {}

impl<const N: usize> Layout for Counters<N> {
    const TYPE: u32 = 6;
    type Key = u32;
    type Value = [u64; N];
}

/// Two `u64` for each key of `N` bytes: those used last, if there are more than the map's entries
/// (`BPF_MAP_TYPE_LRU_HASH`).
#[derive(Debug)]
pub enum Recent<const N: usize> {}

impl<const N: usize> Layout for Recent<N> {
    const TYPE: u32 = 9;
    type Key = [u8; N];
    type Value = [u64; 2];
}

impl Single for Sockets {}
impl Single for Numbers {}
impl Single for Programs {}
impl<const N: usize> Single for Recent<N> {}

/// What the kernel knows of a map: the start of `struct bpf_map_info`.
#[repr(C)]
#[derive(Debug, Default)]
struct MapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    entries: u32,
    flags: u32,
    name: [u8; MAX_NAME + 1],
}

/// A map that somebody has made, of a kind that is not known yet.
#[derive(Debug)]
pub struct FoundMap {
    fd: OwnedFd,
    info: MapInfo,
}

impl FoundMap {
    /// Opens the map.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN, ENOENT if there is none.
    pub fn by_id(id: u32) -> io::Result<Self> {
        possible_processors()?;
        FoundMap::of(open_by_id(command::MAP_GET_FD_BY_ID, id)?)
    }

    fn of(fd: OwnedFd) -> io::Result<Self> {
        let mut info = MapInfo::default();
        // SAFETY: all fields are integers, and none of them is a pointer.
        unsafe { information(&fd, &mut info)? };
        Ok(FoundMap { fd, info })
    }

    /// Name that the map was made with.
    pub fn name(&self) -> String {
        name_from(&self.info.name)
    }

    /// The map, if it is of kind `K` and was made for so many entries.
    pub fn into_map<K: MapKind>(self, entries: u32) -> Option<Map<K>> {
        let MapInfo { kind, key_size, value_size, entries: made_for, .. } = self.info;
        let sizes = (mem::size_of::<K::Key>() as u32, mem::size_of::<K::Value>() as u32);
        (kind == K::TYPE && (key_size, value_size) == sizes && made_for == entries)
            .then_some(Map { fd: self.fd, kind: PhantomData })
    }
}

/// A map of kind `K`: the kernel's keys and values are as long as those of `K`.
///
/// ```compile_fail,E0599
/// # use vhost_user_net::sys::bpf::{Map, Recent};
/// // Two numbers are kept for each key, not counters of each processor.
/// fn counters(map: &Map<Recent<16>>) -> std::io::Result<[u64; 4]> {
///     map.counters(0)
/// }
/// ```
#[derive(Debug)]
pub struct Map<K> {
    fd: OwnedFd,
    kind: PhantomData<fn() -> K>,
}

impl<K: MapKind> Map<K> {
    /// Makes a map. `name` has 15 bytes at the most.
    ///
    /// # Errors
    /// EPERM without CAP_BPF.
    pub fn new(name: &str, entries: u32) -> io::Result<Self> {
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
        let mut attributes = Attributes {
            kind: K::TYPE,
            key_size: mem::size_of::<K::Key>() as u32,
            value_size: mem::size_of::<K::Value>() as u32,
            entries,
            flags: 0,
            inner_map: 0,
            numa_node: 0,
            name: name_bytes(name),
        };
        possible_processors()?;
        // SAFETY: MAP_CREATE reads numbers only.
        let fd = unsafe { bpf_open(command::MAP_CREATE, &mut attributes)? };
        let map = FoundMap::of(fd)?.into_map(entries);
        map.ok_or_else(|| io::Error::other("the kernel made another map than was asked for"))
    }

    /// Its descriptor's number, by which a program to be loaded names it.
    pub fn descriptor(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Takes away what is under `key`.
    pub fn remove(&self, key: K::Key) -> io::Result<()> {
        // SAFETY: the command reads a key only.
        unsafe { self.element(command::MAP_DELETE_ELEM, &key, 0) }
    }

    /// Asks for, or changes, what is under a key; a value, or the next key, is at `value`.
    ///
    /// # Safety
    /// The kernel must be allowed to do there what the command does: to read or write a value for each
    /// processor or one, as the kind has it, or to write a key.
    unsafe fn element(
        &self,
        command: libc::c_long,
        key: *const K::Key,
        value: u64,
    ) -> io::Result<()> {
        #[repr(C)]
        struct Attributes {
            map: RawFd,
            key: u64,
            value: u64,
            flags: u64,
        }
        let mut attributes =
            Attributes { map: self.fd.as_raw_fd(), key: key as u64, value, flags: 0 };
        // SAFETY: the map's keys are as long as `K::Key`; the rest is the caller's promise.
        unsafe { bpf(command, &mut attributes) }.map(drop)
    }
}

impl<K: Single> Map<K> {
    fn update(&self, key: K::Key, value: K::Value) -> io::Result<()> {
        let value = &raw const value as u64;
        // SAFETY: the kernel reads one value, which is as long as `K::Value`.
        unsafe { self.element(command::MAP_UPDATE_ELEM, &key, value) }
    }

    fn look_up(&self, key: K::Key) -> io::Result<K::Value> {
        let mut value: K::Value = zeros();
        // SAFETY: the kernel writes one value, which is as long as `K::Value`.
        unsafe { self.element(command::MAP_LOOKUP_ELEM, &key, &raw mut value as u64)? };
        Ok(value)
    }
}

impl Map<Sockets> {
    /// Puts a socket under `key`: frames that the program redirects to it arrive there from now.
    pub fn set_socket(&self, key: u32, socket: &OwnedFd) -> io::Result<()> {
        self.update(key, socket.as_raw_fd() as u32)
    }
}

impl Map<Numbers> {
    /// Puts a number under `key`.
    pub fn set_number(&self, key: u32, value: u32) -> io::Result<()> {
        self.update(key, value)
    }

    /// The number under `key`.
    pub fn number(&self, key: u32) -> io::Result<u32> {
        self.look_up(key)
    }
}

impl Map<Programs> {
    /// Puts a program under `key`, in the stead of the one that is there.
    pub fn set_program(&self, key: u32, program: &Program) -> io::Result<()> {
        self.update(key, program.0.as_raw_fd() as u32)
    }
}

impl<const N: usize> Map<Recent<N>> {
    /// All that the map holds, or `most` of it. What changes meanwhile may be missed.
    pub fn recent(&self, most: usize) -> io::Result<Vec<([u8; N], [u64; 2])>> {
        let (mut found, mut last) = (Vec::new(), None::<[u8; N]>);
        while found.len() < most {
            let mut key = [0; N];
            let from = last.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
            // SAFETY: the kernel writes a key to `key`, which is as long. Without a key to begin from
            // it writes the first.
            match unsafe { self.element(command::MAP_GET_NEXT_KEY, from, &raw mut key as u64) } {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
                other => other?,
            };
            // It may have gone meanwhile.
            if let Ok(value) = self.look_up(key) {
                found.push((key, value));
            }
            last = Some(key);
        }
        Ok(found)
    }
}

impl<const N: usize> Map<Counters<N>> {
    /// The counters under `key`, each summed over all processors.
    pub fn counters(&self, key: u32) -> io::Result<[u64; N]> {
        let mut values = vec![[0u64; N]; possible_processors()?];
        // SAFETY: the kernel writes N numbers of each possible processor, for which there is room.
        unsafe { self.element(command::MAP_LOOKUP_ELEM, &key, values.as_mut_ptr() as u64)? };
        let sum = |index: usize| values.iter().map(|value| value[index]).sum();
        Ok(std::array::from_fn(sum))
    }
}

/// For how many processors the kernel keeps values (`num_possible_cpus`): a number that does not
/// change, read once, while files may still be opened.
///
/// # Errors
/// Those of reading the file.
pub fn possible_processors() -> io::Result<usize> {
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
        Self::load_for(name, instructions, 0)
    }

    /// Loads an XDP program that runs on this device only, in its driver: it may ask the driver what
    /// it knows of a frame (`BPF_F_XDP_DEV_BOUND_ONLY`). For any device if that is 0.
    ///
    /// # Errors
    /// As [`load`](Self::load); EINVAL before Linux 6.3, and before 6.16 if it uses other programs.
    pub fn load_for(name: &str, instructions: &[u64], device: u32) -> io::Result<Self> {
        const DEVICE_BOUND: u32 = 1 << 6;
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
            device: u32,
            attach: u32,
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
                flags: if device == 0 { 0 } else { DEVICE_BOUND },
                name: name_bytes(name),
                device,
                attach: 0,
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
        // SAFETY: all fields are integers; `maps` has room for as many ids as it says.
        unsafe { information(&self.0, &mut info)? };
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
        // SAFETY: all fields are integers, and none of them is a pointer for this kind of link.
        unsafe { information(&self.0, &mut info)? };
        let found = LinkInfo { program: info.program, device: info.device };
        Ok((info.kind == LINK_TYPE_XDP).then_some(found))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joined_maps_are_of_the_kind_and_size_that_they_were_made_for() {
        let map = match Map::<Counters<4>>::new("test", 8) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                println!("skipped: needs CAP_BPF");
                return;
            }
            map => map.unwrap(),
        };
        let id = FoundMap::of(map.fd.try_clone().unwrap()).unwrap().info.id;
        let found = || FoundMap::by_id(id).unwrap();
        assert_eq!(found().name(), "test");
        assert!(found().into_map::<Counters<3>>(8).is_none(), "longer values");
        assert!(found().into_map::<Recent<4>>(8).is_none(), "another type");
        assert!(found().into_map::<Counters<4>>(9).is_none(), "fewer entries");
        let same = found().into_map::<Counters<4>>(8).unwrap();
        assert_eq!(same.counters(7).unwrap(), [0; 4]);
        assert!(same.counters(8).is_err());
    }
}
