//! A port's frames for an operator to look at, as pcapng.
//!
//! Invariant: of a frame from the guest a capture has the private start that was judged and sent, where
//! there is one, and guest memory only for the rest.
//!
//! Workers put copies into a queue of bounded size and never wait: what finds no room is left out, and
//! counted. A thread of the capture's own writes them to whoever has asked, and ends with them.

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

/// Longest part of a frame that is kept, in bytes: an unsegmented one whole.
pub const MAX_SNAPLEN: u32 = 65_550;
/// Frames that may wait to be written.
const QUEUE: usize = 16 << 10;
/// Bytes of frames that may wait to be written.
const QUEUE_BYTES: usize = 16 << 20;
/// Bytes of a frame that a filter looks at, which are all that it may need.
const FILTERED: usize = 142;
/// How often to look whether whoever reads has gone, while there is nothing to write.
const LOOK: Duration = Duration::from_millis(100);

/// Reads which frames are to be captured: `tcp dport 80; udp from 192.0.2.0/24` are those that match one
/// of the parts; a whole list of rules, with its default, is taken as it is.
///
/// # Errors
/// As for a filter's rules.
pub fn parse_filter(text: &str) -> Result<Filter, String> {
    if text.contains("default") || text.trim() == "none" {
        return text.parse();
    }
    let parts = text.split(';').map(str::trim).filter(|part| !part.is_empty());
    let rules: Vec<String> = parts.map(|part| format!("allow {part}; ")).collect();
    if rules.is_empty() {
        return Err("it names no frames: write tcp dport 80, or leave it out for all".into());
    }
    format!("{}default deny", rules.concat()).parse()
}

/// What is to be captured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Bytes that are kept of a frame.
    pub snaplen: u32,
    /// Frames after which the capture ends; none: when it is stopped.
    pub count: Option<u64>,
    /// Which frames: those that it allows.
    pub filter: Filter,
}

/// A captured frame.
struct Record {
    time: Duration,
    way: FrameDirection,
    pair: u16,
    dropped: Option<DropReason>,
    length: u32,
    bytes: Vec<u8>,
}

/// Where workers put frames, until the capture is over.
#[derive(Debug)]
pub struct Recorder {
    snaplen: usize,
    filter: Filter,
    queue: SyncSender<Record>,
    waiting: AtomicUsize,
    over: AtomicBool,
    written: AtomicU64,
    left_out: AtomicU64,
}

impl Recorder {
    /// Puts a frame's copy into the queue, or counts that there is no room.
    pub fn record<'a>(
        &self,
        way: FrameDirection,
        pair: u16,
        dropped: Option<DropReason>,
        length: usize,
        segments: impl Iterator<Item = ReadSegment<'a>> + Clone,
    ) {
        if !self.filter.is_none() {
            let mut start = [0; FILTERED];
            let seen = copy(segments.clone(), &mut start[..length.min(FILTERED)]);
            if self.filter.check(&start[..seen]).is_err() {
                return;
            }
        }
        let kept = length.min(self.snaplen);
        if self.waiting.load(Ordering::Relaxed) + kept > QUEUE_BYTES {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let mut bytes = vec![0; kept];
        let copied = copy(segments, &mut bytes);
        bytes.truncate(copied);
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.waiting.fetch_add(copied, Ordering::Relaxed);
        let record = Record { time, way, pair, dropped, length: length as u32, bytes };
        if self.queue.try_send(record).is_err() {
            self.waiting.fetch_sub(copied, Ordering::Relaxed);
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Fills `target` from segments; returns how many bytes there were.
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

/// What a capture has come to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct CaptureStats {
    /// Frames that were written.
    pub captured: u64,
    /// Frames that found no room, for whoever reads was too slow.
    pub left_out: u64,
}

/// A port's capture, if there is one.
#[derive(Debug, Default)]
pub struct Capture {
    on: AtomicBool,
    /// The last one, which may be over.
    recorder: Mutex<Option<Arc<Recorder>>>,
}

impl Capture {
    fn lock(&self) -> MutexGuard<'_, Option<Arc<Recorder>>> {
        // Nobody panics while holding it.
        self.recorder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// True while a capture runs.
    #[inline]
    pub fn is_on(&self) -> bool {
        self.on.load(Ordering::Relaxed)
    }

    /// Where frames are to be put, if they are captured.
    #[inline]
    pub fn recorder(&self) -> Option<Arc<Recorder>> {
        if self.is_on() { self.lock().clone() } else { None }
    }

    /// Begins a capture of the port `name` with so many queue pairs. What is returned is to be
    /// [run](Writer::run) by a thread; nothing, if one is running already.
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
        let (queue, records) = sync_channel(QUEUE);
        let new = Arc::new(Recorder {
            snaplen: options.snaplen as usize,
            filter: options.filter.clone(),
            queue,
            waiting: AtomicUsize::new(0),
            over: AtomicBool::new(false),
            written: AtomicU64::new(0),
            left_out: AtomicU64::new(0),
        });
        *recorder = Some(new.clone());
        self.on.store(true, Ordering::Relaxed);
        let names = (0..pairs).map(|pair| format!("{name}/{pair}")).collect();
        Some(Writer { capture: self.clone(), recorder: new, records, options, names, output })
    }

    /// Has it end, once what was captured is written; says what it has come to so far.
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

/// What writes a capture.
pub struct Writer {
    capture: Arc<Capture>,
    recorder: Arc<Recorder>,
    records: Receiver<Record>,
    options: Options,
    names: Vec<String>,
    output: File,
}

impl Writer {
    /// Writes until the capture is stopped, has all that was asked for, or nobody reads it any more.
    ///
    /// # Errors
    /// Those of writing, but for that last one.
    pub fn run(self) -> io::Result<CaptureStats> {
        let result = self.write_all();
        self.recorder.over.store(true, Ordering::Relaxed);
        {
            // Unless there is another by now.
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
        // The library writes a statistics block's time right in this order of bytes only.
        let mut pcap =
            PcapNgWriter::with_endianness(BufWriter::new(&self.output), Endianness::Big)?;
        for name in &self.names {
            let options = vec![
                InterfaceDescriptionOption::IfName(Cow::Borrowed(name)),
                InterfaceDescriptionOption::IfDescription(Cow::Borrowed(
                    "queue pair of a virtual machine's card; inbound is to the guest",
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
                    match self.records.recv_timeout(LOOK) {
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
            self.recorder.waiting.fetch_sub(record.bytes.len(), Ordering::Relaxed);
            time = record.time;
            pcap.write_pcapng_block(block(&record))?;
            let written = self.recorder.written.fetch_add(1, Ordering::Relaxed) + 1;
            if self.options.count.is_some_and(|count| written >= count) {
                break;
            }
        }
        // All is counted with the first interface: the queue is one for all.
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
    // 4.3.1). The queue pair is the interface.
    let direction = match record.way {
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
    fn frames_are_chosen_by_parts_or_by_a_whole_list() {
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
    fn what_finds_no_room_is_counted_and_nobody_waits() {
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
    fn a_capture_ends_with_whoever_reads_it_and_another_may_begin() {
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
    fn as_many_frames_are_written_as_were_asked_for_and_so_much_of_each() {
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
