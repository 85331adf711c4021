//! Reasons for refusing a memory region. The log states them, with the fix where there is one.

use std::fmt;

use super::MAX_SLOTS;

/// Reason for refusing a memory region, a dirty log or an inflight buffer.
#[derive(Debug)]
pub enum MemoryError {
    /// The region has no bytes.
    Empty,
    /// An address or offset plus the size exceeds 64 bits.
    Overflow,
    /// The descriptor is no memfd, and no file on tmpfs or hugetlbfs.
    NotMemory,
    /// The descriptor is not open for reading and writing.
    ReadOnly,
    /// The region ends beyond the end of its file.
    PastEndOfFile {
        /// Offset of the region's end in the file, in bytes.
        end: u64,
        /// The file's size in bytes.
        file_size: u64,
    },
    /// The region shares addresses with another region of the table.
    Overlap,
    /// The table has [`MAX_SLOTS`] regions already.
    NoSlot,
    /// The table has no such region.
    Unknown,
    /// The inflight buffer is not aligned to 64 bytes in its file.
    Misaligned,
    /// The dirty log has no bits for memory before this address.
    LogTooShort {
        /// First guest-physical address beyond the memory.
        end: u64,
    },
    /// The port's mapped bytes would exceed its limit.
    OverLimit {
        /// Number of bytes to map.
        bytes: u64,
        /// The port's limit in bytes.
        limit: u64,
    },
    /// The mapped bytes of all ports would exceed half of the address space.
    ProcessFull {
        /// Number of bytes to map.
        bytes: u64,
    },
    /// The kernel refused to describe or to map the file.
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
