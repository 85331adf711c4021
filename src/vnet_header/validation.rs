//! Validation of the virtio headers of frames from the guest: which frames are sent as they lie, and which
//! begin with a copy of their headers.
//!
//! Invariant: a frame is sent behind [`PLAIN_HEADER`], or behind what a [`HeaderCopy`] holds: bytes of
//! our own, which were checked, and which the guest cannot change any more.

use std::ops::Range;

use super::checks::{check_plain, check_segmented};
use super::{GSO_NONE, MAX_HEADERS, NEEDS_CSUM, SegmentationOverhead, VnetHeader};
use crate::counters::DropReason;
use crate::features::{HEADER_LENGTH, Negotiated, Offloads};
use crate::frame::{ETHERNET_LENGTH, MAX_FRAME};
use crate::guest::{Chain, Readable, Segment};

/// Start of a frame in memory of our own: what [`HeaderChecks`] have passed.
#[derive(Debug, Clone)]
pub struct HeaderCopy {
    bytes: [u8; HEADER_LENGTH + MAX_HEADERS],
    length: usize,
}

impl Default for HeaderCopy {
    fn default() -> Self {
        HeaderCopy { bytes: [0; HEADER_LENGTH + MAX_HEADERS], length: 0 }
    }
}

impl HeaderCopy {
    /// The checked bytes, virtio header first: they replace as many at the chain's start.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// Whether the frame is to be segmented.
    #[inline]
    pub fn needs_segmentation(&self) -> bool {
        self.bytes[1] != GSO_NONE
    }

    /// Whether the host has to complete a checksum.
    #[inline]
    pub fn needs_checksum(&self) -> bool {
        self.bytes[0] & NEEDS_CSUM != 0
    }

    /// What the frame of `length` bytes is on the wire beyond itself.
    #[inline]
    pub fn overhead(&self, length: usize) -> SegmentationOverhead {
        let header = self.header();
        SegmentationOverhead::of(&header, header.hdr_len.into(), length)
    }

    /// Puts the virtio header there, of which the guest has so many bytes.
    #[inline]
    fn set_header(&mut self, header: VnetHeader, length: usize) {
        let bytes = header.to_bytes();
        match length {
            HEADER_LENGTH => self.bytes[..HEADER_LENGTH].copy_from_slice(&bytes),
            shorter => self.bytes[..shorter].copy_from_slice(&bytes[..shorter]),
        }
    }

    /// The virtio header.
    #[inline]
    pub fn header(&self) -> VnetHeader {
        VnetHeader::parse(self.bytes.first_chunk().expect("a header is longer"))
    }
}

/// How a frame passed the checks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validated {
    /// It asks for nothing: it is sent behind [`PLAIN_HEADER`], and nothing of it was copied.
    Plain,
    /// It begins with what was copied.
    Copied,
}

/// Bytes of a chain at the most whose frame is copied whole, where that is done.
const SMALL: usize = HEADER_LENGTH + MAX_HEADERS;

/// Before each frame that asks for nothing.
pub const PLAIN_HEADER: [u8; HEADER_LENGTH] = [0; HEADER_LENGTH];

/// Checks of the virtio headers of frames from the guest, by the negotiated features.
#[derive(Debug, Clone)]
pub struct HeaderChecks {
    /// Length in bytes of the header that was negotiated.
    pub header_length: usize,
    /// What the guest may leave to the host.
    pub offloads: Offloads,
    /// Longest frame in bytes that is not to be segmented: MTU and [`LINK_OVERHEAD`](crate::frame::LINK_OVERHEAD).
    pub max_frame: usize,
    /// Whether frames that fit a [`HeaderCopy`] are copied whole: where a second piece costs more.
    pub copies_small: bool,
    /// Bytes of chains whose frames are sent without a further look if they ask for nothing.
    plain: Range<usize>,
    /// The same of those that are copied whole.
    small: Range<usize>,
    /// Both.
    unseen: Range<usize>,
}

impl HeaderChecks {
    /// Checks for frames up to `max_frame` bytes that are not to be segmented.
    pub fn new(negotiated: &Negotiated, max_frame: usize) -> Self {
        HeaderChecks {
            header_length: negotiated.header_length(),
            offloads: negotiated.host(),
            max_frame,
            copies_small: false,
            plain: 0..0,
            small: 0..0,
            unseen: 0..0,
        }
    }

    /// Prepares for a burst. With `copies_headers` each of its frames is sent behind a copy of its headers, for
    /// callers that inspect them.
    pub fn begin_burst(&mut self, copies_headers: bool) {
        self.unseen = match copies_headers {
            true => 0..0,
            false => self.header_length + ETHERNET_LENGTH..self.header_length + self.max_frame + 1,
        };
        let Range { start, end } = self.unseen;
        let copied = if self.copies_small { SMALL + 1 } else { start };
        self.small = start..copied.min(end);
        self.plain = copied.max(start)..end;
    }

    /// Whether the frame in `chain` is sent without a further look at it.
    #[inline(always)]
    pub fn is_plain(&self, chain: &Segment<'_>) -> bool {
        // Read once: nothing else of the header counts.
        self.plain.contains(&chain.len())
            && chain.first_u16().is_some_and(VnetHeader::asks_for_nothing)
    }

    /// The same for a frame that is copied whole.
    #[inline(always)]
    fn is_small(&self, chain: &Segment<'_>) -> bool {
        self.small.contains(&chain.len())
            && chain.first_u16().is_some_and(VnetHeader::asks_for_nothing)
    }

    /// Passes a frame whose header requests nothing, if no caller inspects headers. Returns `None` for any other
    /// frame.
    #[inline(always)]
    pub fn pass_plain(
        &self,
        chain: &Chain<'_, '_, Readable>,
        start: &mut HeaderCopy,
    ) -> Option<Validated> {
        let only = chain.only_piece()?;
        if self.is_plain(&only) {
            return Some(Validated::Plain);
        }
        self.is_small(&only).then(|| {
            start.length = only.copy_to(&mut start.bytes);
            start.set_header(VnetHeader::default(), self.header_length);
            Validated::Copied
        })
    }

    /// Checks the virtio header of a frame in one piece that is not to be segmented, if no caller inspects
    /// headers. Returns `None` for any other frame.
    #[inline(always)]
    pub fn check_header(
        &self,
        chain: &Chain<'_, '_, Readable>,
        start: &mut HeaderCopy,
    ) -> Option<Result<(), DropReason>> {
        let only = chain.only_piece().filter(|only| self.unseen.contains(&only.len()))?;
        only.first_u16().filter(|bytes| bytes >> 8 == u16::from(GSO_NONE))?;
        // This copy of the header counts, and no other.
        let header = VnetHeader::parse(&only.first_bytes()?);
        if header.needs_segmentation() {
            return None;
        }
        let checked = check_plain(&header, only.len() - self.header_length, &self.offloads);
        Some(checked.map(|checked| {
            start.length = match self.small.contains(&only.len()) {
                true => only.copy_to(&mut start.bytes),
                false => self.header_length,
            };
            start.set_header(checked, self.header_length);
        }))
    }

    /// Copies the headers of a frame of any kind, and checks the virtio header against them.
    ///
    /// # Errors
    /// Why the frame must be dropped.
    #[inline(always)]
    pub fn check_headers(
        &self,
        chain: &Chain<'_, '_, Readable>,
        start: &mut HeaderCopy,
    ) -> Result<(), DropReason> {
        let header_length = self.header_length;
        let Some(frame_length) = chain.len().checked_sub(header_length) else {
            return Err(DropReason::TooShort);
        };
        if frame_length < ETHERNET_LENGTH {
            return Err(DropReason::TooShort);
        }
        // Read once: only this copy counts.
        start.length = chain.read_start(&mut start.bytes);
        let header = start.header();
        let checked = if !header.needs_segmentation() {
            if frame_length > self.max_frame {
                return Err(DropReason::TooLong);
            }
            check_plain(&header, frame_length, &self.offloads)?
        } else {
            if frame_length > MAX_FRAME {
                return Err(DropReason::TooLong);
            }
            let frame = &start.bytes[header_length..start.length];
            check_segmented(&header, frame, frame_length, &self.offloads)?
        };
        start.set_header(checked, header_length);
        Ok(())
    }
}
