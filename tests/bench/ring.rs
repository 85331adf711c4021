//! What it costs to pop a chain and to retire it: our ring against `virtio-queue`, on memory of
//! two regions, with warm caches.

use std::fs::File;
use std::hint::black_box;
use std::time::Instant;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use vhost_user_net::guest::{
    Budget, Chain, GuestMemory, Notification, Readable, RegionRequest, RingLayout, Virtqueue,
};

use super::measure::{ROUNDS, median};
use crate::support::guest::memfd;

const SIZE: u16 = 256;
const BURST: u16 = 64;
const BURSTS: u32 = 100_000;
const AVAIL: u64 = 0x2000;
const USED: u64 = 0x3000;
/// Buffers lie in the second region.
const BUFFERS: u64 = 1 << 32;
const REGION: u64 = 1 << 20;

/// Nanoseconds per chain of `burst`, which handles one burst at the given avail index.
fn time(mut burst: impl FnMut(u16)) -> f64 {
    let mut avail = 0u16;
    let mut many = |count: u32| {
        for _ in 0..count {
            avail = avail.wrapping_add(BURST);
            burst(avail);
        }
    };
    many(BURSTS / 10);
    let rounds = (0..ROUNDS).map(|_| {
        let started = Instant::now();
        many(BURSTS);
        started.elapsed().as_nanos() as f64 / f64::from(BURSTS) / f64::from(BURST)
    });
    median(rounds.collect())
}

/// Memory of two regions whose ring offers a buffer of `length` bytes in the second by each head.
struct Rings {
    files: [File; 2],
    shared: GuestMemoryMmap,
}

const BASES: [u64; 2] = [0, BUFFERS];

impl Rings {
    fn new(length: u32) -> Self {
        let files = [memfd(REGION), memfd(REGION)];
        let ranges = BASES.iter().zip(&files).map(|(base, file)| {
            let offset = FileOffset::new(file.try_clone().unwrap(), 0);
            (GuestAddress(*base), REGION as usize, Some(offset))
        });
        let shared: GuestMemoryMmap = GuestMemoryMmap::from_ranges_with_files(ranges).unwrap();
        for head in 0..SIZE {
            let mut descriptor = (BUFFERS + 2048 * u64::from(head)).to_le_bytes().to_vec();
            descriptor.extend(length.to_le_bytes());
            descriptor.extend([0; 4]);
            shared.write_slice(&descriptor, GuestAddress(16 * u64::from(head))).unwrap();
            shared.write_obj(head, GuestAddress(AVAIL + 4 + 2 * u64::from(head))).unwrap();
        }
        Rings { files, shared }
    }

    fn offer(&self, avail: u16) {
        self.shared.write_obj(avail, GuestAddress(AVAIL + 2)).unwrap();
    }

    fn memory(&self) -> GuestMemory {
        let regions = BASES.iter().zip(&self.files).map(|(base, file)| {
            let request = RegionRequest {
                guest_address: *base,
                size: REGION,
                frontend_address: *base,
                file_offset: 0,
            };
            (request, file.try_clone().unwrap())
        });
        GuestMemory::map(regions).unwrap()
    }
}

fn start(memory: &GuestMemory) -> Virtqueue<'_, Readable> {
    let layout = RingLayout {
        size: SIZE,
        descriptors: GuestAddress(0),
        avail: GuestAddress(AVAIL),
        used: GuestAddress(USED),
    };
    let notification = Notification { event_idx: true, indirect: true };
    Virtqueue::start(memory, layout, notification).unwrap()
}

/// Has `bench` call what pops and retires a burst, at the given avail index, with our ring.
fn with_our_ring<T>(bench: impl FnOnce(&mut dyn FnMut(u16)) -> T) -> T {
    let rings = Rings::new(76);
    let memory = rings.memory();
    let mut queue = start(&memory);
    let budget = Budget { chains: BURST.into(), bytes: usize::MAX };
    bench(&mut |avail| {
        rings.offer(avail);
        queue.pop(budget).unwrap();
        for position in queue.positions(queue.next_avail()) {
            black_box(queue.chain(position).len());
        }
        queue.push_used_run(queue.in_flight());
        black_box(queue.publish());
    })
}

/// Has `bench` use the chain of a frame, which stands behind its header.
pub(super) fn with_frame(
    header: &[u8],
    frame: &[u8],
    bench: impl FnOnce(&Chain<'_, '_, Readable>),
) {
    let bytes = [header, frame].concat();
    let rings = Rings::new(bytes.len() as u32);
    rings.shared.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
    let memory = rings.memory();
    let mut queue = start(&memory);
    rings.offer(1);
    queue.pop(Budget { chains: 1, bytes: usize::MAX }).unwrap();
    bench(&queue.chain(queue.next_used()));
    queue.push_used(0);
}

/// Chains that [`count`] pops and retires.
pub(super) const COUNTED: u32 = 1000 * BURST as u32;

/// For callgrind: what it counts is what `counted_ring` calls.
pub(super) fn count() {
    with_our_ring(|burst| counted_ring(burst));
}

#[inline(never)]
fn counted_ring(burst: &mut dyn FnMut(u16)) {
    (1..=COUNTED / u32::from(BURST)).for_each(|number| burst((number * u32::from(BURST)) as u16));
}

pub(super) fn run() {
    let ours = with_our_ring(|burst| time(burst));

    let rings = Rings::new(76);
    let shared = &rings.shared;
    let mut queue = Queue::new(SIZE).unwrap();
    queue.try_set_desc_table_address(GuestAddress(0)).unwrap();
    queue.try_set_avail_ring_address(GuestAddress(AVAIL)).unwrap();
    queue.try_set_used_ring_address(GuestAddress(USED)).unwrap();
    queue.set_event_idx(true);
    queue.set_ready(true);
    let theirs = time(|avail| {
        rings.offer(avail);
        for _ in 0..BURST {
            let chain = queue.iter(shared).unwrap().next().unwrap();
            let head = chain.head_index();
            for descriptor in chain {
                black_box((descriptor.addr(), descriptor.len()));
            }
            queue.add_used(shared, head, 0).unwrap();
        }
        black_box(queue.needs_notification(shared).unwrap());
    });

    println!("\nring, ns per chain popped and retired (bursts of {BURST})");
    println!("  {:<34} {ours:8.1}", "vhost-user-net");
    println!("  {:<34} {theirs:8.1}   {:.1} times", "virtio-queue", theirs / ours);
}
