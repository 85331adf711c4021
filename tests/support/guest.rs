//! Guest RAM of the tests: a memfd, mapped here and shared with the daemon.

use std::fs::File;
use std::io;
use std::sync::atomic::Ordering;

use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, ReadVolatile,
    VolatileMemoryError, WriteVolatile,
};

/// Difference between frontend addresses and guest addresses.
pub(crate) const FRONTEND_BASE: u64 = 0x5555_0000_0000;

/// One region of RAM at guest address `base`.
#[derive(Debug)]
pub(crate) struct Ram {
    pub(crate) file: File,
    pub(crate) base: u64,
    pub(crate) size: u64,
    memory: GuestMemoryMmap,
}

/// Creates a memfd of `size` bytes.
pub(crate) fn memfd(size: u64) -> File {
    let flags = nix::sys::memfd::MFdFlags::MFD_CLOEXEC;
    let file = File::from(nix::sys::memfd::memfd_create(c"guest", flags).unwrap());
    file.set_len(size).unwrap();
    file
}

/// Creates a memfd of `size` bytes in huge pages of 2 MiB, if the kernel supports them.
pub(crate) fn huge_memfd(size: u64) -> Option<File> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let file =
        File::from(memfd_create(c"guest", MFdFlags::MFD_HUGETLB | MFdFlags::MFD_CLOEXEC).ok()?);
    file.set_len(size).unwrap();
    Some(file)
}

/// A reservation of huge pages of 2 MiB, ended on drop. One test at a time holds it.
pub(crate) struct HugePages {
    before: u64,
    _alone: std::sync::MutexGuard<'static, ()>,
}

const HUGE_PAGES: &str = "/proc/sys/vm/nr_hugepages";

impl HugePages {
    pub(crate) fn reserve(count: u64) -> Self {
        static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
        let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let before: u64 = std::fs::read_to_string(HUGE_PAGES).unwrap().trim().parse().unwrap();
        std::fs::write(HUGE_PAGES, (before + count).to_string()).unwrap();
        HugePages { before, _alone }
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(HUGE_PAGES, self.before.to_string());
    }
}

impl Ram {
    pub(crate) fn new(base: u64, size: u64) -> Self {
        Self::of(memfd(size), base, size)
    }

    pub(crate) fn of(file: File, base: u64, size: u64) -> Self {
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(base), size as usize, Some(offset))];
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        Ram { file, base, size, memory }
    }

    pub(crate) fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    /// Writes `length` bytes to a file, with one system call.
    #[allow(dead_code)]
    pub(crate) fn send(&self, address: u64, length: usize, file: &mut File) -> io::Result<usize> {
        let piece = self.memory.get_slice(GuestAddress(address), length).unwrap();
        file.write_volatile(&piece).map_err(into_io_error)
    }

    /// Reads at most `length` bytes from a file, with one system call.
    #[allow(dead_code)]
    pub(crate) fn fetch(&self, address: u64, length: usize, file: &mut File) -> io::Result<usize> {
        let mut piece = self.memory.get_slice(GuestAddress(address), length).unwrap();
        file.read_volatile(&mut piece).map_err(into_io_error)
    }

    pub(crate) fn read_u32(&self, address: u64) -> u32 {
        u32::from_le_bytes(self.read(address, 4).try_into().unwrap())
    }

    /// Loads an index that the daemon stores with release order.
    pub(crate) fn load(&self, address: u64) -> u16 {
        self.memory.load(GuestAddress(address), Ordering::SeqCst).unwrap()
    }

    /// Stores an index, then executes a full fence, as a driver does before it decides to kick.
    pub(crate) fn store(&self, address: u64, value: u16) {
        self.memory.store(value, GuestAddress(address), Ordering::SeqCst).unwrap();
        std::sync::atomic::fence(Ordering::SeqCst);
    }
}

fn into_io_error(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        error => io::Error::other(error),
    }
}
