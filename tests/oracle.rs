//! Comparison with other implementations: `virtio-queue` on the same ring bytes, and `vhost-user-backend`
//! under the same frontend.

use std::collections::VecDeque;

use proptest::prelude::*;
use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

use vhost_user_net::guest::{
    Budget, GuestMemory, Notification, Published, Readable, RegionRequest, RingLayout, Virtqueue,
};

use crate::support::guest::Ram;

const SIZE: u16 = 16;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
const RAM: u64 = 0x1_0000;
const ALL: Budget = Budget { chains: usize::MAX, bytes: usize::MAX };

/// Two equal guest memories, one for each implementation.
struct Rings {
    ours: Ram,
    theirs: Ram,
}

impl Rings {
    fn new() -> Self {
        Rings { ours: Ram::new(0, RAM), theirs: Ram::new(0, RAM) }
    }

    fn write(&self, address: u64, bytes: &[u8]) {
        self.ours.write(address, bytes);
        self.theirs.write(address, bytes);
    }

    fn memory(&self) -> GuestMemory {
        let request =
            RegionRequest { guest_address: 0, size: RAM, frontend_address: 0, file_offset: 0 };
        GuestMemory::map([(request, self.ours.file.try_clone().unwrap())]).unwrap()
    }

    fn same(&self) -> bool {
        self.ours.read(0, RAM as usize) == self.theirs.read(0, RAM as usize)
    }
}

fn layout() -> RingLayout {
    RingLayout {
        size: SIZE,
        descriptors: GuestAddress(0),
        avail: GuestAddress(AVAIL),
        used: GuestAddress(USED),
    }
}

fn their_queue(event_idx: bool) -> Queue {
    let mut queue = Queue::new(SIZE).unwrap();
    queue.try_set_desc_table_address(GuestAddress(0)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    queue
}

/// Generates a descriptor, mostly valid: inside memory, chained within the table.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let flags = prop_oneof![8 => Just(0u16), 6 => Just(1u16), 1 => Just(2u16), 1 => Just(4u16)];
    (0x4000u64..0x10_100, 0u32..3000, flags, 0u16..SIZE + 1)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// For any ring contents, both implementations see the same chains and write the same bytes.
    #[test]
    fn virtqueue_agrees_with_virtio_queue_crate(
        table in proptest::collection::vec(descriptor(), usize::from(SIZE)),
        rounds in proptest::collection::vec(proptest::collection::vec(0u16..SIZE, 1..6), 1..8),
        event_idx: bool,
        events in proptest::collection::vec(0u16..40, 8),
    ) {
        let rings = Rings::new();
        for (index, (address, length, flags, next)) in table.iter().enumerate() {
            let descriptor = RawDescriptor::from(Descriptor::new(*address, *length, *flags, *next));
            let bytes: [u8; 16] = {
                let mut scratch = [0; 16];
                let memory = vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 16)]).unwrap();
                memory.write_obj(descriptor, GuestAddress(0)).unwrap();
                memory.read_slice(&mut scratch, GuestAddress(0)).unwrap();
                scratch
            };
            rings.write(16 * index as u64, &bytes);
        }
        let memory = rings.memory();
        let notification = Notification { event_idx, indirect: true };
        let mut ours = Virtqueue::<Readable>::start(&memory, layout(), notification).unwrap();
        let mut theirs = their_queue(event_idx);
        let mut avail = 0u16;
        let mut published = false;
        for (heads, event) in rounds.iter().zip(events) {
            for head in heads {
                rings.write(AVAIL + 4 + 2 * u64::from(avail % SIZE), &head.to_le_bytes());
                avail = avail.wrapping_add(1);
            }
            rings.write(AVAIL + 2, &avail.to_le_bytes());
            // used_event: sometimes near, sometimes far.
            rings.write(AVAIL + 4 + 2 * u64::from(SIZE), &event.to_le_bytes());

            let fault = ours.pop(ALL).err();
            let mut expected = VecDeque::new();
            while expected.len() < ours.in_flight() {
                let chain = theirs.iter(rings.theirs.memory()).unwrap().next().unwrap();
                let head = chain.head_index();
                let pieces: Vec<(u64, u32)> = chain
                    .map(|descriptor| (descriptor.addr().0, descriptor.len()))
                    .filter(|(_, length)| *length > 0)
                    .collect();
                expected.push_back((head, pieces));
            }
            for (head, pieces) in expected {
                let chain = ours.chain(ours.next_used());
                let bytes: u32 = pieces.iter().map(|(_, length)| length).sum();
                prop_assert_eq!(chain.len(), bytes as usize);
                prop_assert_eq!(chain.segments().len(), pieces.len());
                for (segment, (_, length)) in chain.segments().iter().zip(&pieces) {
                    prop_assert_eq!(segment.len(), *length as usize);
                }
                prop_assert_eq!(chain.head(), head);
                ours.push_used(bytes);
                theirs.add_used(rings.theirs.memory(), head, bytes).unwrap();
            }
            // virtio-queue reports no notification if nothing was added; this crate reports `Nothing`.
            let call = ours.publish();
            let needed = theirs.needs_notification(rings.theirs.memory()).unwrap();
            if call != Published::Nothing {
                // After a start we don't know what the driver has seen, and always call.
                prop_assert_eq!(call == Published::Call, needed || !published);
                published = true;
            }
            if fault.is_some() {
                // A malformed chain stops us; virtio-queue merely cuts it short.
                break;
            }
            prop_assert!(!ours.enable_notify().unwrap());
            prop_assert!(!theirs.enable_notification(rings.theirs.memory()).unwrap());
            prop_assert!(rings.same());
        }
    }
}

mod reference {
    //! A minimal loopback device on the `vhost-user-backend` crate.

    use std::sync::{Arc, Mutex, RwLock};

    use vhost::vhost_user::message::VhostUserProtocolFeatures;
    use vhost_user_backend::{VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
    use virtio_queue::{QueueOwnedT, QueueT};
    use vm_memory::{Bytes, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
    use vmm_sys_util::epoll::EventSet;
    use vmm_sys_util::event::{EventConsumer, EventNotifier};

    use crate::support::driver::{EVENT_IDX, HEADER, INDIRECT, MRG_RXBUF, PROTOCOL, VERSION_1};

    pub(super) struct Reference {
        memory: GuestMemoryAtomic<GuestMemoryMmap>,
    }

    impl VhostUserBackendMut for Reference {
        type Bitmap = ();
        type Vring = VringRwLock;

        fn num_queues(&self) -> usize {
            2
        }

        fn max_queue_size(&self) -> usize {
            1024
        }

        fn features(&self) -> u64 {
            VERSION_1 | MRG_RXBUF | EVENT_IDX | INDIRECT | PROTOCOL
        }

        fn protocol_features(&self) -> VhostUserProtocolFeatures {
            VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK
        }

        fn set_event_idx(&mut self, _enabled: bool) {}

        fn update_memory(
            &mut self,
            memory: GuestMemoryAtomic<GuestMemoryMmap>,
        ) -> std::io::Result<()> {
            self.memory = memory;
            Ok(())
        }

        fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
            None
        }

        fn handle_event(
            &mut self,
            _event: u16,
            _set: EventSet,
            vrings: &[VringRwLock],
            _thread: usize,
        ) -> std::io::Result<()> {
            let memory = self.memory.memory();
            let (mut rx, mut tx) = (vrings[0].get_mut(), vrings[1].get_mut());
            if !rx.get_queue().ready() || !tx.get_queue().ready() {
                return Ok(());
            }
            loop {
                tx.disable_notification().unwrap();
                loop {
                    let Some(frame) = tx.get_queue_mut().iter(memory.clone()).unwrap().next()
                    else {
                        break;
                    };
                    let Some(buffer) = rx.get_queue_mut().iter(memory.clone()).unwrap().next()
                    else {
                        break;
                    };
                    let mut bytes = Vec::new();
                    let (from, to) = (frame.head_index(), buffer.head_index());
                    for piece in frame {
                        let mut part = vec![0; piece.len() as usize];
                        memory.read_slice(&mut part, piece.addr()).unwrap();
                        bytes.extend(part);
                    }
                    bytes[..HEADER].fill(0);
                    bytes[10] = 1;
                    let target = buffer.into_iter().next().unwrap().addr();
                    memory.write_slice(&bytes, target).unwrap();
                    rx.add_used(to, bytes.len() as u32).unwrap();
                    tx.add_used(from, 0).unwrap();
                }
                if tx.needs_notification().unwrap() {
                    let _ = tx.signal_used_queue();
                }
                if rx.needs_notification().unwrap() {
                    let _ = rx.signal_used_queue();
                }
                if !tx.enable_notification().unwrap() {
                    return Ok(());
                }
            }
        }
    }

    type Daemon = VhostUserDaemon<Arc<RwLock<Reference>>>;

    /// Serves one connection at `path` in a new thread.
    pub(super) fn serve(path: std::path::PathBuf) -> std::thread::JoinHandle<()> {
        let ready = Arc::new(Mutex::new(false));
        let its_ready = ready.clone();
        let thread = std::thread::spawn(move || {
            let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
            let backend = Arc::new(RwLock::new(Reference { memory: memory.clone() }));
            let mut daemon = Daemon::new("reference".into(), backend, memory).unwrap();
            let mut listener = vhost::vhost_user::Listener::new(&path, true).unwrap();
            *its_ready.lock().unwrap() = true;
            daemon.start(&mut listener).unwrap();
            let _ = daemon.wait();
            // Its drop waits for worker threads that only an exit event would end.
            std::mem::forget(daemon);
        });
        crate::support::eventually("the reference backend listens", || *ready.lock().unwrap());
        thread
    }
}

#[test]
fn rings_equal_those_of_vhost_user_backend_crate() {
    use crate::support::daemon::Daemon;
    use crate::support::driver::{Card, HEADER, Options};
    use crate::support::frontend::{Frontend, PROTOCOL_FEATURES, pair};
    use std::os::unix::net::UnixStream;
    use vhost::vhost_user::message::FrontendReq;

    /// Runs a fixed conversation and fixed traffic. Returns all memory and every reply.
    fn converse(stream: UnixStream, features: u64) -> (Vec<u8>, Vec<u64>) {
        let spare = Daemon::start(&["--loopback"]);
        let options = Options { features, size: 64, ..Options::default() };
        let mut card = Card::prepare(Frontend::new(spare.connect()), options);
        card.frontend = Frontend::new(stream);
        let mut answers = Vec::new();
        let frontend = &mut card.frontend;
        let offered = frontend.get(FrontendReq::GET_FEATURES);
        assert_eq!(offered & features, features);
        let protocol =
            frontend.get(FrontendReq::GET_PROTOCOL_FEATURES) & PROTOCOL_FEATURES & 0b1001;
        answers.push(protocol);
        frontend.send(FrontendReq::SET_FEATURES, &features.to_ne_bytes());
        frontend.send(FrontendReq::SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes());
        frontend.ask(FrontendReq::SET_OWNER, &[], &[]);
        // Ours has a ring for commands as well.
        assert!(frontend.get(FrontendReq::GET_QUEUE_NUM) >= 2);
        frontend.set_mem_table(&[&card.ram]);
        // One frame at a time, so that both make the same steps.
        for slot in 0..64 {
            let area = card.rx[0].buffer_area();
            card.post(0, area + slot * 2048);
        }
        card.rx[0].publish();
        card.run();
        for number in 0..200u8 {
            card.send(0, &vec![number; 60 + usize::from(number)]);
            assert_eq!(card.receive(0)[HEADER..], vec![number; 60 + usize::from(number)]);
        }
        let frontend = &mut card.frontend;
        answers.push(frontend.get_vring_base(1).into());
        let refused = frontend.try_ask(FrontendReq::SET_VRING_NUM, &pair(0, 0), &[]);
        answers.push(u64::from(refused == Some(true)));
        (card.ram.read(0, card.ram.size as usize), answers)
    }

    for event_idx in [0, crate::support::driver::EVENT_IDX] {
        let features =
            (Options::default().features & !crate::support::driver::EVENT_IDX) | event_idx;
        let daemon = Daemon::start(&["--loopback"]);
        let (ours, our_answers) = converse(daemon.connect(), features);
        let path = daemon.directory().join("reference");
        let thread = reference::serve(path.clone());
        let (theirs, their_answers) = converse(UnixStream::connect(&path).unwrap(), features);
        thread.join().unwrap();
        assert_eq!(our_answers, their_answers);
        // Notification fields may differ (they are wishes, not results): flags and avail_event of
        // the used rings. Everything else, used rings and received frames, must not.
        let differing: Vec<usize> = (0..ours.len()).filter(|&at| ours[at] != theirs[at]).collect();
        assert!(
            differing.len() <= 8,
            "{} bytes differ, first {:x?}",
            differing.len(),
            differing.first()
        );
    }
}
