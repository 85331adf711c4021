//! Admission of frames from the guest, the same on every port: the virtio header is validated, then
//! anti-spoofing and the tx filter check the frame's own headers.
//!
//! Invariant: what the operator's rules have checked is what is sent: the copy in a [`PrivateStart`], of which
//! the host changes nothing afterwards but the frame's own checksum.

use std::sync::Arc;

use crate::counters::Drop;
use crate::features::Negotiated;
use crate::frame::Headers;
use crate::guest::{Chain, Readable, Segment};
use crate::policy::{FilterView, Rules};
use crate::vnet_header::{Admitted, HeaderChecks, PrivateStart, VnetHeader};

/// What a frame from the guest may be.
#[derive(Debug, Clone)]
pub struct Admission {
    /// Checks of its virtio header.
    pub checks: HeaderChecks,
    /// What else it must comply with.
    pub rules: Option<Arc<Rules>>,
    /// And what the operator denies.
    pub filter: FilterView,
}

impl Admission {
    /// By the negotiated features, and what an operator has set.
    pub fn new(
        negotiated: &Negotiated,
        max_frame: usize,
        rules: Option<Arc<Rules>>,
        filter: FilterView,
    ) -> Self {
        Admission { checks: HeaderChecks::new(negotiated, max_frame), rules, filter }
    }

    /// Prepares for a burst. Headers are copied if somebody else `peeks`.
    pub fn begin_burst(&mut self, peeks: bool) {
        self.filter.refresh();
        self.checks.begin_burst(self.judges() || peeks);
    }

    /// Length in bytes of the virtio header that was negotiated.
    #[inline(always)]
    pub fn header_length(&self) -> usize {
        self.checks.header_length
    }

    /// Whether the frame in `chain` is sent without a further look at it.
    #[inline(always)]
    pub fn is_plain(&self, chain: &Segment<'_>) -> bool {
        self.checks.is_plain(chain)
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
        // The virtio header's check has already seen to that for a frame to be segmented, of which the
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
    match admission.checks.pass_plain(chain, start) {
        Some(how) => Ok(how),
        None => admit_copied(chain, admission, start).map(|()| Admitted::Copied),
    }
}

/// The same for a frame that may not be plain, whose start is copied in any case.
///
/// # Errors
/// As for [`admit`].
#[inline(never)]
pub(super) fn admit_copied(
    chain: &Chain<'_, '_, Readable>,
    admission: &Admission,
    start: &mut PrivateStart,
) -> Result<(), Drop> {
    // Nearly always it lies in one piece, nobody looks at it, and it is not to be segmented.
    match admission.checks.check_header(chain, start) {
        Some(checked) => checked,
        None => admit_any(chain, admission, start),
    }
}

/// The same for a frame of any kind, of which as much is copied as is looked at.
#[inline(never)]
fn admit_any(
    chain: &Chain<'_, '_, Readable>,
    admission: &Admission,
    start: &mut PrivateStart,
) -> Result<(), Drop> {
    admission.checks.check_headers(chain, start)?;
    if admission.judges() {
        admission.judge(&start.header(), &start.bytes()[admission.header_length()..])?;
    }
    Ok(())
}
