//! Every message that QEMU or cloud-hypervisor can send. cloud-hypervisor's own frontend (the crate `vhost`)
//! sends them, and checks lengths and fields of the replies.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::support::daemon::Daemon;
use crate::support::driver::{LOG_ALL, MRG_RXBUF, PROTOCOL, VERSION_1};
use crate::support::guest::{FRONTEND_BASE, Ram, memfd};
use crate::support::hostile::note;
use crate::support::{SOON, eventually};

const RINGS: usize = 4;
const SIZE: u16 = 256;
const FEATURES: u64 = VERSION_1 | PROTOCOL | MRG_RXBUF;

/// Event descriptors of a ring.
struct Events {
    kick: EventFd,
    call: EventFd,
    error: EventFd,
}

/// The frontend, its negotiated state and its shared memory.
struct Vmm {
    _daemon: Daemon,
    frontend: Frontend,
    ram: Ram,
    events: Vec<Events>,
    /// Number of chains made available on ring 1.
    sent: u16,
}

fn info(ram: &Ram, file: &File) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: ram.base,
        memory_size: ram.size,
        userspace_addr: FRONTEND_BASE + ram.base,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    }
}

/// Returns the addresses of a ring's parts. Each ring has 64 KiB.
fn place(ring: usize) -> VringConfigData {
    let base = FRONTEND_BASE + (ring as u64) * 0x1_0000;
    VringConfigData {
        queue_max_size: SIZE,
        queue_size: SIZE,
        flags: 0,
        desc_table_addr: base,
        used_ring_addr: base + 0x3000,
        avail_ring_addr: base + 0x2000,
        log_addr: None,
    }
}

impl Vmm {
    /// Negotiates as cloud-hypervisor does: all protocol features, and acknowledgements.
    fn connect() -> Self {
        let daemon = Daemon::start(&["--loopback", "--queue-pairs=2"]);
        let stream: UnixStream = daemon.connect();
        // The crate waits for ever for the rest of a reply that is too short. A closed socket ends that.
        let watched = stream.try_clone().unwrap();
        std::thread::spawn(move || {
            std::thread::sleep(SOON);
            let _ = watched.shutdown(std::net::Shutdown::Both);
        });
        let mut frontend = Frontend::from_stream(stream, RINGS as u64);
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        assert_eq!(offered & FEATURES, FEATURES);
        assert_ne!(offered & VhostUserVirtioFeatures::LOG_ALL.bits(), 0);
        let protocol = frontend.get_protocol_features().unwrap();
        for feature in [
            VhostUserProtocolFeatures::LOG_SHMFD,
            VhostUserProtocolFeatures::INFLIGHT_SHMFD,
            VhostUserProtocolFeatures::DEVICE_STATE,
            VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS,
        ] {
            assert!(protocol.contains(feature), "{feature:?}");
        }
        frontend.set_protocol_features(protocol).unwrap();
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(FEATURES).unwrap();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let events =
            (0..RINGS).map(|_| Events { kick: event(), call: event(), error: event() }).collect();
        Vmm { _daemon: daemon, frontend, ram: Ram::new(0, 0x10_0000), events, sent: 0 }
    }

    /// Shares memory and starts all rings.
    fn start(&mut self) {
        let region = info(&self.ram, &self.ram.file);
        self.frontend.set_mem_table(&[region]).unwrap();
        for (index, events) in self.events.iter().enumerate() {
            self.frontend.set_vring_num(index, SIZE).unwrap();
            self.frontend.set_vring_addr(index, &place(index)).unwrap();
            self.frontend.set_vring_base(index, 0).unwrap();
            self.frontend.set_vring_call(index, &events.call).unwrap();
            self.frontend.set_vring_err(index, &events.error).unwrap();
            self.frontend.set_vring_kick(index, &events.kick).unwrap();
            self.frontend.set_vring_enable(index, true).unwrap();
        }
    }

    /// Makes ring 1's first descriptor available, an empty frame.
    fn send_nothing(&mut self) {
        let ring = 0x1_0000;
        let descriptor = [ring + 0x8000, 1].map(u64::to_le_bytes).concat();
        self.ram.write(ring, &descriptor);
        self.sent += 1;
        self.ram.write(ring + 0x2000 + 2, &self.sent.to_le_bytes());
        self.events[1].kick.write(1).unwrap();
    }

    /// Stops all rings, and checks their bases.
    fn stop(&mut self) {
        for index in 0..RINGS {
            self.frontend.set_vring_enable(index, false).unwrap();
            let stands = if index == 1 { self.sent } else { 0 };
            assert_eq!(self.frontend.get_vring_base(index).unwrap(), u32::from(stands));
        }
    }
}

#[test]
fn ring_and_memory_messages_are_answered() {
    let mut vmm = Vmm::connect();
    assert_eq!(vmm.frontend.get_queue_num().unwrap(), RINGS as u64 + 1);
    assert_eq!(vmm.frontend.get_max_mem_slots().unwrap(), 509);
    vmm.start();
    let more = Ram::new(0x1_0000_0000, 0x10_0000);
    let region = info(&more, &more.file);
    vmm.frontend.add_mem_region(&region).unwrap();
    vmm.frontend.remove_mem_region(&region).unwrap();
    vmm.frontend.remove_mem_region(&region).unwrap_err();
    vmm.stop();
    vmm.start();
    vmm.frontend.reset_device().unwrap();
    vmm.frontend.set_features(FEATURES).unwrap();
    vmm.start();
    vmm.frontend.reset_owner().unwrap();
}

#[test]
fn configuration_and_refusals_are_answered() {
    let mut vmm = Vmm::connect();
    let flags = VhostUserConfigFlags::empty();
    let (_, bytes) = vmm.frontend.get_config(0, 12, flags, &[0; 12]).unwrap();
    assert_eq!(bytes[8..10], 2_u16.to_le_bytes(), "max_virtqueue_pairs");
    vmm.frontend.set_config(0, VhostUserConfigFlags::WRITABLE, &[0; 6]).unwrap_err();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    vmm.frontend.set_backend_request_fd(&ours).unwrap();
    let log = memfd(0x1000);
    vmm.frontend.set_log_fd(log.as_raw_fd()).unwrap_err();
    vmm.frontend.set_features(1 << 63).unwrap_err();
    vmm.frontend.get_features().unwrap();
}

#[test]
fn inflight_buffer_is_created_and_accepted_back() {
    let mut vmm = Vmm::connect();
    let wanted = VhostUserInflight {
        mmap_size: 0,
        mmap_offset: 0,
        num_queues: RINGS as u16,
        queue_size: SIZE,
    };
    let (inflight, file) = vmm.frontend.get_inflight_fd(&wanted).unwrap();
    assert!(inflight.mmap_size > 0);
    vmm.frontend.set_inflight_fd(&inflight, file.as_raw_fd()).unwrap();
    vmm.start();
    vmm.stop();
}

#[test]
fn device_state_is_transferred_over_a_pipe() {
    let mut vmm = Vmm::connect();
    vmm.start();
    vmm.stop();
    let (mut state, writer) = std::io::pipe().unwrap();
    let phase = VhostTransferStatePhase::STOPPED;
    let transfer = |vmm: &Vmm, direction, fd: OwnedFd| {
        assert!(vmm.frontend.set_device_state_fd(direction, phase, fd).unwrap().is_none());
    };
    transfer(&vmm, VhostTransferStateDirection::SAVE, writer.into());
    vmm.frontend.check_device_state().unwrap();
    let mut bytes = Vec::new();
    state.read_to_end(&mut bytes).unwrap();
    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(&bytes).unwrap();
    drop(writer);
    transfer(&vmm, VhostTransferStateDirection::LOAD, reader.into());
    vmm.frontend.check_device_state().unwrap();
    vmm.frontend.check_device_state().unwrap_err();
}

#[test]
fn hostile_72_dirty_log_works_over_the_vhost_crate() {
    let mut vmm = Vmm::connect();
    vmm.start();
    // A log for all of guest memory, one bit a page, behind something else in its file.
    let (offset, length) = (0x1000, vmm.ram.size / 0x1000 / 8);
    for _ in 0..3 {
        let file = memfd(0x2000);
        let log = VhostUserDirtyLogRegion {
            mmap_size: length,
            mmap_offset: offset,
            mmap_handle: file.as_raw_fd(),
        };
        vmm.frontend.set_log_base(0, Some(log)).unwrap();
        vmm.frontend.set_features(FEATURES | LOG_ALL).unwrap();
        // A frame that is too short is dropped, and its chain is used: ring 1's used ring lies in page 19.
        vmm.send_nothing();
        eventually("page 19 is marked", || {
            let mut bits = [0; 3];
            file.read_exact_at(&mut bits, offset).unwrap();
            bits[2] & 1 << 3 != 0
        });
        vmm.stop();
        vmm.frontend.set_features(FEATURES).unwrap();
        vmm.start();
    }
    // The connection is in step: the next reply is the next request's.
    assert_eq!(vmm.frontend.get_queue_num().unwrap(), RINGS as u64 + 1);
    note(72, "cloud-hypervisor's frontend reads its reply to SET_LOG_BASE, and the log is kept");
}
