//! Why a memory region was refused, in words for the log: each names the way out where there is one.

use std::fmt;

use super::MAX_SLOTS;

/// Why a memory region was refused.
#[derive(Debug)]
pub enum MemoryError {
    /// The region has no bytes.
    Empty,
    /// An address or offset plus the size is beyond 64 bits.
    Overflow,
    /// The descriptor is no memfd, and no file on tmpfs or hugetlbfs.
    NotMemory,
    /// The descriptor is not open for reading and writing.
    ReadOnly,
    /// The region ends behind the end of its file.
    PastEndOfFile {
        /// First byte behind the region, as an offset into the file.
        end: u64,
        /// The file's size in bytes.
        file_size: u64,
    },
    /// It shares addresses with a region that is already there.
    Overlap,
    /// All [`MAX_SLOTS`] are taken.
    NoSlot,
    /// No region like this is in the table.
    Unknown,
    /// It is not aligned in its file.
    Misaligned,
    /// The dirty log has no bits for memory before this address.
    LogTooShort {
        /// First guest-physical address behind the memory.
        end: u64,
    },
    /// The port's mapped bytes would exceed its limit.
    OverLimit {
        /// Bytes to be mapped.
        bytes: u64,
        /// The port's limit in bytes.
        limit: u64,
    },
    /// The mapped bytes of all ports would exceed half of the address space.
    ProcessFull {
        /// Bytes to be mapped.
        bytes: u64,
    },
    /// The kernel refused to look at or to map the file.
    Map(std::io::Error),
}

impl fmt::Display for MemoryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            MemoryError::Empty => write!(f, "the region is empty"),
            MemoryError::Overflow => write!(f, "its address plus its size is beyond 64 bits"),
            MemoryError::NotMemory => write!(
                f,
                "its descriptor is no memory (a memfd, or a file on tmpfs or hugetlbfs); give the \
                 guest memory from memory-backend-memfd, or memory-backend-file in /dev/shm or on \
                 hugetlbfs, with share=on"
            ),
            MemoryError::ReadOnly => {
                write!(f, "its descriptor is not open for reading and writing")
            }
            MemoryError::PastEndOfFile { end, file_size } => {
                write!(f, "it ends at byte {end} of a file of {file_size} bytes")
            }
            MemoryError::Overlap => write!(f, "it overlaps another region"),
            MemoryError::NoSlot => write!(f, "all {MAX_SLOTS} memory slots are taken"),
            MemoryError::Unknown => write!(f, "there is no such region"),
            MemoryError::Misaligned => write!(f, "it is not aligned in its file"),
            MemoryError::LogTooShort { end } => {
                write!(f, "the dirty log has no bits for all memory up to {end:#x}")
            }
            MemoryError::OverLimit { bytes, limit } => write!(
                f,
                "cannot map {bytes} bytes more: the port's mapped memory would exceed max-memory, \
                 {limit} bytes; raise max-memory"
            ),
            MemoryError::ProcessFull { bytes } => write!(
                f,
                "cannot map {bytes} bytes more: all ports together would exceed half of the daemon's \
                 address space; lower max-memory of other ports, or run a daemon for each"
            ),
            MemoryError::Map(error) => write!(f, "map its file: {error}"),
        }
    }
}

impl std::error::Error for MemoryError {}
