//! The kernel's vhost-net behind a vhost-user socket: what a frontend says is said to /dev/vhost-net, which
//! then serves the rings by itself. So it has the guests that the other backends have.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, FromRawFd, IntoRawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use vhost::net::VhostNet;
use vhost::vhost_kern::net::Net;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    BackendReqHandler, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut,
};
use vhost::{VhostBackend, VhostUserMemoryRegionBase, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_user_net::sys::process::pin_this_thread;
use vhost_user_net::sys::tap::{Queue, offload};
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend,
    GuestMemoryMmap, GuestMemoryRegion,
};
use vmm_sys_util::eventfd::EventFd;

use crate::measure::backend_processor;
use crate::support::driver::{CSUM, GUEST_CSUM, GUEST_TSO, HOST_TSO, PROTOCOL};

/// What the TAP has rather than the kernel's backend.
const OFFLOADS: u64 = CSUM | HOST_TSO | GUEST_CSUM | GUEST_TSO;
const RINGS: usize = 2;

/// A card that the kernel serves.
struct Card {
    net: Net<GuestMemoryAtomic<GuestMemoryMmap>>,
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    tap: Queue,
    /// The TAP, as it is passed to the kernel.
    file: File,
    /// Where each region is in the frontend, and in the guest.
    places: Vec<(u64, u64)>,
    sizes: [u16; RINGS],
}

/// What the kernel, or a memory map, says is wrong.
fn failed<E: std::fmt::Display>(error: E) -> Error {
    Error::ReqHandlerError(io::Error::other(error.to_string()))
}

impl Card {
    fn new(tap: &str) -> io::Result<Self> {
        let queue = Queue::open(tap, false)?;
        queue.set_header_length(12)?;
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let net = Net::new(memory.clone()).map_err(io::Error::other)?;
        let file = File::from(queue.as_fd().try_clone_to_owned()?);
        Ok(Card { net, memory, tap: queue, file, places: Vec::new(), sizes: [0; RINGS] })
    }

    /// A guest's address of one of the frontend's.
    fn guest_address(&self, address: u64) -> Result<u64> {
        let memory = self.memory.memory();
        let regions = self.places.iter().zip(memory.iter());
        let place = |((frontend, guest), region): (&(u64, u64), &_)| {
            let offset = address.checked_sub(*frontend)?;
            (offset < GuestMemoryRegion::len(region)).then_some(guest + offset)
        };
        regions.into_iter().find_map(place).ok_or(Error::InvalidParam)
    }
}

/// An eventfd that the frontend has passed.
#[allow(unsafe_code)]
fn event(file: Option<File>) -> Result<EventFd> {
    let file = file.ok_or(Error::InvalidParam)?;
    // SAFETY: the descriptor was the file's, which has just given it up.
    Ok(unsafe { EventFd::from_raw_fd(file.into_raw_fd()) })
}

/// What no guest of the benchmark asks for.
fn unasked<T>() -> Result<T> {
    Err(Error::InvalidOperation("not served"))
}

impl VhostUserBackendReqHandlerMut for Card {
    fn set_owner(&mut self) -> Result<()> {
        self.net.set_owner().map_err(failed)?;
        let mut cpus = CpuSet::new();
        cpus.set(backend_processor()).map_err(failed)?;
        for thread in kernel_threads(std::process::id()) {
            sched_setaffinity(Pid::from_raw(thread as i32), &cpus).map_err(failed)?;
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.net.get_features().map_err(failed)? | OFFLOADS | PROTOCOL)
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let mut offloads = 0;
        if features & GUEST_CSUM != 0 {
            offloads |= offload::CSUM;
        }
        if features & GUEST_TSO == GUEST_TSO {
            offloads |= offload::TSO4 | offload::TSO6;
        }
        self.tap.set_offload(offloads).map_err(failed)?;
        self.net.set_features(features & !OFFLOADS & !PROTOCOL).map_err(failed)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(1)
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let ranges = regions.iter().zip(files).map(|(region, file)| {
            let offset = FileOffset::new(file, region.mmap_offset);
            (GuestAddress(region.guest_phys_addr), region.memory_size as usize, Some(offset))
        });
        let memory = GuestMemoryMmap::from_ranges_with_files(ranges).map_err(failed)?;
        self.places =
            regions.iter().map(|region| (region.user_addr, region.guest_phys_addr)).collect();
        let table: Vec<VhostUserMemoryRegionInfo> = memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: GuestMemoryRegion::len(region),
                userspace_addr: region.as_ptr() as u64,
                ..Default::default()
            })
            .collect();
        self.net.set_mem_table(&table).map_err(failed)?;
        self.memory.lock().unwrap().replace(memory);
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.sizes[index as usize] = num as u16;
        self.net.set_vring_num(index as usize, num as u16).map_err(failed)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let size = self.sizes[index as usize];
        let config = VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: 0,
            desc_table_addr: self.guest_address(descriptor)?,
            used_ring_addr: self.guest_address(used)?,
            avail_ring_addr: self.guest_address(available)?,
            log_addr: None,
        };
        self.net.set_vring_addr(index as usize, &config).map_err(failed)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.net.set_vring_base(index as usize, base as u16).map_err(failed)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.net.set_backend(index as usize, None).map_err(failed)?;
        let base = self.net.get_vring_base(index as usize).map_err(failed)?;
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.net.set_vring_kick(index.into(), &event(file)?).map_err(failed)
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.net.set_vring_call(index.into(), &event(file)?).map_err(failed)
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        self.net.set_vring_err(index.into(), &event(file)?).map_err(failed)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.net.set_backend(index as usize, enable.then_some(&self.file)).map_err(failed)
    }

    fn reset_owner(&mut self) -> Result<()> {
        unasked()
    }

    fn reset_device(&mut self) -> Result<()> {
        unasked()
    }

    fn get_config(&mut self, _: u32, _: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        unasked()
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        unasked()
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        unasked()
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        unasked()
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unasked()
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _: File) -> Result<()> {
        unasked()
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        unasked()
    }

    fn add_mem_region(
        &mut self,
        _: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        unasked()
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        unasked()
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        unasked()
    }

    fn check_device_state(&mut self) -> Result<()> {
        unasked()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unasked()
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        unasked()
    }
}

/// Serves one frontend after the other at `socket`, with this TAP.
pub(crate) fn serve(socket: &Path, tap: &str) -> io::Result<()> {
    pin_this_thread(backend_processor())?;
    let listener = UnixListener::bind(socket)?;
    loop {
        let (stream, _) = listener.accept()?;
        let card = Arc::new(Mutex::new(Card::new(tap)?));
        let mut handler = BackendReqHandler::from_stream(stream, card);
        while handler.handle_request().is_ok() {}
    }
}

/// Processes of the kernel's that serve a process's rings, before Linux 6.4; after that these are threads
/// of the process itself.
pub(super) fn kernel_threads(process: u32) -> Vec<u32> {
    let name = format!("vhost-{process}");
    let entries = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    let is_one = |path: &PathBuf| {
        fs::read_to_string(path.join("comm")).is_ok_and(|comm| comm.trim_end() == name)
    };
    entries.filter(is_one).filter_map(|path| path.file_name()?.to_str()?.parse().ok()).collect()
}
