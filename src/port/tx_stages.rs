//! What a frame from the guest passes in front of a port, the same on every port: validation of its virtio-net
//! header, anti-spoofing, the tx filter; then the capture and the count of peers.
//!
//! Invariant: what was checked is what is sent: the copy in a [`HeaderCopy`], of which the host changes nothing
//! afterwards but the frame's own checksum.

use std::sync::Arc;

use super::{Completions, Outcome};
use crate::counters::DropReason;
use crate::features::Negotiated;
use crate::frame::{FrameDirection, Headers};
use crate::guest::{Chain, Readable, Segment};
use crate::policy::{AntiSpoofing, FilterView};
use crate::traffic::{Notes, PeerTable};
use crate::vnet_header::{HeaderChecks, HeaderCopy, PLAIN_HEADER, Validated, VnetHeader};

/// The stages of a session.
#[derive(Debug)]
pub struct TxStages {
    /// Validation of the virtio-net header.
    pub headers: HeaderChecks,
    /// What the guest may send.
    pub anti_spoofing: Option<Arc<AntiSpoofing>>,
    /// Frames that the operator denies.
    pub filter: FilterView,
    peers: Notes,
    /// Whether frames of this burst go into a capture or are counted by peer.
    observes: bool,
}

impl TxStages {
    /// For frames of up to `max_frame` bytes, GSO frames excepted.
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
            peers: Notes::new(peers),
            observes: false,
        }
    }

    /// Prepares for a burst. Where a stage inspects headers, every frame's are copied.
    pub fn begin_burst(&mut self, done: &Completions) {
        self.observes = done.captures || self.peers.wanted();
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

    /// Whether the frame in `chain` is sent without an inspection.
    #[inline(always)]
    pub(super) fn is_plain(&self, chain: &Segment<'_>) -> bool {
        self.headers.is_plain(chain)
    }

    /// Whether anti-spoofing or the filter inspects headers, which must be sent as they were then.
    #[inline]
    pub fn inspects_headers(&self) -> bool {
        self.anti_spoofing.is_some() || self.filter.current().is_some()
    }

    /// Checks a frame. Unless it is plain, `start` holds what is to be sent in place of its start.
    ///
    /// # Errors
    /// Why the frame must be dropped. Behind its virtio-net header `start` holds what was checked, unless the
    /// frame is too short or too long.
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

    /// Checks a frame that may not be plain, and copies its start in any case.
    ///
    /// # Errors
    /// As for [`check`](Self::check).
    #[inline(never)]
    pub(super) fn check_copied(
        &self,
        chain: &Chain<'_, '_, Readable>,
        start: &mut HeaderCopy,
    ) -> Result<(), DropReason> {
        // Nearly always it lies in one piece, no stage inspects it, and it is no GSO frame.
        match self.headers.check_header(chain, start) {
            Some(checked) => checked,
            None => self.check_any(chain, start),
        }
    }

    /// Checks a frame of any kind, and copies as much as the stages inspect.
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

    /// Has anti-spoofing and the filter inspect a frame's headers.
    #[inline(never)]
    fn inspect(&self, header: &VnetHeader, headers: &[u8]) -> Result<(), DropReason> {
        // The host writes the checksum afterwards: it must not write over what was inspected. Validation has
        // seen to that for a GSO frame, of which the segments' own lengths count.
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

    /// The checked bytes that replace a frame's start.
    #[inline(always)]
    pub(super) fn checked<'a>(&self, how: Validated, start: &'a HeaderCopy) -> &'a [u8] {
        match how {
            Validated::Plain => &PLAIN_HEADER[..self.header_length()],
            Validated::Copied => start.bytes(),
        }
    }

    /// Shows the frame of `length` bytes at a ring position to the capture and the count of peers, if one of them
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
            self.show(position, start, length, outcome, done);
        }
    }

    #[inline(never)]
    fn show(
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
        if outcome == Outcome::Sent && self.peers.wanted() {
            self.peers.note(FrameDirection::Tx, &start.bytes()[self.header_length()..], length);
        }
    }
}
