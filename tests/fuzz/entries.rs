//! The entries that the fuzzer calls with its bytes, and `tests/fuzzing.rs` with its corpus. They assert
//! properties that hold for any bytes. The sanitizer finds memory errors.

#[path = "receiver.rs"]
mod receiver;

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost_user_net::api::{self, Command};
use vhost_user_net::config::PortOptions;
use vhost_user_net::counters::DropReason;
use vhost_user_net::device::{Device, Refusal};
use vhost_user_net::features::{Negotiated, Offer, OfferOptions, PortOffloads, protocol_features};
use vhost_user_net::frame::Headers;
use vhost_user_net::guest::{
    Budget, Chain, Direction, GuestMemory, Notification, Readable, RegionRequest, RingLayout,
    Virtqueue, Writable,
};
use vhost_user_net::net_config::{MacAddress, NetConfig};
use vhost_user_net::policy::filter::{MAX_INSTRUCTIONS, classic, extended};
use vhost_user_net::policy::{
    AllowedSources, AntiSpoofing, Filter, FilterView, Limit, Limiter, Limits, LiveFilter,
};
use vhost_user_net::port::HostQueue;
use vhost_user_net::port::af_xdp::segmentation::Segmentation;
use vhost_user_net::port::{Completions, TxStages};
use vhost_user_net::protocol::{Connection, Event};
use vhost_user_net::sandbox::Sandbox;
use vhost_user_net::vnet_header::{HeaderCopy, Validated};
use vhost_user_net::worker::{Worker, WorkerOptions};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Bytes of each of two regions, which are adjacent in guest addresses only.
const REGION: u64 = 0x4000;
/// Usual addresses of a ring's parts, near the start, so that few bytes make a whole ring.
const AVAIL: u64 = 0x200;
const USED: u64 = 0x280;
const FRONTEND_BASE: u64 = 0x5555_0000_0000;

fn memfd(size: u64) -> File {
    let file = File::from(memfd_create(c"fuzz", MFdFlags::empty()).unwrap());
    file.set_len(size).unwrap();
    file
}

fn offer() -> Offer {
    let options = OfferOptions { guest_segmentation: true, mac: true, ring_reset: true };
    Offer::new(PortOffloads::ALL, options)
}

/// Takes the next `N` bytes, filled up with zeros.
fn take<const N: usize>(data: &mut &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    let count = N.min(data.len());
    bytes[..count].copy_from_slice(&data[..count]);
    *data = &data[count..];
    bytes
}

fn byte(data: &mut &[u8]) -> u8 {
    take::<1>(data)[0]
}

/// Guest memory and the file of each region.
struct Guest {
    files: [File; 2],
    memory: GuestMemory,
}

impl Guest {
    fn new() -> Self {
        let files = [memfd(REGION), memfd(REGION)];
        let request = |index: u64| RegionRequest {
            guest_address: index * REGION,
            size: REGION,
            frontend_address: FRONTEND_BASE + index * REGION,
            file_offset: 0,
        };
        let regions = (0..).zip(&files).map(|(i, file)| (request(i), file.try_clone().unwrap()));
        let memory = GuestMemory::map(regions).unwrap();
        Guest { files, memory }
    }

    /// Writes the bytes to the start of memory, and zeros to the rest.
    fn write(&self, data: &[u8]) {
        let mut bytes = vec![0; 2 * REGION as usize];
        let length = data.len().min(bytes.len());
        bytes[..length].copy_from_slice(&data[..length]);
        for (file, part) in self.files.iter().zip(bytes.chunks(REGION as usize)) {
            file.write_all_at(part, 0).unwrap();
        }
    }

    /// Checks that each segment of a chain lies inside a region.
    fn check<D: Direction>(&self, chain: &Chain<'_, '_, D>) {
        let mut total = 0;
        for segment in chain.segments() {
            let inside = |start: usize, length: usize| {
                segment.address() >= start && segment.address() + segment.len() <= start + length
            };
            assert!(self.memory.mappings().any(|region| inside(region.start(), region.length())));
            total += segment.len();
        }
        assert_eq!(total, chain.len());
    }
}

thread_local! {
    static GUEST: Guest = Guest::new();
    static FLIPPER: Flipper = GUEST.with(Flipper::start);
    static SERVED: RefCell<Served> = RefCell::new(Served::new());
}

/// Takes a ring's layout and notification features from the first bytes. Most layouts are valid.
fn ring(data: &mut &[u8]) -> (RingLayout, Notification) {
    let [size, flags] = take(data);
    let place = |data: &mut &[u8], usual: u64| {
        let [kind, low, high] = take(data);
        match kind {
            0xff => u64::from(u16::from_le_bytes([low, high])) << 1,
            _ => usual,
        }
    };
    let layout = RingLayout {
        size: 1 << (size % 6),
        descriptors: GuestAddress(place(data, 0)),
        avail: GuestAddress(place(data, AVAIL)),
        used: GuestAddress(place(data, USED)),
    };
    (layout, Notification { event_idx: flags & 1 != 0, indirect: flags & 2 != 0 })
}

/// Walks a ring as a worker does. `each` gets every popped chain, and returns the bytes written.
fn walk<D: Direction>(
    guest: &Guest,
    layout: RingLayout,
    notification: Notification,
    mut each: impl FnMut(&Chain<'_, '_, D>) -> u32,
) {
    let Ok(mut queue) = Virtqueue::<D>::start(&guest.memory, layout, notification) else { return };
    for last in [false, false, false, false, true] {
        let budget = Budget { chains: 8, bytes: 1 << 20 };
        let popped = queue.pop(budget);
        assert!(queue.in_flight() <= usize::from(layout.size), "more chains than heads");
        for position in queue.positions(queue.next_avail()) {
            guest.check(&queue.chain(position));
        }
        if last {
            // As at the end of a session.
            queue.unpop_all();
            assert_eq!((queue.in_flight(), queue.bytes_in_flight()), (0, 0));
            return;
        }
        queue.disable_notify();
        let mut completed = Vec::new();
        while queue.in_flight() > 0 {
            let chain = queue.chain(queue.next_used());
            let written = each(&chain);
            completed.push((chain.head(), chain.len()));
            queue.push_used(written);
        }
        // Completed chains stay readable until their publication.
        assert_eq!(queue.completed(), completed.len());
        for (index, (head, length)) in (0..).zip(completed) {
            let chain = queue.chain(queue.published().wrapping_add(index));
            assert_eq!(chain.head(), head);
            assert!(chain.len() <= length);
        }
        queue.publish();
        if popped.is_err() || queue.enable_notify().is_err() {
            return;
        }
    }
}

/// Reads the bytes as a ring, its descriptors and their memory.
pub fn rings(mut data: &[u8]) {
    let (layout, notification) = ring(&mut data);
    GUEST.with(|guest| {
        guest.write(data);
        walk_both(guest, layout, notification);
    });
}

fn walk_both(guest: &Guest, layout: RingLayout, notification: Notification) {
    let mut start = HeaderCopy::default();
    let stages = stages(&negotiated(u64::MAX));
    walk::<Readable>(guest, layout, notification, |chain| {
        check_stages(chain, &stages, &mut start);
        let mut bytes = [0; 64];
        chain.read_start(&mut bytes);
        0
    });
    walk::<Writable>(guest, layout, notification, |chain| {
        chain.write_at(0, &[0x5a; 12]);
        chain.write_at(chain.len() / 2, &[0xa5; 100]);
        chain.len().min(u32::MAX as usize) as u32
    });
}

/// A thread that writes to guest memory while it has a seed, and otherwise sleeps.
struct Flipper {
    seed: Arc<AtomicU64>,
    /// The thread has seen that there is no seed.
    idle: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Flipper {
    /// Value that ends the thread. Seeds are odd.
    const END: u64 = 2;

    fn start(guest: &Guest) -> Self {
        let file = FileOffset::new(guest.files[0].try_clone().unwrap(), 0);
        let range = (GuestAddress(0), REGION as usize, Some(file));
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files([range]).unwrap();
        let mut flipper = Flipper { seed: Arc::default(), idle: Arc::default(), thread: None };
        let (seed, idle) = (flipper.seed.clone(), flipper.idle.clone());
        flipper.thread = Some(std::thread::spawn(move || {
            loop {
                let wanted = seed.load(Ordering::SeqCst);
                idle.store(wanted == 0, Ordering::SeqCst);
                match wanted {
                    0 => std::thread::park(),
                    Self::END => return,
                    _ => {}
                }
                let mut state = wanted;
                while state != 0 && seed.load(Ordering::Relaxed) == wanted {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    // More often descriptors and indexes than other memory.
                    let limit = [0x100, AVAIL + 0x10, USED + 0x10, REGION][(state % 4) as usize];
                    let place = (state >> 8) % limit;
                    memory.write_obj((state >> 32) as u8, GuestAddress(place)).unwrap();
                }
            }
        }));
        flipper
    }

    fn wake(&self, seed: u64) {
        self.seed.store(seed, Ordering::SeqCst);
        self.thread.as_ref().unwrap().thread().unpark();
    }

    fn run(&self, seed: u64, meanwhile: impl FnOnce()) {
        self.idle.store(false, Ordering::SeqCst);
        self.wake(seed | 1);
        meanwhile();
        self.seed.store(0, Ordering::SeqCst);
        while !self.idle.load(Ordering::SeqCst) {
            std::thread::yield_now();
        }
    }
}

impl std::ops::Drop for Flipper {
    fn drop(&mut self) {
        self.wake(Self::END);
        let _ = self.thread.take().unwrap().join();
    }
}

/// Reads the bytes as [`rings`] does, while another thread writes to the memory.
pub fn race(mut data: &[u8]) {
    let (layout, notification) = ring(&mut data);
    GUEST.with(|guest| {
        FLIPPER.with(|flipper| {
            let seed = u64::from_le_bytes(take(&mut { data }));
            guest.write(data);
            flipper.run(seed, || (0..4).for_each(|_| walk_both(guest, layout, notification)));
        });
    });
}

fn negotiated(bits: u64) -> Negotiated {
    offer().accept(bits & offer().bits()).unwrap()
}

fn stages(negotiated: &Negotiated) -> TxStages {
    let filter = FilterView::new(Arc::default());
    let mut stages = TxStages::new(negotiated, 1522, None, filter, Arc::default());
    stages.headers.copies_small = negotiated.mergeable();
    stages.begin_burst(&Completions::default());
    stages
}

/// Returns anti-spoofing for a guest with this Ethernet address, two IP prefixes and VLAN 7.
fn rules(mac: [u8; 6]) -> AntiSpoofing {
    let addresses = ["192.0.2.0/24", "2001:db8::/32"].map(|net| net.parse().unwrap());
    let macs = vec![MacAddress(mac)];
    AntiSpoofing::new(AllowedSources { macs, addresses: addresses.to_vec(), vlans: vec![7] })
}

/// Reads the bytes as the start of a guest's frame, and as the text of a rate limit or a filter.
pub fn policy(data: &[u8]) {
    if data.len() >= 14 {
        let mac = data[6..12].try_into().unwrap();
        let verdict = rules(mac).check(data);
        assert_ne!(verdict, Err(DropReason::TooShort));
        let mut other = mac;
        other[5] ^= 1;
        assert_eq!(rules(other).check(data), Err(DropReason::SpoofedMac));
        if verdict.is_ok() {
            // A shorter frame may pass or not, but must not panic.
            let _ = rules(mac).check(&data[..data.len() - 1]);
        }
    }
    check_filters(data);
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(limit) = text.parse::<Limit>()
    {
        assert_eq!(limit.to_string().parse(), Ok(limit));
        let limiter = Limiter::new(&limit);
        limiter.charge(u64::from(u32::MAX), u64::from(u32::MAX));
        limiter.admit([(0, 0), (1, 1), (45, 65_536)].into_iter());
        limiter.allowance();
        limiter.wait();
    }
}

/// Checks that a filter and its opposite do not both pass the bytes as a frame. Parses the bytes as a filter
/// too.
fn check_filters(data: &[u8]) {
    const RULES: &str = "WORD tcp dport 25 from 192.0.2.0/24; WORD udp sport 1-9; WORD icmp; \
        WORD icmp6 to 2001:db8::/33; WORD ethertype 0x88cc; WORD proto 50; WORD ip6 from ::/0";
    let check = |word: &str, default: &str| {
        let text = format!("{}; default {default}", RULES.replace("WORD", word));
        text.parse::<Filter>().unwrap().check(data)
    };
    let passes = check("allow", "deny").is_ok();
    assert!(!passes || check("deny", "allow").is_err(), "allowed and denied by the same rules");
    if let Ok(filter) = std::str::from_utf8(data).unwrap_or_default().parse::<Filter>() {
        assert_eq!(filter.to_string().parse(), Ok(filter.clone()));
        assert!(classic(&filter).len() <= MAX_INSTRUCTIONS);
        extended(&filter);
        let _ = filter.check(data);
    }
}

/// Checks that a sent frame passes the same rules as the checked frame.
fn check_sent(sent: &[u8], stages: &TxStages) {
    if let Some(rules) = &stages.anti_spoofing {
        assert_eq!(rules.check(sent), Ok(()), "the sent headers are the checked ones");
    }
    if let Some(filter) = stages.filter.current() {
        assert_eq!(filter.check(sent), Ok(()), "the sent headers are the checked ones");
    }
}

/// Checks a frame as a port does, and then the result.
fn check_stages(chain: &Chain<'_, '_, Readable>, stages: &TxStages, start: &mut HeaderCopy) {
    match stages.check(chain, start) {
        Ok(Validated::Copied) => {
            check_admitted(start, stages, chain.len() - stages.header_length());
        }
        Ok(Validated::Plain) => {
            assert!(!stages.inspects_headers(), "checked headers are copied");
            let length = chain.len() - stages.header_length();
            assert!((14..=stages.headers.max_frame).contains(&length));
        }
        Err(_) => {}
    }
}

/// Checks the guarantees for a validated frame.
fn check_admitted(start: &HeaderCopy, stages: &TxStages, length: usize) {
    let header = start.header();
    assert!(header.accepted_by(&stages.headers.offloads), "{header:?}");
    if header.needs_checksum() {
        let end = usize::from(header.csum_start) + usize::from(header.csum_offset) + 2;
        assert!(end <= length, "{header:?} of {length} bytes");
    }
    if !header.needs_segmentation() {
        assert!(length <= stages.headers.max_frame);
    }
    let whole = &start.bytes()[stages.header_length()..];
    check_sent(whole, stages);
    if header.needs_checksum() && stages.inspects_headers() {
        let at = usize::from(header.csum_start) + usize::from(header.csum_offset);
        for value in [0, 0x19, 0xff] {
            let mut completed = whole.to_vec();
            completed.iter_mut().skip(at).take(2).for_each(|byte| *byte = value);
            check_sent(&completed, stages);
        }
    }
    let Some(how) = Segmentation::of(&header, whole, length) else {
        assert!(!header.needs_segmentation(), "a frame that cannot be segmented: {header:?}");
        return;
    };
    assert!(header.gso_size > 0 && how.headers() <= length);
    let mut offset = 0;
    loop {
        let headers = how.headers_at(whole, offset);
        assert!(how.headers() + how.payload_at(offset) <= how.longest());
        assert_eq!(headers[..12], whole[..12], "the addresses stay");
        check_sent(&headers[..how.headers()], stages);
        if how.is_last(offset) {
            break;
        }
        offset += how.payload_at(offset);
    }
    assert_eq!(offset + how.payload_at(offset) + how.headers(), length);
}

/// Reads the bytes as features, a header and a frame, in several segments.
pub fn headers(mut data: &[u8]) {
    let bits = u64::from_le_bytes(take(&mut data));
    let [pieces, piece] = take(&mut data);
    // The frame is padded with 0x11 to this length.
    let [low, high] = take(&mut data);
    let length = usize::from(u16::from_le_bytes([low, high]));
    let negotiated = negotiated(bits);
    let mut stages = stages(&negotiated);
    let address = stages.header_length() + 6;
    if bits >> 63 == 1
        && let Some(mac) = data.get(address..).and_then(|rest| rest.first_chunk())
    {
        stages.anti_spoofing = Some(Arc::new(rules(*mac)));
    }
    if bits >> 62 & 1 == 1 {
        let filter = "deny tcp dport 0-99; allow udp; deny sport 1; default allow";
        let live = Arc::new(LiveFilter::new(filter.parse().unwrap()));
        stages.filter = FilterView::new(live);
    }
    stages.begin_burst(&Completions::default());
    let mut bytes = data.to_vec();
    bytes.resize(length.clamp(data.len().min(0x3000), 0x3000), 0x11);
    Headers::parse(&bytes);
    GUEST.with(|guest| {
        // Descriptors at 0, then the ring; the frame in the second region.
        let mut memory = vec![0; 2 * REGION as usize];
        let count = usize::from(pieces % 8) + 1;
        let each = (usize::from(piece) + 1).min(bytes.len().max(1));
        let mut place = 0;
        for index in 0..count {
            let rest = bytes.len() - place;
            let length = if index + 1 == count { rest } else { each.min(rest) };
            let next = u16::from(index + 1 < count);
            let descriptor = &mut memory[16 * index..16 * index + 16];
            descriptor[..8].copy_from_slice(&(REGION + place as u64).to_le_bytes());
            descriptor[8..12].copy_from_slice(&(length as u32).to_le_bytes());
            descriptor[12..14].copy_from_slice(&next.to_le_bytes());
            descriptor[14..16].copy_from_slice(&(index as u16 + 1).to_le_bytes());
            place += length;
        }
        memory[AVAIL as usize + 2] = 1;
        memory[REGION as usize..][..bytes.len()].copy_from_slice(&bytes);
        guest.write(&memory);
        let layout = RingLayout {
            size: 16,
            descriptors: GuestAddress(0),
            avail: GuestAddress(AVAIL),
            used: GuestAddress(USED),
        };
        let mut start = HeaderCopy::default();
        let mut seen = 0;
        walk::<Readable>(
            guest,
            layout,
            Notification { event_idx: false, indirect: false },
            |chain| {
                seen += 1;
                assert_eq!(chain.len(), bytes.len());
                check_stages(chain, &stages, &mut start);
                0
            },
        );
        assert_eq!(seen, 1);
    });
}

/// A device with a worker, and the descriptors that a frontend may send.
struct Served {
    device: Device,
    memory: File,
    short: File,
    event: EventFd,
}

impl Served {
    fn new() -> Self {
        let options = WorkerOptions {
            name: "fuzz/0".into(),
            cpu: None,
            busy_poll: Some(Duration::ZERO),
            limits: Arc::new(Limits {
                rx: Limiter::new(&Limit::default()),
                tx: Limiter::new(&Limit::default()),
            }),
            pair: 0,
            capture: Default::default(),
            tx_filter: Arc::default(),
            peers: Arc::default(),
            sandbox: Sandbox::NONE,
        };
        let worker = Worker::start(HostQueue::Loopback, options, Default::default()).unwrap();
        let config = NetConfig { mac: Default::default(), queue_pairs: 1, mtu: 1500, link: true };
        Served {
            device: Device::new("fuzz".into(), offer(), config, vec![worker]),
            memory: memfd(REGION),
            short: memfd(0x1000),
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
        }
    }

    fn counters(&self) -> serde_json::Value {
        serde_json::to_value(&self.device.workers()[0].status().counters).unwrap()
    }

    fn descriptor(&self, kind: u8) -> RawFd {
        match kind % 4 {
            0 => self.memory.as_raw_fd(),
            1 => self.short.as_raw_fd(),
            2 => self.event.as_raw_fd(),
            _ => 0,
        }
    }
}

/// Reads the bytes as guest memory and a frontend's messages with descriptors.
///
/// A message consists of request, flags, number of descriptors, their kinds, payload length and payload.
/// Request 255 is a payload without a header.
pub fn messages(mut data: &[u8]) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let mut connection = Connection::new(ours).unwrap();
    SERVED.with_borrow_mut(|served| {
        // The rings' part of memory only, which leaves bytes for messages.
        let memory = &data[..data.len().min(128 * usize::from(byte(&mut data) % 8))];
        served.memory.write_all_at(memory, 0).unwrap();
        data = &data[memory.len().min(data.len())..];
        for _ in 0..64 {
            if data.is_empty() {
                break;
            }
            let [code, flags, count, kind, length] = take(&mut data);
            let payload = &data[..usize::from(length).min(data.len())];
            data = &data[payload.len()..];
            let mut bytes = Vec::new();
            if code != 255 {
                let length =
                    if flags & 0x80 != 0 { u32::from(flags) } else { payload.len() as u32 };
                for word in [u32::from(code), 1 | u32::from(flags & 0x48), length] {
                    bytes.extend(word.to_ne_bytes());
                }
            }
            bytes.extend(payload);
            let fds: Vec<RawFd> = (0..count % 10)
                .map(|index| served.descriptor(kind.rotate_right(index.into())))
                .collect();
            if theirs.send_with_fds(&[&bytes[..]], &fds).is_err() && fds.is_empty() {
                continue;
            }
            if !drain(&mut connection, &mut served.device) {
                break;
            }
            // Nobody reads the replies, so the socket may become full.
        }
        served.device.forget();
    });
}

/// Handles all received messages. Reports whether the connection is still open.
fn drain(connection: &mut Connection, device: &mut Device) -> bool {
    loop {
        let message = match connection.receive() {
            Ok(Event::Message(message)) => message,
            Ok(Event::Pending) => return true,
            Ok(Event::Closed) | Err(_) => return false,
        };
        let code = message.code;
        match device.handle(message) {
            Ok(Some(reply)) => {
                if connection.send(code, reply).is_err() {
                    return false;
                }
            }
            Ok(_) | Err(Refusal::Refused(_)) => {}
            Err(Refusal::Unanswerable(_)) => return false,
        }
    }
}

/// Reads the bytes as a filter's text, up to the first line feed, and a frame. The classic BPF program must
/// agree with the user-space filter, and both with a receiver.
pub fn filters(data: &[u8]) {
    const FILTER: &str = "deny tcp dport 0-3 from 192.0.2.0/24; allow udp sport 1-9; deny other; \
        allow proto 41; deny arp; allow ip6 to 2001:db8::/33; default allow";
    let (text, frame) = match data.iter().position(|byte| *byte == b'\n') {
        Some(end) => (&data[..end], &data[end + 1..]),
        None => (&data[..0], data),
    };
    let given = std::str::from_utf8(text).ok().and_then(|text| text.parse::<Filter>().ok());
    let filter = given.unwrap_or_else(|| FILTER.parse().unwrap());
    let passes = |text: &str, frame: &[u8]| text.parse::<Filter>().unwrap().check(frame).is_ok();
    // The kernel delivers no shorter frames.
    if frame.len() >= 14 {
        let classic = receiver::run(&classic(&filter), frame) != 0;
        assert_eq!(classic, filter.check(frame).is_ok(), "{filter} of {frame:02x?}");
        receiver::check_received(frame, passes);
    }
}

/// Reads the bytes as a line from a client of the control socket.
pub fn requests(line: &[u8]) {
    let Ok(command) = api::parse(line) else { return };
    // An accepted request, written out, parses to the same request.
    let mut again = serde_json::to_value(&command).unwrap();
    again["version"] = api::VERSION.into();
    assert_eq!(api::parse(again.to_string().as_bytes()), Ok(command.clone()));
    match command {
        Command::Add { port, .. } | Command::Change { port, .. } => check_options(*port),
        Command::Set { changes, .. } => check_options(PortOptions::default().with(*changes)),
        _ => {}
    }
}

/// Checks that accepted options are consistent, and are accepted again.
fn check_options(options: PortOptions) {
    let Ok(config) = options.absolute().check() else { return };
    assert!(
        config.queue_pairs > 0 && config.queue_pairs <= vhost_user_net::net_config::MAX_QUEUE_PAIRS
    );
    assert_eq!(
        config.options.clone().check().as_ref(),
        Ok(&config),
        "the options are the same when checked again"
    );
}

/// Reads the bytes as a device's state. No counter may decrease, and the state saved afterwards must be the
/// one in force.
pub fn states(state: &[u8]) {
    SERVED.with_borrow_mut(|served| {
        let before = served.counters();
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let mut connection = Connection::new(ours).unwrap();
        let ask = |connection: &mut Connection, device: &mut Device, code: u32, payload: &[u8]| {
            let mut bytes = [code, 1, payload.len() as u32].map(u32::to_ne_bytes).concat();
            bytes.extend(payload);
            (&theirs).write_all(&bytes).unwrap();
            drain(connection, device)
        };
        // SET_PROTOCOL_FEATURES.
        let features = protocol_features().bits().to_ne_bytes();
        assert!(ask(&mut connection, &mut served.device, 16, &features));
        let transfer = |connection: &mut Connection, device: &mut Device, load: u32, fd: RawFd| {
            let bytes = [42, 1, 8, load, 0].map(u32::to_ne_bytes).concat();
            theirs.send_with_fds(&[&bytes[..]], &[fd]).unwrap();
            drain(connection, device)
        };
        let (reader, mut writer) = std::io::pipe().unwrap();
        // A pipe holds this much.
        writer.write_all(&state[..state.len().min(60_000)]).unwrap();
        drop(writer);
        assert!(transfer(&mut connection, &mut served.device, 1, reader.as_raw_fd()));
        // CHECK_DEVICE_STATE.
        assert!(ask(&mut connection, &mut served.device, 43, &[]));
        let after = served.counters();
        let (mut numbers, mut earlier) = (Vec::new(), Vec::new());
        collect(&after, &mut numbers);
        collect(&before, &mut earlier);
        assert_eq!(numbers.len(), earlier.len());
        for (now, before) in numbers.iter().zip(earlier) {
            assert!(*now >= before && *now < 1 << 57, "{before} became {now}: {before:?}");
        }
        let (mut reader, writer) = std::io::pipe().unwrap();
        assert!(transfer(&mut connection, &mut served.device, 0, writer.as_raw_fd()));
        drop(writer);
        let mut saved = Vec::new();
        reader.read_to_end(&mut saved).unwrap();
        let saved: serde_json::Value = serde_json::from_slice(&saved).unwrap();
        assert_eq!(saved["pairs"][0], after);
        served.device.forget();
    });
}

/// Collects all numbers of a value, in order.
fn collect(value: &serde_json::Value, numbers: &mut Vec<u64>) {
    match value {
        serde_json::Value::Number(number) => numbers.extend(number.as_u64()),
        serde_json::Value::Array(list) => list.iter().for_each(|it| collect(it, numbers)),
        serde_json::Value::Object(map) => map.values().for_each(|it| collect(it, numbers)),
        _ => {}
    }
}
