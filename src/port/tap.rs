//! A TAP device as port: frames go between guest memory and the kernel without a copy of ours.
//!
//! *transmit* hands the kernel a private, checked copy of the headers and the rest of the chain
//! where it lies, a burst with one io_uring submission or a `writev` per frame, whichever costs
//! less on this machine. *reap* has the kernel read each frame straight into the oldest buffers.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use log::warn;

use super::{Finished, Outcome, Port, Readiness};
use crate::config::TxMethod;
use crate::counters::Drop;
use crate::features::{HEADER_LENGTH, Negotiated, Offloads, PortOffloads};
use crate::guest::virtqueue::MAX_SEGMENTS;
use crate::guest::{Burst, Chain, Readable, Segment, Writable};
use crate::sys::tap::{Queue, offload};
use crate::sys::uring::{Comparison, MAX_WRITES, Writer, compare};
use crate::vnet_header::{Admission, LINK_OVERHEAD, MAX_FRAME, PrivateStart, VnetHeader, admit};

/// Frames that one turn reads.
const READS_PER_TURN: usize = 64;
/// Buffers that are borrowed ahead, which bounds what a session holds. Eight frames of 64 KiB in
/// the 1.5 KiB buffers of a Linux driver.
const POSTED: usize = 512;
/// Bursts from this many frames on go through io_uring: a submission of one costs more than a
/// `writev`.
const URING_FROM: usize = 2;
/// How long frames wait for the guest to provide the buffers that the largest of them could need.
const PATIENCE: Duration = Duration::from_millis(10);
/// How long a device that is gone is left alone.
const RETRY: Duration = Duration::from_secs(1);

/// One queue of a TAP device, for the daemon's life.
#[derive(Debug)]
pub struct TapQueue {
    queue: Queue,
    writer: Option<Writer>,
    /// Why bursts are written that way.
    reason: String,
    offloads: PortOffloads,
    /// What the device was last set to by this queue: header length and `TUN_F_*`.
    applied: Option<(usize, u32)>,
    /// Whether the kernel steers frames here. Nothing for a device that has one queue only.
    attached: Option<bool>,
}

impl TapQueue {
    /// Prepares an open queue: asks what the device can do, and chooses how to write.
    ///
    /// # Errors
    /// Those of the device's ioctls, and those of io_uring if `method` demands it.
    pub fn new(queue: Queue, method: TxMethod) -> io::Result<Self> {
        use offload::{CSUM, TSO_ECN, TSO4, TSO6, USO4, USO6};
        queue.set_header_length(HEADER_LENGTH)?;
        let tcp = CSUM | TSO4 | TSO6 | TSO_ECN;
        let udp_segmentation = queue.set_offload(tcp | USO4 | USO6).is_ok();
        let segmentation = udp_segmentation || queue.set_offload(tcp).is_ok();
        queue.set_offload(0)?;
        let multi_queue = queue.identity().multi_queue;
        if multi_queue {
            // No frame is steered here before a guest has buffers for it.
            queue.set_attached(false)?;
        }
        let (writer, reason) = choose_writer(&queue, method)?;
        Ok(TapQueue {
            queue,
            writer,
            reason,
            offloads: PortOffloads { segmentation, udp_segmentation },
            applied: None,
            attached: multi_queue.then_some(false),
        })
    }

    /// How bursts are written, and why so.
    pub fn tx_method(&self) -> String {
        let way = if self.writer.is_some() { "io_uring" } else { "writev" };
        format!("{way} ({})", self.reason)
    }

    /// What the device can do with a frame's offloads.
    pub fn offloads(&self) -> PortOffloads {
        self.offloads
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.queue.identity().name
    }

    /// Begins a session: the device leaves to the guest what the guest has accepted, and no more.
    pub fn session<'mem>(
        &'mem mut self,
        negotiated: &Negotiated,
        mtu: u16,
        receives: bool,
    ) -> TapPort<'mem> {
        let accepted = negotiated.guest();
        let header_length = negotiated.header_length();
        let prepared = self
            .apply(header_length, tun_offloads(&accepted))
            .and_then(|()| if receives { Ok(()) } else { self.set_attached(false) });
        let mut port = TapPort {
            host: self,
            mtu,
            admission: Admission { header_length, offloads: negotiated.host(), max_frame: 0 },
            transmitter: Transmitter::default(),
            receiver: Receiver {
                header_length,
                accepted,
                mergeable: negotiated.mergeable(),
                largest: 0,
                posted: VecDeque::new(),
                room: 0,
                window: Vec::new(),
                window_chains: 0,
                window_room: 0,
                may_have_frames: receives,
                short_since: None,
                make_do: false,
            },
            gone_since: None,
        };
        port.refresh_mtu();
        if let Err(error) = prepared {
            port.gone(&error);
        }
        port
    }

    /// Sets what applies to the whole device, if this queue has not done so already.
    fn apply(&mut self, header_length: usize, offloads: u32) -> io::Result<()> {
        let settings = (header_length, offloads);
        if self.applied != Some(settings) {
            self.queue.set_header_length(header_length)?;
            self.queue.set_offload(offloads)?;
            self.applied = Some(settings);
        }
        Ok(())
    }

    /// Has the kernel steer frames here, or not, if the device has several queues.
    fn set_attached(&mut self, attached: bool) -> io::Result<()> {
        if self.attached == Some(!attached) {
            self.queue.set_attached(attached)?;
            self.attached = Some(attached);
        }
        Ok(())
    }
}

/// An io_uring instance if bursts are to be written with one, and the reason.
fn choose_writer(queue: &Queue, method: TxMethod) -> io::Result<(Option<Writer>, String)> {
    if method == TxMethod::Writev {
        return Ok((None, "as configured".into()));
    }
    if queue.has_send_limit() {
        // Frames behind one that was refused for lack of room would overtake it.
        return Ok((None, "the device limits what it buffers".into()));
    }
    if method == TxMethod::IoUring {
        return Ok((Some(Writer::new(queue.as_fd())?), "as configured".into()));
    }
    let measured = compare().and_then(|costs| Ok((costs, Writer::new(queue.as_fd())?)));
    Ok(match measured {
        Ok((Comparison { io_uring, writev }, writer)) => {
            let reason = format!(
                "a frame's writing costs {} ns by io_uring and {} ns by writev here",
                io_uring.as_nanos(),
                writev.as_nanos()
            );
            ((io_uring < writev).then_some(writer), reason)
        }
        Err(error) => (None, format!("io_uring is not available: {error}")),
    })
}

/// `TUN_F_*` for what the guest has accepted.
fn tun_offloads(accepted: &Offloads) -> u32 {
    let mut flags = 0;
    for (on, flag) in [
        (accepted.checksum, offload::CSUM),
        (accepted.tcp4, offload::TSO4),
        (accepted.tcp6, offload::TSO6),
        // The kernel takes ECN only beside TSO.
        (accepted.ecn && (accepted.tcp4 || accepted.tcp6), offload::TSO_ECN),
        // The kernel takes both or none.
        (accepted.udp4 && accepted.udp6, offload::USO4 | offload::USO6),
    ] {
        if on {
            flags |= flag;
        }
    }
    flags
}

/// A session on a TAP queue.
#[derive(Debug)]
pub struct TapPort<'mem> {
    host: &'mem mut TapQueue,
    /// The MTU that the operator or the frontend set.
    mtu: u16,
    admission: Admission,
    transmitter: Transmitter<'mem>,
    receiver: Receiver<'mem>,
    /// When the device was last found to be gone.
    gone_since: Option<Instant>,
}

/// Chains on their way out.
#[derive(Debug, Default)]
struct Transmitter<'mem> {
    /// The checked start of each frame of a burst.
    starts: Vec<PrivateStart>,
    /// Chain's place in the burst, and its part of the list of segments.
    bounds: Vec<(usize, Range<usize>)>,
    done: Vec<(Chain<'mem, Readable>, Outcome)>,
    /// The device had no room for the last frame.
    blocked: bool,
    bursts_since_woken: usize,
}

/// Buffers for frames to come.
#[derive(Debug)]
struct Receiver<'mem> {
    header_length: usize,
    accepted: Offloads,
    mergeable: bool,
    /// Longest frame in bytes that the device can deliver, header included.
    largest: usize,
    posted: VecDeque<Chain<'mem, Writable>>,
    /// Bytes in `posted`.
    room: usize,
    /// Segments of the oldest `window_chains` chains, which are what the next frame may take.
    window: Vec<Segment<'mem>>,
    window_chains: usize,
    window_room: usize,
    may_have_frames: bool,
    /// Since when frames have waited for more buffers.
    short_since: Option<Instant>,
    /// They waited long enough: read with the buffers that there are.
    make_do: bool,
}

impl<'mem> TapPort<'mem> {
    /// The device's MTU can be changed at any time.
    fn refresh_mtu(&mut self) {
        let device = self.host.queue.mtu().unwrap_or(0) as usize;
        let frame = device.max(usize::from(self.mtu)) + LINK_OVERHEAD;
        self.admission.max_frame = frame;
        let segmentation = self.receiver.accepted.segmentation();
        self.receiver.largest =
            self.receiver.header_length + if segmentation { MAX_FRAME } else { frame };
    }

    /// Notes that the device does not work: its frames are dropped, and it is tried again later.
    fn gone(&mut self, error: &io::Error) {
        if self.gone_since.replace(Instant::now()).is_none() {
            warn!("tap {}: the device is gone, frames are dropped: {error}", self.host.name());
        }
    }

    /// Writes the frames that were admitted, and notes in `outcomes`, which holds the drops
    /// already, what became of each. Returns how many chains are dealt with; the rest wait for
    /// room.
    fn write_burst(
        &mut self,
        burst: &Burst<'mem, Readable>,
        outcomes: &mut [Outcome; MAX_WRITES],
        count: usize,
    ) -> usize {
        let Transmitter { starts, bounds, blocked, .. } = &mut self.transmitter;
        // The checked start of each frame, then its chain from there on.
        let mut segments: Vec<Segment<'_>> = Vec::with_capacity(2 * count);
        bounds.clear();
        for (index, chain) in burst.iter().take(count).enumerate() {
            if outcomes[index] != Outcome::Sent {
                continue;
            }
            let start = starts[index].bytes();
            let from = segments.len();
            segments.push(Segment::of_bytes(start));
            let mut skip = start.len();
            for segment in chain.segments() {
                if skip >= segment.len() {
                    skip -= segment.len();
                } else {
                    segments.push(segment.skip(skip));
                    skip = 0;
                }
            }
            bounds.push((index, from..segments.len()));
        }

        if let Some(writer) = self.host.writer.as_mut().filter(|_| bounds.len() >= URING_FROM) {
            let mut results = [0; MAX_WRITES];
            let mut frames = bounds.iter().map(|(_, part)| &segments[part.clone()]);
            match writer.write_all(&mut frames, &mut results) {
                Ok(()) => {
                    for ((index, _), result) in bounds.iter().zip(results) {
                        if result < 0 {
                            outcomes[*index] = Outcome::Dropped(Drop::HostRefused);
                        }
                    }
                    return count;
                }
                Err(error) => {
                    let name = &self.host.queue.identity().name;
                    warn!(
                        "tap {name}: io_uring failed, writing frame by frame from now on: {error}"
                    );
                    self.host.writer = None;
                }
            }
        }
        for (index, part) in bounds {
            match self.host.queue.write(&segments[part.clone()]) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    *blocked = true;
                    return *index;
                }
                Err(_) => outcomes[*index] = Outcome::Dropped(Drop::HostRefused),
            }
        }
        count
    }
}

impl<'mem> Port<'mem> for TapPort<'mem> {
    fn transmit(&mut self, burst: &mut Burst<'mem, Readable>) {
        self.transmitter.blocked = false;
        // A worker that goes from burst to burst does not wait, and so hears of no frames. After
        // one burst it most often does wait, and a read that finds nothing would be for nothing.
        self.receiver.may_have_frames |= self.transmitter.bursts_since_woken > 0;
        self.transmitter.bursts_since_woken += 1;
        while !burst.is_empty() && !self.transmitter.blocked {
            let count = burst.len().min(MAX_WRITES);
            self.transmitter.starts.resize_with(MAX_WRITES, PrivateStart::default);
            let mut outcomes = [Outcome::Sent; MAX_WRITES];
            let mut asked = false;
            for (index, chain) in burst.iter().take(count).enumerate() {
                let starts = &mut self.transmitter.starts;
                let mut admitted = admit(chain, &self.admission, &mut starts[index]);
                if admitted == Err(Drop::TooLong) && !asked {
                    // Or the device's MTU was raised: once a burst it is asked.
                    asked = true;
                    self.refresh_mtu();
                    let starts = &mut self.transmitter.starts;
                    admitted = admit(chain, &self.admission, &mut starts[index]);
                }
                if let Err(reason) = admitted {
                    outcomes[index] = Outcome::Dropped(reason);
                }
            }
            let dealt_with = self.write_burst(burst, &mut outcomes, count);
            self.transmitter.done.extend(burst.drain(..dealt_with).zip(outcomes));
        }
    }

    fn post(&mut self, buffers: &mut Burst<'mem, Writable>) {
        if buffers.is_empty() {
            return;
        }
        if let Err(error) = self.host.set_attached(true) {
            self.gone(&error);
        }
        self.receiver.take(buffers);
    }

    fn reap(&mut self, finished: &mut Finished<'mem>) {
        finished.tx.append(&mut self.transmitter.done);
        if !self.receiver.may_have_frames || self.gone_since.is_some_and(|at| at.elapsed() < RETRY)
        {
            return;
        }
        let dropped = finished.rx_dropped.len();
        for _ in 0..READS_PER_TURN {
            if !self.receiver.can_read() {
                break;
            }
            match self.receiver.read(&self.host.queue) {
                Ok(length) => self.receiver.deliver(length, finished),
                Err(error) => match error.raw_os_error() {
                    Some(libc::EAGAIN) => {
                        self.receiver.may_have_frames = false;
                        break;
                    }
                    // The frame is lost: the guest's buffer has no room for a header, or is gone.
                    Some(libc::EINVAL | libc::EFAULT) => finished.rx_dropped.push(Drop::NoRoom),
                    _ => {
                        self.gone(&error);
                        return;
                    }
                },
            }
            self.gone_since = None;
        }
        if finished.rx_dropped.len() > dropped {
            self.refresh_mtu();
        }
    }

    fn readiness(&self) -> Readiness<'_> {
        let timeout = match self.gone_since {
            Some(_) => Some(RETRY),
            None => self.receiver.short_since.map(|since| PATIENCE.saturating_sub(since.elapsed())),
        };
        Readiness {
            fd: self.gone_since.is_none().then(|| self.host.queue.as_fd()),
            read: self.receiver.watches(),
            write: self.transmitter.blocked,
            starved: !self.receiver.has_room(),
            timeout,
        }
    }

    fn woken(&mut self, readable: bool) {
        self.transmitter.bursts_since_woken = 0;
        if self.receiver.watches() && self.gone_since.is_none() {
            self.receiver.may_have_frames = readable;
        }
    }

    fn recall(&mut self, finished: &mut Finished<'mem>) {
        finished.tx.append(&mut self.transmitter.done);
        finished.unused_rx.extend(self.receiver.posted.drain(..));
    }
}

impl<'mem> Receiver<'mem> {
    fn take(&mut self, buffers: &mut Burst<'mem, Writable>) {
        let wanted = POSTED.saturating_sub(self.posted.len()).min(buffers.len());
        // Without buffers nobody has looked for frames.
        self.may_have_frames |= self.posted.is_empty();
        for chain in buffers.drain(..wanted) {
            self.room += chain.len();
            self.posted.push_back(chain);
        }
        self.make_do = false;
    }

    /// Whether the largest frame that may come fits the buffers posted.
    ///
    /// A frame that is read into too few is lost, and a TAP does not tell the next frame's
    /// length. So frames wait for the guest's buffers instead, but for [`PATIENCE`] only, since
    /// the guest may have no more.
    fn has_room(&self) -> bool {
        match self.posted.len() {
            0 => false,
            POSTED => true,
            _ => !self.mergeable || self.room >= self.largest,
        }
    }

    fn may_read(&self) -> bool {
        self.has_room() || (self.make_do && !self.posted.is_empty())
    }

    /// Whether to wait for the device: not while frames are known to wait for buffers.
    fn watches(&self) -> bool {
        !self.posted.is_empty() && (self.may_read() || !self.may_have_frames)
    }

    /// As `may_read`, and keeps the time that frames have waited.
    fn can_read(&mut self) -> bool {
        if self.has_room() || self.posted.is_empty() {
            self.short_since = None;
        } else if !self.make_do {
            let since = *self.short_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= PATIENCE {
                self.make_do = true;
                self.short_since = None;
            }
        }
        self.may_read()
    }

    /// Reads the next frame into the oldest buffers; returns its length with header.
    fn read(&mut self, queue: &Queue) -> io::Result<usize> {
        let most = if self.mergeable { self.posted.len() } else { 1 };
        while self.window_room < self.largest && self.window_chains < most {
            let chain = &self.posted[self.window_chains];
            if self.window.len() + chain.segments().len() > MAX_SEGMENTS {
                break;
            }
            self.window.extend_from_slice(chain.segments());
            self.window_chains += 1;
            self.window_room += chain.len();
        }
        queue.read(&mut self.window)
    }

    /// Gives back the buffers that the frame of `length` bytes takes, or counts it as dropped.
    fn deliver(&mut self, length: usize, finished: &mut Finished<'mem>) {
        if length > self.window_room {
            finished.rx_dropped.push(Drop::NoRoom);
            return;
        }
        if length < self.header_length {
            finished.rx_dropped.push(Drop::TooShort);
            return;
        }
        if let Err(reason) = self.fit_header_to_guest() {
            finished.rx_dropped.push(reason);
            return;
        }
        let (mut left, mut buffers, mut segments) = (length, 0u16, 0);
        let first = finished.rx.len();
        while left > 0 {
            let chain = self.posted.pop_front().expect("the window has room for the frame");
            let part = left.min(chain.len());
            left -= part;
            buffers += 1;
            segments += chain.segments().len();
            self.room -= chain.len();
            self.window_room -= chain.len();
            self.window_chains -= 1;
            finished.rx.push((chain, part as u32));
        }
        self.window.drain(..segments);
        if self.header_length == HEADER_LENGTH {
            // The kernel knows a header of 10 bytes only, and leaves the rest as it was.
            finished.rx[first].0.write_at(10, &buffers.to_le_bytes());
        }
        finished.rx_frames += 1;
        finished.rx_bytes += (length - self.header_length) as u64;
    }

    /// Looks at the header that the kernel wrote. The device was set to what the guest accepts,
    /// but frames may have been queued before that.
    fn fit_header_to_guest(&self) -> Result<(), Drop> {
        let mut bytes = [0; 10];
        let buffer = &self.posted[0];
        buffer.read_start(&mut bytes);
        let header = VnetHeader::parse(&bytes);
        if !header.accepted_by(&self.accepted) {
            return Err(Drop::NotAccepted);
        }
        if !self.accepted.checksum && header.flags != 0 {
            // Section 5.1.6.4.1: flags are zero without GUEST_CSUM.
            buffer.write_at(0, &[0]);
        }
        Ok(())
    }
}
