//! Maps, of which each kind has its own keys and values.
//!
//! Invariant: a [`Map`] is of its kind: the kernel has said so of its type, and of the sizes of its keys and
//! values, before anything is read or written.

use std::io;
use std::marker::PhantomData;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::{
    MAX_NAME, Program, bpf, bpf_open, command, information, name_bytes, name_from, open_by_id,
    possible_processors,
};
use crate::sys::zeros;

/// What a map holds, and how the kernel keeps it. Only the kinds of this module are.
pub trait MapKind: private::Layout {}

impl<K: private::Layout> MapKind for K {}

mod private {
    use crate::sys::Plain;

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
        self.update(key, program.descriptor().as_raw_fd() as u32)
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
