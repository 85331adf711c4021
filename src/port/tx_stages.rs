//! The stages that a frame from the guest passes in front of every port: validation of its virtio-net header,
//! anti-spoofing and the tx filter, then the capture and the count of peers.
//!
//! Invariant: the bytes that were checked are the bytes that are sent, from a private [`HeaderCopy`]. Afterwards
//! the host changes only the frame's own checksum.

use std::sync::Arc;

use super::{Completions, Outcome};
use crate::counters::DropReason;
use crate::features::Negotiated;
use crate::frame::{FrameDirection, Headers};
use crate::guest::{Chain, Readable, Segment};
use crate::policy::{AntiSpoofing, FilterView};
use crate::traffic::{PeerNotes, PeerTable};
use crate::vnet_header::{HeaderChecks, HeaderCopy, PLAIN_HEADER, Validated, VnetHeader};

/// The stages in front of a port, for one session.
#[derive(Debug)]
pub struct TxStages {
    /// Validation of the virtio-net header.
    pub headers: HeaderChecks,
    /// Anti-spoofing, if it is on.
    pub anti_spoofing: Option<Arc<AntiSpoofing>>,
    /// The operator's tx filter.
    pub filter: FilterView,
    peers: PeerNotes,
    /// Whether this burst's frames go into a capture, or are counted by peer.
    observes: bool,
}

impl TxStages {
    /// Creates the stages for frames of up to `max_frame` bytes; GSO frames may be longer.
    pub fn new(
        negotiated: &Negotiated,
        max_frame: usize,
        anti_spoofing: Option<Arc<AntiSpoofing>>,
        filter: FilterView,
        peers: Arc<PeerTable>,
    ) -> Self {
        TxStages {
            headers: HeaderChecks::new(negotiated, max_frame),
            anti_spoofing,
            filter,
            peers: PeerNotes::new(peers),
            observes: false,
        }
    }

    /// Prepares for a burst. If a stage inspects headers, the headers of all frames are copied.
    pub fn begin_burst(&mut self, done: &Completions) {
        self.observes = done.captures || self.peers.is_on();
        self.filter.refresh();
        self.headers.begin_burst(self.inspects_headers() || self.observes);
    }

    /// Adds the burst's frames to the count of peers.
    pub(super) fn end_burst(&mut self) {
        self.peers.publish();
    }

    /// Length in bytes of the negotiated virtio-net header.
    #[inline(always)]
    pub fn header_length(&self) -> usize {
        self.headers.header_length
    }

    /// Whether the frame in `chain` passes without a copy or an inspection of its headers.
    #[inline(always)]
    pub(super) fn is_plain(&self, chain: &Segment<'_>) -> bool {
        self.headers.is_plain(chain)
    }

    /// Whether anti-spoofing or the filter inspects headers. The inspected bytes must be sent unchanged.
    #[inline]
    pub fn inspects_headers(&self) -> bool {
        self.anti_spoofing.is_some() || self.filter.current().is_some()
    }

    /// Checks a frame. Unless the frame is plain, `start` then holds the bytes that replace its start.
    ///
    /// # Errors
    /// The reason to drop the frame. Behind the virtio-net header `start` holds the checked bytes, unless the frame
    /// is too short or too long.
    #[inline(always)]
    pub fn check(
        &self,
        chain: &Chain<'_, '_, Readable>,
        start: &mut HeaderCopy,
    ) -> Result<Validated, DropReason> {
        match self.headers.pass_plain(chain, start) {
            Some(how) => Ok(how),
            None => self.check_copied(chain, start).map(|()| Validated::Copied),
        }
    }

    /// Checks a frame, and copies its start even if the frame is plain.
    ///
    /// # Errors
    /// As for [`check`](Self::check).
    #[inline(never)]
    pub(super) fn check_copied(
        &self,
        chain: &Chain<'_, '_, Readable>,
        start: &mut HeaderCopy,
    ) -> Result<(), DropReason> {
        // Fast path: a frame in one segment that no stage inspects, and that is no GSO frame.
        match self.headers.check_header(chain, start) {
            Some(checked) => checked,
            None => self.check_any(chain, start),
        }
    }

    /// Checks a frame of any kind, and copies the bytes that the stages inspect.
    #[inline(never)]
    fn check_any(
        &self,
        chain: &Chain<'_, '_, Readable>,
        start: &mut HeaderCopy,
    ) -> Result<(), DropReason> {
        self.headers.check_headers(chain, start)?;
        if self.inspects_headers() {
            self.inspect(&start.header(), &start.bytes()[self.header_length()..])?;
        }
        Ok(())
    }

    /// Applies anti-spoofing and the filter to a frame's headers.
    #[inline(never)]
    fn inspect(&self, header: &VnetHeader, headers: &[u8]) -> Result<(), DropReason> {
        // The host writes the checksum afterwards, and must not overwrite inspected bytes. For a GSO frame the
        // validation ensures that; its header describes the segments, not the frame.
        if header.needs_checksum() && !header.needs_segmentation() {
            let parsed = Headers::parse(headers).ok_or(DropReason::BadHeader)?;
            let (start, offset) = (header.csum_start.into(), header.csum_offset.into());
            if !parsed.own_checksum(headers, start, offset) {
                return Err(DropReason::BadHeader);
            }
        }
        if let Some(rules) = &self.anti_spoofing {
            rules.check(headers)?;
        }
        self.filter.current().map_or(Ok(()), |filter| filter.check(headers))
    }

    /// The checked bytes that replace the frame's start.
    #[inline(always)]
    pub(super) fn checked<'a>(&self, how: Validated, start: &'a HeaderCopy) -> &'a [u8] {
        match how {
            Validated::Plain => &PLAIN_HEADER[..self.header_length()],
            Validated::Copied => start.bytes(),
        }
    }

    /// Passes the frame of `length` bytes at a ring position to the capture and the count of peers, if one of them
    /// is on.
    #[inline(always)]
    pub(super) fn observe(
        &mut self,
        position: u16,
        start: &HeaderCopy,
        length: usize,
        outcome: Outcome,
        done: &mut Completions,
    ) {
        if self.observes {
            self.note(position, start, length, outcome, done);
        }
    }

    #[inline(never)]
    fn note(
        &mut self,
        position: u16,
        start: &HeaderCopy,
        length: usize,
        outcome: Outcome,
        done: &mut Completions,
    ) {
        if done.captures {
            done.capture(position, start, outcome);
        }
        if outcome == Outcome::Sent && self.peers.is_on() {
            self.peers.note(FrameDirection::Tx, &start.bytes()[self.header_length()..], length);
        }
    }
}
