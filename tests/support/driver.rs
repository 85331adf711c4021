//! A virtio-net driver over test memory: split rings, direct and indirect descriptors, with and without
//! EVENT_IDX.

use std::sync::Arc;

use vhost::vhost_user::message::FrontendReq;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::eventually;
use super::frontend::{Frontend, addresses, pair};
use super::guest::{Ram, huge_memfd, memfd};

pub(crate) const EVENT_IDX: u64 = 1 << 29;
pub(crate) const INDIRECT: u64 = 1 << 28;
pub(crate) const MRG_RXBUF: u64 = 1 << 15;
pub(crate) const VERSION_1: u64 = 1 << 32;
/// VHOST_F_LOG_ALL, which the frontend sets while it migrates the guest.
pub(crate) const LOG_ALL: u64 = 1 << 26;
pub(crate) const IN_ORDER: u64 = 1 << 35;
pub(crate) const PROTOCOL: u64 = 1 << 30;
pub(crate) const CSUM: u64 = 1;
pub(crate) const GUEST_CSUM: u64 = 1 << 1;
/// HOST_TSO4, HOST_TSO6.
pub(crate) const HOST_TSO: u64 = 1 << 11 | 1 << 12;
/// GUEST_TSO4, GUEST_TSO6.
pub(crate) const GUEST_TSO: u64 = 1 << 7 | 1 << 8;

/// Size of a huge page in bytes.
pub(crate) const HUGE: u64 = 2 << 20;

/// Length of the virtio header in bytes.
pub(crate) const HEADER: usize = 12;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT_FLAG: u16 = 4;

/// The driver's side of one ring.
#[derive(Debug)]
pub(crate) struct Ring {
    ram: Arc<Ram>,
    pub(crate) index: u32,
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) avail: u64,
    pub(crate) used: u64,
    /// Start of the memory for buffers and indirect tables.
    buffers: u64,
    /// Descriptors that are not in use.
    free: Vec<u16>,
    /// Descriptors of each head that is in use.
    in_use: Vec<Vec<u16>>,
    pub(crate) avail_index: u16,
    pub(crate) used_index: u16,
    event_idx: bool,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) error: EventFd,
}

/// Returns the bytes of memory that a ring needs, with its buffers.
pub(crate) fn footprint(size: u16, buffer: u64) -> u64 {
    (u64::from(size) * (16 + 2 + 8 + 256) + 0x1000).next_multiple_of(0x1000)
        + u64::from(size) * buffer
}

impl Ring {
    /// Lays out a zeroed ring from address `base`.
    pub(crate) fn new(ram: &Arc<Ram>, index: u32, base: u64, size: u16, event_idx: bool) -> Self {
        let entries = u64::from(size);
        let avail = base + 16 * entries;
        let used = (avail + 6 + 2 * entries).next_multiple_of(4);
        let buffers = (used + 6 + 8 * entries).next_multiple_of(64);
        ram.write(base, &vec![0; (buffers - base) as usize]);
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        Ring {
            ram: ram.clone(),
            index,
            size,
            descriptors: base,
            avail,
            used,
            buffers,
            free: (0..size).rev().collect(),
            in_use: vec![Vec::new(); size.into()],
            avail_index: 0,
            used_index: 0,
            event_idx,
            kick: event(),
            call: event(),
            error: event(),
        }
    }

    /// Returns the address of the buffers, which follow the indirect tables of 256 bytes for each head.
    pub(crate) fn buffer_area(&self) -> u64 {
        (self.buffers + u64::from(self.size) * 256).next_multiple_of(0x1000)
    }

    /// Returns address and length of the used ring, which the device writes.
    pub(crate) fn used_area(&self) -> (u64, u64) {
        (self.used, 6 + 8 * u64::from(self.size))
    }

    pub(crate) fn write_descriptor(
        &self,
        table: u64,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.ram.write(table + 16 * u64::from(index), &bytes);
    }

    /// Writes `pieces` as a chain to the entries `slots` of `table`.
    fn write_chain(&self, table: u64, slots: &[u16], pieces: &[(u64, u32)], write: bool) {
        for (i, (address, length)) in pieces.iter().enumerate() {
            let next = slots.get(i + 1);
            let flags = if write { WRITE } else { 0 } | if next.is_some() { NEXT } else { 0 };
            self.write_descriptor(
                table,
                slots[i],
                *address,
                *length,
                flags,
                next.copied().unwrap_or(0),
            );
        }
    }

    /// Adds a chain to the available ring; [`publish`](Self::publish) stores the index. Returns its head, or
    /// nothing if the ring is full.
    pub(crate) fn add(&mut self, pieces: &[(u64, u32)], write: bool) -> Option<u16> {
        if self.free.len() < pieces.len() {
            return None;
        }
        let slots = self.free.split_off(self.free.len() - pieces.len());
        self.write_chain(self.descriptors, &slots, pieces, write);
        Some(self.offer(slots))
    }

    /// Adds a chain with an indirect table, as [`add`](Self::add) does.
    pub(crate) fn add_indirect(&mut self, pieces: &[(u64, u32)], write: bool) -> Option<u16> {
        let head = self.free.pop()?;
        self.describe_indirect(head, pieces, write);
        Some(self.offer(vec![head]))
    }

    /// Writes `pieces` to the head's indirect table, at most 15.
    pub(crate) fn describe_indirect(&self, head: u16, pieces: &[(u64, u32)], write: bool) {
        assert!(pieces.len() <= 15);
        // A table may have any alignment.
        let table = self.buffers + 256 * u64::from(head) + u64::from(head % 16);
        let slots: Vec<u16> = (0..pieces.len() as u16).collect();
        self.write_chain(table, &slots, pieces, write);
        let length = 16 * pieces.len() as u32;
        self.write_descriptor(self.descriptors, head, table, length, INDIRECT_FLAG, 0);
    }

    /// Writes a head to the next entry of the available ring.
    fn offer(&mut self, slots: Vec<u16>) -> u16 {
        let head = slots[0];
        self.in_use[usize::from(head)] = slots;
        self.offer_head(head);
        head
    }

    pub(crate) fn offer_head(&mut self, head: u16) {
        let entry = self.avail + 4 + 2 * u64::from(self.avail_index % self.size);
        self.ram.write(entry, &head.to_le_bytes());
        self.avail_index = self.avail_index.wrapping_add(1);
    }

    /// Returns the number of descriptors that are not in use.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Stores the available index, and kicks if the device asked for it. Reports whether it kicked.
    pub(crate) fn publish(&mut self) -> bool {
        let before = self.ram.load(self.avail + 2);
        self.ram.store(self.avail + 2, self.avail_index);
        let wanted = if self.event_idx {
            let event = self.avail_event();
            let now = self.avail_index;
            now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
        } else {
            self.ram.load(self.used) & 1 == 0
        };
        if wanted {
            self.kick.write(1).unwrap();
        }
        wanted
    }

    /// Returns the device's `avail_event`.
    pub(crate) fn avail_event(&self) -> u16 {
        self.ram.load(self.used + 4 + 8 * u64::from(self.size))
    }

    /// Reports whether the used ring has entries that were not taken.
    pub(crate) fn has_used(&self) -> bool {
        self.ram.load(self.used + 2) != self.used_index
    }

    /// Takes the next used entry of a ring whose caller tracks heads. Returns head and bytes written.
    pub(crate) fn next_used(&mut self) -> Option<(u16, u32)> {
        if !self.has_used() {
            return None;
        }
        let entry = self.used + 4 + 8 * u64::from(self.used_index % self.size);
        self.used_index = self.used_index.wrapping_add(1);
        Some((self.ram.read_u32(entry) as u16, self.ram.read_u32(entry + 4)))
    }

    /// Takes the next used entry and frees its descriptors. Returns head and bytes written.
    pub(crate) fn take_used(&mut self) -> Option<(u16, u32)> {
        let (head, length) = self.next_used()?;
        let slots = std::mem::take(&mut self.in_use[usize::from(head)]);
        assert!(!slots.is_empty(), "head {head} was used twice");
        self.free.extend(slots);
        Some((head, length))
    }

    /// Makes the chains of all used entries available again. Returns their number.
    pub(crate) fn recycle(&mut self) -> usize {
        let used = self.ram.load(self.used + 2);
        let count = used.wrapping_sub(self.used_index);
        for _ in 0..count {
            let entry = self.used + 4 + 8 * u64::from(self.used_index % self.size);
            let head = self.ram.read_u32(entry) as u16;
            self.used_index = self.used_index.wrapping_add(1);
            self.offer_head(head);
        }
        count.into()
    }

    /// Asks the device to call with the next used entry.
    pub(crate) fn want_call(&self) {
        if self.event_idx {
            self.ram.store(self.avail + 4 + 2 * u64::from(self.size), self.used_index);
        } else {
            self.ram.store(self.avail, 0);
        }
    }

    /// Asks the device not to call.
    pub(crate) fn want_no_call(&self) {
        if self.event_idx {
            let far = self.used_index.wrapping_sub(1).wrapping_add(0x8000);
            self.ram.store(self.avail + 4 + 2 * u64::from(self.size), far);
        } else {
            self.ram.store(self.avail, 1);
        }
    }

    /// Waits for the next used entry, and takes it.
    #[track_caller]
    pub(crate) fn wait_used(&mut self) -> (u16, u32) {
        let mut used = None;
        eventually("a used entry", || {
            used = self.take_used();
            used.is_some()
        });
        used.unwrap()
    }

    /// Sets up the ring in the daemon and starts it at index `base`.
    pub(crate) fn start(&self, frontend: &mut Frontend, base: u16) {
        frontend.ask(FrontendReq::SET_VRING_NUM, &pair(self.index, self.size.into()), &[]);
        frontend.ask(FrontendReq::SET_VRING_BASE, &pair(self.index, base.into()), &[]);
        let place = addresses(self.index, 0, self.descriptors, self.used, self.avail);
        frontend.ask(FrontendReq::SET_VRING_ADDR, &place, &[]);
        frontend.event(FrontendReq::SET_VRING_ERR, self.index, Some(&self.error));
        frontend.event(FrontendReq::SET_VRING_KICK, self.index, Some(&self.kick));
        frontend.event(FrontendReq::SET_VRING_CALL, self.index, Some(&self.call));
    }
}

/// Options of a [`Card`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    pub(crate) features: u64,
    pub(crate) size: u16,
    pub(crate) pairs: u32,
    /// Bytes of each rx buffer, header included.
    pub(crate) buffer: u32,
    /// Chains have indirect tables.
    pub(crate) indirect: bool,
    /// Guest memory consists of huge pages.
    pub(crate) huge: bool,
}

impl Options {
    pub(crate) const DEFAULT: Self = Options {
        features: VERSION_1 | EVENT_IDX | INDIRECT | MRG_RXBUF | PROTOCOL,
        size: 256,
        pairs: 1,
        buffer: 2048,
        indirect: false,
        huge: false,
    };
}

impl Default for Options {
    fn default() -> Self {
        Self::DEFAULT
    }
}

/// A guest's virtio-net device: its frontend, its memory and its driver's rings.
#[derive(Debug)]
pub(crate) struct Card {
    pub(crate) frontend: Frontend,
    pub(crate) ram: Arc<Ram>,
    pub(crate) rx: Vec<Ring>,
    pub(crate) tx: Vec<Ring>,
    pub(crate) options: Options,
    /// Address of each rx head's buffer, by queue pair.
    rx_buffers: Vec<Vec<u64>>,
}

impl Card {
    /// Negotiates, shares memory, fills the rx rings and starts all rings.
    pub(crate) fn start(frontend: Frontend, options: Options) -> Self {
        let mut card = Card::prepare(frontend, options);
        card.fill();
        card.run();
        card
    }

    /// Negotiates and shares memory, with empty and stopped rings.
    pub(crate) fn prepare(mut frontend: Frontend, mut options: Options) -> Self {
        frontend.begin();
        options.features = frontend.set_features(options.features);
        let each = footprint(options.size, u64::from(options.buffer).max(2048));
        let size = (each * u64::from(2 * options.pairs)).next_multiple_of(HUGE);
        let file = if options.huge { huge_memfd(size).unwrap() } else { memfd(size) };
        let ram = Arc::new(Ram::of(file, 0, size));
        frontend.set_mem_table(&[&ram]);
        let ring = |index: u32| {
            let event_idx = options.features & EVENT_IDX != 0;
            Ring::new(&ram, index, u64::from(index) * each, options.size, event_idx)
        };
        Card {
            rx: (0..options.pairs).map(|pair| ring(2 * pair)).collect(),
            tx: (0..options.pairs).map(|pair| ring(2 * pair + 1)).collect(),
            rx_buffers: vec![vec![0; options.size.into()]; options.pairs as usize],
            frontend,
            ram,
            options,
        }
    }

    pub(crate) fn run(&mut self) {
        for ring in self.rx.iter().chain(&self.tx) {
            ring.start(&mut self.frontend, 0);
            self.frontend.enable(ring.index, true);
        }
    }

    /// Negotiates over a new connection, and starts the rings with their contents.
    pub(crate) fn resume(&mut self, frontend: Frontend) {
        self.frontend = frontend;
        self.frontend.begin();
        self.frontend.set_features(self.options.features);
        let ram = self.ram.clone();
        self.frontend.set_mem_table(&[&ram]);
        self.run();
    }

    /// Fills every rx ring.
    pub(crate) fn fill(&mut self) {
        (0..self.rx.len()).for_each(|pair| self.fill_from(pair, 0));
    }

    /// Fills the rest of an rx ring, from buffer `first`.
    pub(crate) fn fill_from(&mut self, pair: usize, first: u64) {
        let area = self.rx[pair].buffer_area();
        for slot in first..u64::from(self.options.size) {
            self.post(pair, area + slot * u64::from(self.options.buffer));
        }
        self.rx[pair].publish();
    }

    /// Returns the address of an rx head's buffer.
    pub(crate) fn rx_buffer(&self, pair: usize, head: u16) -> u64 {
        self.rx_buffers[pair][usize::from(head)]
    }

    /// Adds one rx buffer at `address`. The caller publishes it.
    pub(crate) fn post(&mut self, pair: usize, address: u64) {
        self.post_pieces(pair, &[(address, self.options.buffer)]);
    }

    /// Adds one rx buffer of several adjacent pieces. The caller publishes it.
    pub(crate) fn post_pieces(&mut self, pair: usize, pieces: &[(u64, u32)]) {
        let ring = &mut self.rx[pair];
        let head = if self.options.indirect {
            ring.add_indirect(pieces, true)
        } else {
            ring.add(pieces, true)
        };
        self.rx_buffers[pair][usize::from(head.unwrap())] = pieces[0].0;
    }

    /// Writes header and frame to tx buffer `slot` and adds the chain. The caller publishes it.
    pub(crate) fn queue_tx(&mut self, pair: usize, slot: u64, header: &[u8], frame: &[u8]) -> u16 {
        let address = self.tx[pair].buffer_area() + slot * 2048;
        self.ram.write(address, header);
        self.ram.write(address + header.len() as u64, frame);
        let pieces = [(address, (header.len() + frame.len()) as u32)];
        let ring = &mut self.tx[pair];
        let head = if self.options.indirect {
            ring.add_indirect(&pieces, false)
        } else {
            ring.add(&pieces, false)
        };
        head.unwrap()
    }

    /// Sends one frame with an empty header and waits until the device has used it.
    #[track_caller]
    pub(crate) fn send(&mut self, pair: usize, frame: &[u8]) {
        self.send_with(pair, &[0; HEADER], frame);
    }

    #[track_caller]
    pub(crate) fn send_with(&mut self, pair: usize, header: &[u8], frame: &[u8]) {
        let head = self.queue_tx(pair, 0, header, frame);
        self.tx[pair].publish();
        assert_eq!(self.tx[pair].wait_used(), (head, 0));
    }

    /// Takes the next received frame with its header, if any, and posts its buffers again.
    pub(crate) fn try_receive(&mut self, pair: usize) -> Option<Vec<u8>> {
        let (frame, buffers) = self.try_take(pair)?;
        buffers.into_iter().for_each(|address| self.post(pair, address));
        self.rx[pair].publish();
        Some(frame)
    }

    /// Takes the next received frame, and the addresses of its buffers.
    fn try_take(&mut self, pair: usize) -> Option<(Vec<u8>, Vec<u64>)> {
        let (head, length) = self.rx[pair].take_used()?;
        let mut buffers = vec![self.rx_buffers[pair][usize::from(head)]];
        let mut frame = self.ram.read(buffers[0], length as usize);
        let count = usize::from(u16::from_le_bytes([frame[10], frame[11]]));
        while buffers.len() < count {
            // The used index covers the whole frame at once.
            let (head, length) = self.rx[pair]
                .take_used()
                .unwrap_or_else(|| panic!("{} of {count} buffers are used", buffers.len()));
            let address = self.rx_buffers[pair][usize::from(head)];
            frame.extend(self.ram.read(address, length as usize));
            buffers.push(address);
        }
        Some((frame, buffers))
    }

    /// Posts all used buffers again, without reading them. Returns their number. The benchmark uses this
    /// cheap way.
    #[allow(dead_code)]
    pub(crate) fn recycle(&mut self, pair: usize) -> usize {
        let recycled = self.rx[pair].recycle();
        if recycled > 0 {
            self.rx[pair].publish();
        }
        recycled
    }

    /// Waits for a frame, and does not post its buffers again.
    #[track_caller]
    pub(crate) fn receive_once(&mut self, pair: usize) -> Vec<u8> {
        let mut taken = None;
        eventually("a frame", || {
            taken = self.try_take(pair);
            taken.is_some()
        });
        taken.unwrap().0
    }

    #[track_caller]
    pub(crate) fn receive(&mut self, pair: usize) -> Vec<u8> {
        let mut frame = None;
        eventually("a frame", || {
            frame = self.try_receive(pair);
            frame.is_some()
        });
        frame.unwrap()
    }

    /// Sends `count` frames of different lengths in bursts. Checks that a loopback port returns each frame
    /// once, unchanged and in order.
    #[track_caller]
    pub(crate) fn check_echo(&mut self, count: usize) {
        let frame = |number: usize| {
            let mut frame = vec![number as u8; 60 + number * 7 % 1400];
            frame[14..22].copy_from_slice(&(number as u64).to_le_bytes());
            frame
        };
        let (mut sent, mut back) = (0, 0);
        let what = format!("all frames come back with {:?}", self.options);
        eventually(&what, || {
            while self.tx[0].take_used().is_some() {}
            // At most a quarter of the ring is in flight, so that no frame lacks an rx buffer.
            while sent < count && sent - back < usize::from(self.options.size) / 4 {
                let slot = (sent % usize::from(self.options.size)) as u64;
                self.queue_tx(0, slot, &[0; HEADER], &frame(sent));
                sent += 1;
            }
            self.tx[0].publish();
            while let Some(received) = self.try_receive(0) {
                assert_eq!(received[HEADER..], frame(back), "frame {back}");
                back += 1;
            }
            back == count && self.tx[0].used_index == self.tx[0].avail_index
        });
    }
}
