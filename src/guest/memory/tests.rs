//! Tests of the memory table: accepted regions, refused regions, look-ups.

use std::os::fd::{AsRawFd, FromRawFd};

use super::*;

fn memfd(size: u64) -> File {
    // SAFETY: a fresh descriptor, owned by the File.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), 0)) };
    file.set_len(size).unwrap();
    file
}

fn region(guest_address: u64, size: u64) -> RegionRequest {
    RegionRequest {
        guest_address,
        size,
        frontend_address: 0x7000_0000_0000 + guest_address,
        file_offset: 0,
    }
}

#[test]
fn addresses_resolve_only_inside_their_region() {
    let memory = GuestMemory::map([
        (region(0x10_0000, 0x1000), memfd(0x1000)),
        (region(0, 0x2000), memfd(0x2000)),
    ])
    .unwrap();
    let mut last = Window::EMPTY;
    assert_eq!(memory.at(0x1fff, &mut last).unwrap().len(), 1);
    assert_eq!(memory.at(0x10_0000, &mut last).unwrap().len(), 0x1000);
    for gap in [0x2000, 0xf_ffff, 0x10_1000, u64::MAX] {
        assert!(memory.at(gap, &mut last).is_none());
    }
    assert!(memory.resolve(GuestAddress(0x1ff0), 0x10).is_some());
    assert!(memory.resolve(GuestAddress(0x1ff0), 0x11).is_none());
    assert_eq!(memory.guest_address(0x7000_0010_0004), Some(GuestAddress(0x10_0004)));
    assert_eq!(memory.guest_address(0x1000), None);
}

#[test]
fn region_beyond_its_file_is_refused() {
    let outside = [
        RegionRequest { size: 0x2000, ..region(0, 0) },
        RegionRequest { file_offset: 0x800, ..region(0, 0x1000) },
        RegionRequest { file_offset: u64::MAX - 0x10, ..region(0, 0x1000) },
        RegionRequest { guest_address: u64::MAX - 0x10, ..region(0, 0x1000) },
        RegionRequest { size: 1 << 63, ..region(0, 0) },
        region(0, 0),
    ];
    for request in outside {
        assert!(GuestMemory::map([(request, memfd(0x1000))]).is_err(), "{request:?}");
    }
}

#[test]
fn region_at_an_odd_file_offset_is_mapped_there() {
    let file = memfd(0x3000);
    file.write_all_at(b"here", 0x1234).unwrap();
    let request = RegionRequest { file_offset: 0x1234, ..region(0x8000, 0x100) };
    let memory = GuestMemory::map([(request, file)]).unwrap();
    let pointer = memory.resolve(GuestAddress(0x8000), 4).unwrap();
    // SAFETY: `resolve` returned four mapped bytes, and the table lives.
    assert_eq!(unsafe { pointer.cast::<[u8; 4]>().read() }, *b"here");
}

#[test]
fn read_only_and_non_memory_files_are_refused() {
    let file = memfd(0x1000);
    let read_only = File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    let error = GuestMemory::map([(region(0, 0x1000), read_only)]).unwrap_err();
    assert!(matches!(error, MemoryError::ReadOnly));
    for path in ["/dev/zero", "/"] {
        let file = File::open(path).unwrap();
        let error = GuestMemory::map([(region(0, 0x1000), file)]).unwrap_err();
        assert!(matches!(error, MemoryError::NotMemory), "{path}: {error}");
    }
}

#[test]
fn overlaps_are_refused_in_both_address_spaces() {
    let memory = GuestMemory::map([(region(0x1000, 0x1000), memfd(0x1000))]).unwrap();
    assert!(matches!(
        memory.with(region(0x1800, 0x1000), memfd(0x1000)),
        Err(MemoryError::Overlap)
    ));
    let elsewhere = RegionRequest { guest_address: 0x10_0000, ..region(0x1800, 0x1000) };
    assert!(matches!(memory.with(elsewhere, memfd(0x1000)), Err(MemoryError::Overlap)));
    let beside = memory.with(region(0x2000, 0x1000), memfd(0x1000)).unwrap();
    assert_eq!(beside.len(), 2);
    assert_eq!(beside.without(region(0x1000, 0x1000)).unwrap().len(), 1);
    assert!(matches!(beside.without(region(0x1000, 0x800)), Err(MemoryError::Unknown)));
}
