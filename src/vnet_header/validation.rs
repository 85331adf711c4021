//! Validation of the virtio-net headers of frames from the guest. A frame is sent from guest memory, or begins with a
//! copy of its headers.
//!
//! Invariant: a frame is sent behind [`PLAIN_HEADER`], or begins with the bytes of a [`HeaderCopy`]. Both are private:
//! the guest cannot change them after the check.

use std::ops::Range;

use super::checks::{check_plain, check_segmented};
use super::{GSO_NONE, MAX_HEADERS, NEEDS_CSUM, SegmentationOverhead, VnetHeader};
use crate::counters::DropReason;
use crate::features::{HEADER_LENGTH, Negotiated, Offloads};
use crate::frame::{ETHERNET_LENGTH, MAX_FRAME};
use crate::guest::{Chain, Readable, Segment};

/// Private copy of a frame's start, which has passed [`HeaderChecks`].
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
    /// Returns the checked bytes, virtio-net header first. They replace as many bytes at the chain's start.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// Returns true for a GSO frame.
    #[inline]
    pub fn needs_segmentation(&self) -> bool {
        self.bytes[1] != GSO_NONE
    }

    /// Returns true if the frame has a partial checksum, which the host must complete.
    #[inline]
    pub fn needs_checksum(&self) -> bool {
        self.bytes[0] & NEEDS_CSUM != 0
    }

    /// Returns the packets and bytes that segmentation adds to the frame, whose length is `length` bytes.
    #[inline]
    pub fn overhead(&self, length: usize) -> SegmentationOverhead {
        let header = self.header();
        SegmentationOverhead::of(&header, header.hdr_len.into(), length)
    }

    /// Writes the first `length` bytes of the virtio-net header, which is the negotiated length.
    #[inline]
    fn set_header(&mut self, header: VnetHeader, length: usize) {
        let bytes = header.to_bytes();
        match length {
            HEADER_LENGTH => self.bytes[..HEADER_LENGTH].copy_from_slice(&bytes),
            shorter => self.bytes[..shorter].copy_from_slice(&bytes[..shorter]),
        }
    }

    /// Returns the virtio-net header.
    #[inline]
    pub fn header(&self) -> VnetHeader {
        VnetHeader::parse(self.bytes.first_chunk().expect("a copy is longer than a header"))
    }
}

/// Form in which a frame that has passed the checks is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validated {
    /// The frame requests nothing. It is sent behind [`PLAIN_HEADER`], and no byte of it was copied.
    Plain,
    /// The frame begins with the [`HeaderCopy`].
    Copied,
}

/// Longest chain in bytes whose frame is copied whole, if the port copies small frames.
const MAX_SMALL_CHAIN: usize = HEADER_LENGTH + MAX_HEADERS;

/// Header of all frames that request nothing.
pub const PLAIN_HEADER: [u8; HEADER_LENGTH] = [0; HEADER_LENGTH];

/// Checks of the virtio-net headers of frames from the guest, by the negotiated features.
///
/// The lengths of chains are in bytes. In a burst whose headers a caller inspects, all three ranges are empty.
#[derive(Debug, Clone)]
pub struct HeaderChecks {
    /// Length in bytes of the negotiated header.
    pub header_length: usize,
    /// Offloads that the guest may use.
    pub offloads: Offloads,
    /// Longest frame in bytes, GSO frames excepted: MTU and [`LINK_OVERHEAD`](crate::frame::LINK_OVERHEAD).
    pub max_frame: usize,
    /// True if frames that fit a [`HeaderCopy`] are copied whole, because a second iovec costs more than the copy.
    pub copies_small: bool,
    /// Lengths of chains whose frames stay in guest memory if they request nothing.
    plain: Range<usize>,
    /// Lengths of chains whose frames are copied whole.
    small: Range<usize>,
    /// Lengths of chains whose headers no caller inspects: `small` and `plain` together.
    uninspected: Range<usize>,
}

impl HeaderChecks {
    /// Creates checks for frames of up to `max_frame` bytes, GSO frames excepted. [`begin_burst`](Self::begin_burst)
    /// must follow.
    pub fn new(negotiated: &Negotiated, max_frame: usize) -> Self {
        HeaderChecks {
            header_length: negotiated.header_length(),
            offloads: negotiated.host(),
            max_frame,
            copies_small: false,
            plain: 0..0,
            small: 0..0,
            uninspected: 0..0,
        }
    }

    /// Prepares for a burst. With `copies_headers`, every frame of the burst begins with a copy of its headers, which
    /// callers can inspect.
    pub fn begin_burst(&mut self, copies_headers: bool) {
        self.uninspected = match copies_headers {
            true => 0..0,
            false => self.header_length + ETHERNET_LENGTH..self.header_length + self.max_frame + 1,
        };
        let Range { start, end } = self.uninspected;
        let copied = if self.copies_small { MAX_SMALL_CHAIN + 1 } else { start };
        self.small = start..copied.min(end);
        self.plain = copied.max(start)..end;
    }

    /// Returns true if the frame in `chain` requests nothing, and is sent from guest memory.
    #[inline(always)]
    pub fn is_plain(&self, chain: &Segment<'_>) -> bool {
        // Reads guest memory once. The other fields of the header have no effect.
        self.plain.contains(&chain.len())
            && chain.first_u16().is_some_and(VnetHeader::requests_nothing)
    }

    /// Returns true if the frame in `chain` requests nothing, and is copied whole.
    #[inline(always)]
    fn is_small(&self, chain: &Segment<'_>) -> bool {
        self.small.contains(&chain.len())
            && chain.first_u16().is_some_and(VnetHeader::requests_nothing)
    }

    /// Passes a frame in one segment whose header requests nothing, if no caller inspects headers. Returns `None` for
    /// any other frame.
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

    /// Checks the virtio-net header of a frame in one segment, if no caller inspects headers. Returns `None` for any
    /// other frame, and for a GSO frame.
    ///
    /// The inner result is an error with the reason if the frame must be dropped.
    #[inline(always)]
    pub fn check_header(
        &self,
        chain: &Chain<'_, '_, Readable>,
        start: &mut HeaderCopy,
    ) -> Option<Result<(), DropReason>> {
        let only = chain.only_piece().filter(|only| self.uninspected.contains(&only.len()))?;
        only.first_u16().filter(|bytes| bytes >> 8 == u16::from(GSO_NONE))?;
        // The code below uses only this copy of the header: guest memory may change.
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

    /// Copies the headers of a frame of any kind, and checks the virtio-net header against the others.
    ///
    /// # Errors
    /// The reason for dropping the frame.
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
        // The code below uses only this copy: guest memory may change.
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
