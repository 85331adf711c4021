//! Admission of frames from the guest: which are sent as they lie, which begin with a copy of their
//! headers, and which are dropped.
//!
//! Invariant: a frame is sent behind [`PLAIN_HEADER`], or behind what a [`PrivateStart`] holds: bytes of
//! our own, which were checked, and which the guest cannot change any more.

use std::ops::Range;
use std::sync::Arc;

use super::checks::{check_plain, check_segmented};
use super::{
    ETHERNET_LENGTH, GSO_NONE, Headers, MAX_FRAME, MAX_HEADERS, NEEDS_CSUM, Surplus, VnetHeader,
};
use crate::counters::Drop;
use crate::features::{HEADER_LENGTH, Negotiated, Offloads};
use crate::guest::{Chain, Readable, Segment};
use crate::policy::{FilterView, Rules};

/// Start of a frame in memory of our own: what [`admit`] has checked.
#[derive(Debug, Clone)]
pub struct PrivateStart {
    bytes: [u8; HEADER_LENGTH + MAX_HEADERS],
    length: usize,
}

impl Default for PrivateStart {
    fn default() -> Self {
        PrivateStart { bytes: [0; HEADER_LENGTH + MAX_HEADERS], length: 0 }
    }
}

impl PrivateStart {
    /// The checked bytes, virtio header first: they replace as many at the chain's start.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// Whether the frame is to be segmented.
    #[inline]
    pub fn is_segmented(&self) -> bool {
        self.bytes[1] != GSO_NONE
    }

    /// Whether the host has to complete a checksum.
    #[inline]
    pub fn needs_checksum(&self) -> bool {
        self.bytes[0] & NEEDS_CSUM != 0
    }

    /// What the frame of `length` bytes is on the wire beyond itself.
    #[inline]
    pub fn surplus(&self, length: usize) -> Surplus {
        let header = self.header();
        Surplus::of(&header, header.hdr_len.into(), length)
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
        VnetHeader::parse(self.bytes.first_chunk().expect("a header has 10 bytes"))
    }
}

/// What a frame from the guest may be.
#[derive(Debug, Clone)]
pub struct Admission {
    /// Length in bytes of the header that was negotiated.
    pub header_length: usize,
    /// What the guest may leave to the host.
    pub offloads: Offloads,
    /// Longest frame in bytes that is not to be segmented: MTU and [`LINK_OVERHEAD`](super::LINK_OVERHEAD).
    pub max_frame: usize,
    /// What else it must comply with.
    pub rules: Option<Arc<Rules>>,
    /// And what the operator denies.
    pub filter: FilterView,
    /// Whether frames that fit a [`PrivateStart`] are copied whole: where a second piece costs more.
    pub copies_small: bool,
    /// Bytes of chains whose frames are sent without a further look if they ask for nothing.
    plain: Range<usize>,
    /// The same of those that are copied whole.
    small: Range<usize>,
    /// Both.
    unseen: Range<usize>,
}

/// How a frame was admitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admitted {
    /// It asks for nothing: it is sent behind [`PLAIN_HEADER`], and nothing of it was copied.
    Plain,
    /// It begins with what was copied.
    Copied,
}

/// Bytes of a chain at the most whose frame is copied whole, where that is done.
const SMALL: usize = HEADER_LENGTH + MAX_HEADERS;

/// Before each frame that asks for nothing.
pub const PLAIN_HEADER: [u8; HEADER_LENGTH] = [0; HEADER_LENGTH];

impl Admission {
    /// By the negotiated features, and what an operator has set.
    pub fn new(
        negotiated: &Negotiated,
        max_frame: usize,
        rules: Option<Arc<Rules>>,
        filter: FilterView,
    ) -> Self {
        Admission {
            header_length: negotiated.header_length(),
            offloads: negotiated.host(),
            max_frame,
            rules,
            filter,
            copies_small: false,
            plain: 0..0,
            small: 0..0,
            unseen: 0..0,
        }
    }

    /// Prepares for a burst. Headers are copied if somebody else `peeks`.
    pub fn begin_burst(&mut self, peeks: bool) {
        self.filter.refresh();
        self.unseen = match self.judges() || peeks {
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

    /// Whether frames are judged by their headers, which must be sent as they were then.
    #[inline]
    pub fn judges(&self) -> bool {
        self.rules.is_some() || self.filter.current().is_some()
    }

    /// Judges a frame by its virtio header and the start of the frame.
    #[inline(never)]
    fn judge(&self, header: &VnetHeader, headers: &[u8]) -> Result<(), Drop> {
        // The host writes the checksum after the judgement: it must write over nothing that counts.
        // check_segmented() has already seen to that for a frame to be segmented, of which the
        // segments' own lengths count.
        if header.needs_checksum() && !header.is_segmented() {
            let parsed = Headers::parse(headers).ok_or(Drop::BadHeader)?;
            let (start, offset) = (header.csum_start.into(), header.csum_offset.into());
            if !parsed.own_checksum(headers, start, offset) {
                return Err(Drop::BadHeader);
            }
        }
        if let Some(rules) = &self.rules {
            rules.check(headers)?;
        }
        self.filter.current().map_or(Ok(()), |filter| filter.judge(headers))
    }
}

/// Checks a frame from the guest. Unless it is plain, what is to be sent in place of its start is in `start`.
///
/// # Errors
/// Why the frame must be dropped. Behind its virtio header `start` has what was judged then, unless the
/// frame is too short or too long.
#[inline(always)]
pub fn admit(
    chain: &Chain<'_, '_, Readable>,
    admission: &Admission,
    start: &mut PrivateStart,
) -> Result<Admitted, Drop> {
    if let Some(only) = chain.only_piece() {
        if admission.is_plain(&only) {
            return Ok(Admitted::Plain);
        }
        if admission.is_small(&only) {
            start.length = only.copy_to(&mut start.bytes);
            start.set_header(VnetHeader::default(), admission.header_length);
            return Ok(Admitted::Copied);
        }
    }
    admit_copied(chain, admission, start).map(|()| Admitted::Copied)
}

/// The same for a frame that may not be plain, whose start is copied in any case.
///
/// # Errors
/// As for [`admit`].
#[inline(never)]
pub fn admit_copied(
    chain: &Chain<'_, '_, Readable>,
    admission: &Admission,
    start: &mut PrivateStart,
) -> Result<(), Drop> {
    let header_length = admission.header_length;
    // Nearly always it lies in one piece, nobody looks at it, and it is not to be segmented.
    if let Some(only) = chain.only_piece().filter(|only| admission.unseen.contains(&only.len()))
        && only.first_u16().is_some_and(|bytes| bytes >> 8 == u16::from(GSO_NONE))
        && let Some(header) = only.first_bytes().map(|bytes| VnetHeader::parse(&bytes))
        && !header.is_segmented()
    {
        // This copy of the header counts, and no other.
        let checked = check_plain(&header, only.len() - header_length, &admission.offloads)?;
        start.length = match admission.small.contains(&only.len()) {
            true => only.copy_to(&mut start.bytes),
            false => header_length,
        };
        start.set_header(checked, header_length);
        return Ok(());
    }
    admit_any(chain, admission, start)
}

/// The same for a frame of any kind, of which as much is copied as is looked at.
#[inline(never)]
fn admit_any(
    chain: &Chain<'_, '_, Readable>,
    admission: &Admission,
    start: &mut PrivateStart,
) -> Result<(), Drop> {
    let header_length = admission.header_length;
    let Some(frame_length) = chain.len().checked_sub(header_length) else {
        return Err(Drop::TooShort);
    };
    if frame_length < ETHERNET_LENGTH {
        return Err(Drop::TooShort);
    }
    // Read once: only this copy counts.
    start.length = chain.read_start(&mut start.bytes);
    let header = start.header();
    let checked = if !header.is_segmented() {
        if frame_length > admission.max_frame {
            return Err(Drop::TooLong);
        }
        check_plain(&header, frame_length, &admission.offloads)?
    } else {
        if frame_length > MAX_FRAME {
            return Err(Drop::TooLong);
        }
        let frame = &start.bytes[header_length..start.length];
        check_segmented(&header, frame, frame_length, &admission.offloads)?
    };
    start.set_header(checked, header_length);
    if admission.judges() {
        admission.judge(&start.header(), &start.bytes[header_length..start.length])?;
    }
    Ok(())
}
