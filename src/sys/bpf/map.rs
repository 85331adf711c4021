//! Maps. Each kind has its own type of keys and values.
//!
//! Invariant: a [`Map`] has the type of its kind, and its sizes of keys and values. The kernel's information
//! has confirmed this before any access.

use std::io;
use std::marker::PhantomData;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::{
    MAX_NAME, Program, bpf, bpf_open, command, information, name_bytes, name_from, open_by_id,
    possible_cpus,
};
use crate::sys::zeros;

/// Content and kernel type of a map. Only this module's kinds implement it.
pub trait MapKind: private::Layout {}

impl<K: private::Layout> MapKind for K {}

mod private {
    use crate::sys::Plain;

    /// Type and sizes that a map of a kind has in the kernel.
    pub trait Layout {
        /// `BPF_MAP_TYPE_*`.
        const TYPE: u32;
        type Key: Plain;
        /// A value: of one CPU, in a per-CPU map.
        type Value: Plain;
    }

    /// A kind whose maps have one value for each key, and not one for each CPU.
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

/// A program for each key (`BPF_MAP_TYPE_PROG_ARRAY`). The kernel empties the map when its last descriptor is
/// closed.
#[derive(Debug)]
pub enum Programs {}

impl Layout for Programs {
    const TYPE: u32 = 3;
    type Key = u32;
    type Value = u32;
}

/// `N` counters for each key and CPU (`BPF_MAP_TYPE_PERCPU_ARRAY`).
#[derive(Debug)]
pub enum Counters<const N: usize> {}

impl<const N: usize> Layout for Counters<N> {
    const TYPE: u32 = 6;
    type Key = u32;
    type Value = [u64; N];
}

/// Two `u64` for each key of `N` bytes (`BPF_MAP_TYPE_LRU_HASH`). A full map drops the least recently used
/// keys.
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

/// The kernel's information about a map: the start of `struct bpf_map_info`.
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

/// An existing map, whose kind is not yet checked.
#[derive(Debug)]
pub struct FoundMap {
    fd: OwnedFd,
    info: MapInfo,
}

impl FoundMap {
    /// Opens the map with this id.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN; ENOENT if there is no such map.
    pub fn by_id(id: u32) -> io::Result<Self> {
        possible_cpus()?;
        FoundMap::of(open_by_id(command::MAP_GET_FD_BY_ID, id)?)
    }

    fn of(fd: OwnedFd) -> io::Result<Self> {
        let mut info = MapInfo::default();
        // SAFETY: all fields are integers, and none is a pointer.
        unsafe { information(&fd, &mut info)? };
        Ok(FoundMap { fd, info })
    }

    /// Returns the name that the map was created with.
    pub fn name(&self) -> String {
        name_from(&self.info.name)
    }

    /// Returns the map if it is of kind `K`, with a capacity of `entries`.
    pub fn into_map<K: MapKind>(self, entries: u32) -> Option<Map<K>> {
        let MapInfo { kind, key_size, value_size, entries: made_for, .. } = self.info;
        let sizes = (mem::size_of::<K::Key>() as u32, mem::size_of::<K::Value>() as u32);
        (kind == K::TYPE && (key_size, value_size) == sizes && made_for == entries)
            .then_some(Map { fd: self.fd, kind: PhantomData })
    }
}

/// A map of kind `K`, with the key and value sizes of `K`.
///
/// ```compile_fail,E0599
/// # use vhost_user_net::sys::bpf::{Map, Recent};
/// // The map has two numbers for each key, not counters of each CPU.
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
    /// Creates a map with a capacity of `entries`. `name` has at most 15 bytes.
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
        possible_cpus()?;
        // SAFETY: MAP_CREATE reads numbers only.
        let fd = unsafe { bpf_open(command::MAP_CREATE, &mut attributes)? };
        let map = FoundMap::of(fd)?.into_map(entries);
        map.ok_or_else(|| io::Error::other("the kernel created a map of another type or size"))
    }

    /// Returns the descriptor's number, by which a program's instructions refer to the map.
    pub fn descriptor(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Removes the entry under `key`.
    pub fn remove(&self, key: K::Key) -> io::Result<()> {
        // SAFETY: the command reads a key only.
        unsafe { self.element(command::MAP_DELETE_ELEM, &key, 0) }
    }

    /// Reads, changes or removes the entry under a key. `value` is the address of a value, or of the next
    /// key.
    ///
    /// # Safety
    /// The memory at `value` must be valid for the command: for reading or writing one value, or one value
    /// for each CPU in a per-CPU map, or for writing a key.
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
        // SAFETY: the map's keys have the size of `K::Key`; the caller promises the rest.
        unsafe { bpf(command, &mut attributes) }.map(drop)
    }
}

impl<K: Single> Map<K> {
    /// Sets the value under a key.
    fn update(&self, key: K::Key, value: K::Value) -> io::Result<()> {
        let value = &raw const value as u64;
        // SAFETY: the kernel reads one value, of the size of `K::Value`.
        unsafe { self.element(command::MAP_UPDATE_ELEM, &key, value) }
    }

    /// Reads the value under a key.
    fn look_up(&self, key: K::Key) -> io::Result<K::Value> {
        let mut value: K::Value = zeros();
        // SAFETY: the kernel writes one value, of the size of `K::Value`.
        unsafe { self.element(command::MAP_LOOKUP_ELEM, &key, &raw mut value as u64)? };
        Ok(value)
    }
}

impl Map<Sockets> {
    /// Sets the socket under `key`, which receives redirected frames from now on.
    pub fn set_socket(&self, key: u32, socket: &OwnedFd) -> io::Result<()> {
        self.update(key, socket.as_raw_fd() as u32)
    }
}

impl Map<Numbers> {
    /// Sets the number under `key`.
    pub fn set_number(&self, key: u32, value: u32) -> io::Result<()> {
        self.update(key, value)
    }

    /// Reads the number under `key`.
    pub fn number(&self, key: u32) -> io::Result<u32> {
        self.look_up(key)
    }
}

impl Map<Programs> {
    /// Sets the program under `key`, and replaces an earlier one.
    pub fn set_program(&self, key: u32, program: &Program) -> io::Result<()> {
        self.update(key, program.descriptor().as_raw_fd() as u32)
    }
}

impl<const N: usize> Map<Recent<N>> {
    /// Reads all entries, or `most` of them. It may miss entries that change during the call.
    pub fn recent(&self, most: usize) -> io::Result<Vec<([u8; N], [u64; 2])>> {
        let (mut found, mut last) = (Vec::new(), None::<[u8; N]>);
        while found.len() < most {
            let mut key = [0; N];
            let from = last.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
            // SAFETY: the kernel writes one key to `key`, which has the size of a key. For a null `from` it
            // writes the first key.
            match unsafe { self.element(command::MAP_GET_NEXT_KEY, from, &raw mut key as u64) } {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => break,
                other => other?,
            };
            // The entry may be gone by now.
            if let Ok(value) = self.look_up(key) {
                found.push((key, value));
            }
            last = Some(key);
        }
        Ok(found)
    }
}

impl<const N: usize> Map<Counters<N>> {
    /// Reads the counters under `key`, each summed over all CPUs.
    pub fn counters(&self, key: u32) -> io::Result<[u64; N]> {
        let mut values = vec![[0u64; N]; possible_cpus()?];
        // SAFETY: the kernel writes N numbers for each possible CPU, for which `values` has room.
        unsafe { self.element(command::MAP_LOOKUP_ELEM, &key, values.as_mut_ptr() as u64)? };
        let sum = |index: usize| values.iter().map(|value| value[index]).sum();
        Ok(std::array::from_fn(sum))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_opened_by_id_must_match_kind_and_size() {
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
