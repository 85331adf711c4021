//! Captures: copies of a port's frames in pcapng format, for an operator.
//!
//! Workers put copies into a queue of bounded size and never wait: if the queue is full, a frame is left out and
//! counted. A thread of the capture writes the queue to the client's descriptor, and ends when the client does.
//!
//! Invariant: the capture has the private start of a frame from the guest, which was checked and sent, if there is
//! one. Only the rest is read from guest memory.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use pcap_file::pcapng::PcapNgWriter;
use pcap_file::pcapng::blocks::enhanced_packet::{EnhancedPacketBlock, EnhancedPacketOption};
use pcap_file::pcapng::blocks::interface_description::{
    InterfaceDescriptionBlock, InterfaceDescriptionOption,
};
use pcap_file::pcapng::blocks::interface_statistics::{
    InterfaceStatisticsBlock, InterfaceStatisticsOption,
};
use pcap_file::{DataLink, Endianness, PcapError, PcapResult};

use crate::counters::DropReason;
use crate::frame::FrameDirection;
use crate::guest::ReadSegment;
use crate::policy::Filter;
use crate::sys::is_hung_up;

/// Largest snaplen in bytes: a whole GSO frame.
pub const MAX_SNAPLEN: u32 = 65_550;
/// Maximum number of frames in the queue.
const QUEUE_FRAMES: usize = 16 << 10;
/// Maximum number of bytes of frames in the queue.
const QUEUE_BYTES: usize = 16 << 20;
/// Bytes of a frame that a filter inspects: the longest headers that a filter can need.
const FILTER_BYTES: usize = 142;
/// Interval of checks for the end of the client, while the queue is empty.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// Parses the choice of frames to capture. `tcp dport 80; udp from 192.0.2.0/24` selects frames that match one of
/// the parts. A complete filter, with its default, selects the frames that it allows.
///
/// # Errors
/// The text is empty, or a part is not a valid rule.
pub fn parse_filter(text: &str) -> Result<Filter, String> {
    if text.contains("default") || text.trim() == "none" {
        return text.parse();
    }
    let parts = text.split(';').map(str::trim).filter(|part| !part.is_empty());
    let rules: Vec<String> = parts.map(|part| format!("allow {part}; ")).collect();
    if rules.is_empty() {
        return Err(
            "the filter is empty; write for example tcp dport 80, or leave out --filter".into()
        );
    }
    format!("{}default deny", rules.concat()).parse()
}

/// Options of a capture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Maximum number of bytes kept of a frame.
    pub snaplen: u32,
    /// Number of frames after which the capture ends; `None` for no limit.
    pub count: Option<u64>,
    /// Filter that allows the frames to capture.
    pub filter: Filter,
}

/// A captured frame.
struct Record {
    /// Time since the Unix epoch.
    time: Duration,
    direction: FrameDirection,
    pair: u16,
    dropped: Option<DropReason>,
    /// Length of the whole frame in bytes.
    length: u32,
    bytes: Vec<u8>,
}

/// The workers' end of a capture's queue.
#[derive(Debug)]
pub struct Recorder {
    snaplen: usize,
    filter: Filter,
    queue: SyncSender<Record>,
    /// Bytes of frames in the queue.
    queued: AtomicUsize,
    over: AtomicBool,
    written: AtomicU64,
    left_out: AtomicU64,
}

impl Recorder {
    /// Puts a copy of a frame into the queue, or counts the frame as left out if the queue is full.
    pub fn record<'a>(
        &self,
        direction: FrameDirection,
        pair: u16,
        dropped: Option<DropReason>,
        length: usize,
        segments: impl Iterator<Item = ReadSegment<'a>> + Clone,
    ) {
        if !self.filter.is_none() {
            let mut start = [0; FILTER_BYTES];
            let seen = copy(segments.clone(), &mut start[..length.min(FILTER_BYTES)]);
            if self.filter.check(&start[..seen]).is_err() {
                return;
            }
        }
        let kept = length.min(self.snaplen);
        if self.queued.load(Ordering::Relaxed) + kept > QUEUE_BYTES {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut bytes = vec![0; kept];
        let copied = copy(segments, &mut bytes);
        bytes.truncate(copied);
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.queued.fetch_add(copied, Ordering::Relaxed);
        let record = Record { time, direction, pair, dropped, length: length as u32, bytes };
        if self.queue.try_send(record).is_err() {
            self.queued.fetch_sub(copied, Ordering::Relaxed);
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Fills `target` from segments. Returns the number of bytes copied.
fn copy<'a>(segments: impl Iterator<Item = ReadSegment<'a>>, target: &mut [u8]) -> usize {
    let mut copied = 0;
    for segment in segments {
        if copied == target.len() {
            break;
        }
        copied += segment.read(&mut target[copied..]);
    }
    copied
}

/// Counts of a capture.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct CaptureStats {
    /// Frames that were written.
    pub captured: u64,
    /// Frames that were left out because the queue was full.
    pub left_out: u64,
}

/// The current capture of a port, if any. A port has at most one at a time.
#[derive(Debug, Default)]
pub struct Capture {
    on: AtomicBool,
    /// Recorder of the last capture, which may have ended.
    recorder: Mutex<Option<Arc<Recorder>>>,
}

impl Capture {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<Recorder>>> {
        // No thread panics while it holds the lock.
        self.recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns true if a capture runs.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Returns the recorder of the running capture, if one runs.
    #[inline]
    pub fn recorder(&self) -> Option<Arc<Recorder>> {
        if self.is_on() { self.lock().clone() } else { None }
    }

    /// Begins a capture of the port `name` with `pairs` queue pairs. A thread must [run](Writer::run) the writer.
    /// Returns `None` if a capture runs already.
    pub fn begin(
        self: &Arc<Self>,
        name: &str,
        pairs: usize,
        options: Options,
        output: File,
    ) -> Option<Writer> {
        let mut recorder = self.lock();
        if self.on.load(Ordering::Relaxed) {
            return None;
        }
        let (queue, records) = sync_channel(QUEUE_FRAMES);
        let new = Arc::new(Recorder {
            snaplen: options.snaplen as usize,
            filter: options.filter.clone(),
            queue,
            queued: AtomicUsize::new(0),
            over: AtomicBool::new(false),
            written: AtomicU64::new(0),
            left_out: AtomicU64::new(0),
        });
        *recorder = Some(new.clone());
        self.on.store(true, Ordering::Relaxed);
        let names = (0..pairs).map(|pair| format!("{name}/{pair}")).collect();
        Some(Writer { capture: self.clone(), recorder: new, records, options, names, output })
    }

    /// Stops the capture. The writer ends when it has written the queue. Returns the counts so far.
    pub fn stop(&self) -> CaptureStats {
        self.on.store(false, Ordering::Relaxed);
        let recorder = self.lock();
        let Some(recorder) = &*recorder else { return CaptureStats::default() };
        recorder.over.store(true, Ordering::Relaxed);
        recorder.stats()
    }
}

impl Recorder {
    fn stats(&self) -> CaptureStats {
        CaptureStats {
            captured: self.written.load(Ordering::Relaxed),
            left_out: self.left_out.load(Ordering::Relaxed),
        }
    }
}

/// The writer of a capture.
pub struct Writer {
    capture: Arc<Capture>,
    recorder: Arc<Recorder>,
    records: Receiver<Record>,
    options: Options,
    names: Vec<String>,
    output: File,
}

impl Writer {
    /// Writes until the capture is stopped, has reached its number of frames, or the reader has closed the output.
    ///
    /// # Errors
    /// A write fails, for another reason than a closed output.
    pub fn run(self) -> io::Result<CaptureStats> {
        let result = self.write_all();
        self.recorder.over.store(true, Ordering::Relaxed);
        {
            // Another capture may have begun.
            let recorder = self.capture.lock();
            if recorder.as_ref().is_some_and(|it| Arc::ptr_eq(it, &self.recorder)) {
                self.capture.on.store(false, Ordering::Relaxed);
            }
        }
        match result {
            Err(PcapError::IoError(error)) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(PcapError::IoError(error)) => return Err(error),
            Err(error) => return Err(io::Error::other(error)),
            Ok(()) => {}
        }
        Ok(self.recorder.stats())
    }

    fn write_all(&self) -> PcapResult<()> {
        // pcap-file writes a statistics block's time correctly in big-endian order only.
        let mut pcap =
            PcapNgWriter::with_endianness(BufWriter::new(&self.output), Endianness::Big)?;
        for name in &self.names {
            let options = vec![
                InterfaceDescriptionOption::IfName(Cow::Borrowed(name)),
                InterfaceDescriptionOption::IfDescription(Cow::Borrowed(
                    "queue pair of a virtio-net device; inbound is to the guest",
                )),
                // Nanoseconds.
                InterfaceDescriptionOption::IfTsResol(9),
            ];
            let snaplen = self.options.snaplen;
            let linktype = DataLink::ETHERNET;
            pcap.write_pcapng_block(InterfaceDescriptionBlock { linktype, snaplen, options })?;
        }
        let mut time = Duration::ZERO;
        loop {
            let record = match self.records.try_recv() {
                Ok(record) => record,
                Err(TryRecvError::Disconnected) => break,
                Err(TryRecvError::Empty) => {
                    pcap.get_mut().flush().map_err(PcapError::IoError)?;
                    match self.records.recv_timeout(POLL_INTERVAL) {
                        Ok(record) => record,
                        Err(RecvTimeoutError::Timeout) => {
                            let over = self.recorder.over.load(Ordering::Relaxed);
                            if over || is_hung_up(self.output.as_fd()) {
                                break;
                            }
                            continue;
                        }
                        Err(RecvTimeoutError::Disconnected) => break,
                    }
                }
            };
            self.recorder.queued.fetch_sub(record.bytes.len(), Ordering::Relaxed);
            time = record.time;
            pcap.write_pcapng_block(block(&record))?;
            let written = self.recorder.written.fetch_add(1, Ordering::Relaxed) + 1;
            if self.options.count.is_some_and(|count| written >= count) {
                break;
            }
        }
        // All interfaces share one queue, so the first interface has all counts.
        let CaptureStats { captured, left_out } = self.recorder.stats();
        let options = vec![
            InterfaceStatisticsOption::IsbIfRecv(captured + left_out),
            InterfaceStatisticsOption::IsbIfDrop(left_out),
        ];
        let timestamp = time.as_nanos() as u64;
        pcap.write_pcapng_block(InterfaceStatisticsBlock { interface_id: 0, timestamp, options })?;
        pcap.get_mut().flush().map_err(PcapError::IoError)
    }
}

fn block(record: &Record) -> EnhancedPacketBlock<'_> {
    // The lowest bits of the flags: 1 is inbound, 2 is outbound (draft-ietf-opsawg-pcapng, section
    // 4.3.1). Each queue pair is an interface.
    let direction = match record.direction {
        FrameDirection::Rx => 1,
        FrameDirection::Tx => 2,
    };
    let mut options = vec![EnhancedPacketOption::Flags(direction)];
    if let Some(reason) = record.dropped {
        let comment = format!("dropped: {}", reason.name());
        options.push(EnhancedPacketOption::Comment(Cow::Owned(comment)));
    }
    EnhancedPacketBlock {
        interface_id: record.pair.into(),
        timestamp: record.time,
        original_len: record.length,
        data: Cow::Borrowed(&record.bytes),
        options,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    fn begin(options: Options) -> (Arc<Capture>, Writer, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        let capture = Arc::new(Capture::default());
        let output = File::from(std::os::fd::OwnedFd::from(writer));
        let writer = capture.begin("vm", 2, options, output).unwrap();
        (capture, writer, reader)
    }

    fn put(recorder: &Recorder, bytes: &[u8]) {
        let segments = [ReadSegment::of_bytes(bytes)];
        recorder.record(FrameDirection::Tx, 1, None, bytes.len(), segments.into_iter());
    }

    #[test]
    fn filter_is_a_list_of_parts_or_complete() {
        let parse = |text: &str| parse_filter(text).map(|filter| filter.to_string());
        let parts = "allow tcp dport 80; allow icmp; default deny";
        assert_eq!(parse("tcp dport 80; icmp").as_deref(), Ok(parts));
        assert_eq!(parse("deny arp; default allow").as_deref(), Ok("deny arp; default allow"));
        assert_eq!(parse("none").as_deref(), Ok("none"));
        for wrong in ["", "port 80", "deny arp"] {
            assert!(parse_filter(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn full_queue_leaves_frames_out_and_never_blocks() {
        let options = Options { snaplen: 60_000, count: None, filter: Filter::default() };
        let (capture, writer, mut reader) = begin(options.clone());
        let recorder = capture.recorder().unwrap();
        let frame = vec![7; 60_000];
        let fits = QUEUE_BYTES / frame.len();
        for _ in 0..fits + 5 {
            put(&recorder, &frame);
        }
        assert!(
            capture.begin("vm", 2, options.clone(), File::open("/dev/null").unwrap()).is_none()
        );
        let thread = std::thread::spawn(move || writer.run().unwrap());
        capture.stop();
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        let stats = CaptureStats { captured: fits as u64, left_out: 5 };
        assert_eq!(thread.join().unwrap(), stats);
        assert_eq!(capture.stop(), stats);
        assert!(all.len() > fits * frame.len());
        assert!(capture.recorder().is_none());
    }

    #[test]
    fn capture_ends_with_its_reader_and_another_may_begin() {
        let options = Options { snaplen: 64, count: None, filter: Filter::default() };
        let (capture, writer, reader) = begin(options.clone());
        let thread = std::thread::spawn(move || writer.run().unwrap());
        drop(reader);
        thread.join().unwrap();
        assert!(capture.recorder().is_none());
        assert!(
            capture.begin("vm", 2, options.clone(), File::open("/dev/null").unwrap()).is_some()
        );
    }

    #[test]
    fn capture_keeps_to_count_and_snaplen() {
        let (capture, writer, mut reader) =
            begin(Options { snaplen: 10, count: Some(2), filter: Filter::default() });
        let recorder = capture.recorder().unwrap();
        (0..3).for_each(|_| put(&recorder, &[0xee; 100]));
        assert_eq!(writer.run().unwrap().captured, 2);
        let mut all = Vec::new();
        reader.read_to_end(&mut all).unwrap();
        assert_eq!(all.iter().filter(|byte| **byte == 0xee).count(), 2 * 10);
    }
}
