//! The commands of `bpf(2)` that XDP programs and their maps need.
//!
//! Each value owns a descriptor. The kernel frees a program or map with its last reference. It detaches a
//! link's program when the link's last descriptor is closed, also after a crash.

pub mod assembly;
pub mod btf;
pub mod instructions;
mod link;
mod map;
mod program;

use std::ffi::CStr;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;

use super::check;

pub use link::{Hook, Link, LinkInfo};
pub use map::{Counters, FoundMap, Map, MapKind, Numbers, Programs, Recent, Sockets};
pub use program::{Program, ProgramInfo};

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

/// Longest name of a program or a map in bytes (`BPF_OBJ_NAME_LEN` less its nul).
const MAX_NAME: usize = 15;

/// Calls bpf(2), and returns its result.
///
/// # Safety
/// `attributes` must have the command's type, with valid pointers.
unsafe fn bpf<T>(command: libc::c_long, attributes: &mut T) -> io::Result<libc::c_int> {
    let size = mem::size_of::<T>() as libc::c_long;
    // SAFETY: the attributes live through the call and have the size given; the caller promises the rest.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attributes, size) };
    check(result as libc::c_int)
}

/// Calls bpf(2) with a command that returns a descriptor.
///
/// # Safety
/// As for [`bpf`].
unsafe fn bpf_open<T>(command: libc::c_long, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise; the descriptor is new and has no other owner.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(command, attributes)?)) }
}

/// Opens a program, map or link by its id.
fn open_by_id(command: libc::c_long, id: u32) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        id: u32,
        next_id: u32,
        open_flags: u32,
    }
    // SAFETY: the attributes of these commands have no pointers.
    unsafe { bpf_open(command, &mut Attributes { id, next_id: 0, open_flags: 0 }) }
}

/// Reads the start of the kernel's information about an object into `info`.
///
/// # Safety
/// `info` must have the kernel's layout and consist of integers. Pointers in it must be valid for the lengths
/// in it.
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
    // SAFETY: the kernel writes at most `length` bytes to `info`; the caller promises the rest.
    unsafe { bpf(command::OBJ_GET_INFO_BY_FD, &mut attributes)? };
    Ok(())
}

/// Returns a name as the kernel stores it, which panics if it is longer than [`MAX_NAME`].
fn name_bytes(name: &str) -> [u8; MAX_NAME + 1] {
    let mut bytes = [0; MAX_NAME + 1];
    bytes[..name.len()].copy_from_slice(name.as_bytes());
    bytes
}

/// Returns the text before the first nul.
fn name_from(bytes: &[u8]) -> String {
    CStr::from_bytes_until_nul(bytes).map_or_else(
        |_| String::from_utf8_lossy(bytes).into_owned(),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// Returns the number of CPUs for which the kernel keeps values (`num_possible_cpus`). The number is
/// constant; the first call reads it from a file, before the sandbox forbids opening files.
///
/// # Errors
/// Those of reading the file.
pub fn possible_cpus() -> io::Result<usize> {
    static CPUS: OnceLock<usize> = OnceLock::new();
    if let Some(cpus) = CPUS.get() {
        return Ok(*cpus);
    }
    let text = std::fs::read_to_string("/sys/devices/system/cpu/possible")?;
    let last = text.trim().rsplit([',', '-']).next().and_then(|number| number.parse().ok());
    let cpus = last
        .map(|last: usize| last + 1)
        .ok_or_else(|| io::Error::other("cannot parse /sys/devices/system/cpu/possible"))?;
    Ok(*CPUS.get_or_init(|| cpus))
}
