//! A backend on the stock crates, as plain as cloud-hypervisor's `vhost_user_net`: for each frame a
//! system call, a store of the used index and a call of the guest. It knows neither `MRG_RXBUF` nor
//! segmentation towards the guest.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, RwLock};

use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use vhost_user_net::sys::process::pin_this_thread;
use vhost_user_net::sys::tap::Queue;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::{
    GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, ReadVolatile,
    WriteVolatile,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use crate::measure::backend_processor;
use crate::support::driver::{CSUM, EVENT_IDX, GUEST_CSUM, HOST_TSO, PROTOCOL, VERSION_1};

const RX: u16 = 0;
const TX: u16 = 1;
/// The device's event: behind those of the rings, and one that the crate keeps.
const TAP: u16 = 3;

struct Plain {
    memory: GuestMemoryAtomic<GuestMemoryMmap>,
    tap: File,
}

impl Plain {
    /// Sends what the guest has made available.
    fn transmit(&mut self, ring: &VringRwLock) -> io::Result<()> {
        let memory = self.memory.memory();
        loop {
            ring.disable_notification().map_err(io::Error::other)?;
            loop {
                let mut state = ring.get_mut();
                let Some(chain) = state.get_queue_mut().iter(memory.clone()).unwrap().next() else {
                    break;
                };
                let head = chain.head_index();
                for piece in chain {
                    let slice = memory.get_slice(piece.addr(), piece.len() as usize).unwrap();
                    // A frame that the device refuses is lost.
                    let _ = self.tap.write_volatile(&slice);
                }
                state.add_used(head, 0).map_err(io::Error::other)?;
                state.signal_used_queue()?;
            }
            if !ring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }

    /// Gives the guest the frames that have come, as long as it has buffers.
    fn receive(&mut self, ring: &VringRwLock) -> io::Result<()> {
        let memory = self.memory.memory();
        loop {
            let mut state = ring.get_mut();
            if !state.get_queue().ready() {
                return Ok(());
            }
            let Some(chain) = state.get_queue_mut().iter(memory.clone()).unwrap().next() else {
                // It says when it has more.
                if state.enable_notification().map_err(io::Error::other)? {
                    continue;
                }
                return Ok(());
            };
            let (head, piece) = (chain.head_index(), chain.into_iter().next().unwrap());
            let mut slice = memory.get_slice(piece.addr(), piece.len() as usize).unwrap();
            let Ok(length) = self.tap.read_volatile(&mut slice) else {
                state.get_queue_mut().go_to_previous_position();
                return Ok(());
            };
            // num_buffers
            slice.subslice(10, 2).unwrap().copy_from(&[1u8, 0]);
            state.add_used(head, length as u32).map_err(io::Error::other)?;
            state.signal_used_queue()?;
        }
    }
}

impl VhostUserBackendMut for Plain {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        VERSION_1 | EVENT_IDX | PROTOCOL | CSUM | HOST_TSO | GUEST_CSUM
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.memory = memory;
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        None
    }

    fn handle_event(
        &mut self,
        event: u16,
        _set: EventSet,
        rings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        match event {
            TX => self.transmit(&rings[usize::from(TX)]),
            _ => self.receive(&rings[usize::from(RX)]),
        }
    }
}

/// Serves one frontend after the other at `socket`, with this TAP.
pub(crate) fn serve(socket: &Path, tap: &str) -> io::Result<()> {
    pin_this_thread(backend_processor())?;
    let queue = Queue::open(tap, false)?;
    queue.set_header_length(12)?;
    let tap = Arc::new(OwnedFd::from(queue));
    let mut listener = vhost::vhost_user::Listener::new(socket, true).map_err(io::Error::other)?;
    loop {
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let file = File::from(tap.as_fd().try_clone_to_owned()?);
        let backend = Arc::new(RwLock::new(Plain { memory: memory.clone(), tap: file }));
        let mut daemon = VhostUserDaemon::new("plain".into(), backend, memory)
            .map_err(|error| io::Error::other(format!("{error:?}")))?;
        // Frames are read until there are none, or no buffers for them.
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let handlers = daemon.get_epoll_handlers();
        handlers[0].register_listener(tap.as_raw_fd(), events, TAP.into())?;
        daemon.start(&mut listener).map_err(|error| io::Error::other(format!("{error:?}")))?;
        let _ = daemon.wait();
        handlers[0].unregister_listener(tap.as_raw_fd(), events, TAP.into())?;
        // Its drop waits for worker threads that only an exit event would end.
        std::mem::forget(daemon);
    }
}
