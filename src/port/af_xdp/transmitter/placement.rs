//! Where a frame that is not plain is sent from: the guest's memory, or a slot of the bounce area that it is
//! copied into, whole or one segment at a time.
//!
//! Invariant: what was checked is what is sent. Headers that the checks or the operator's rules have looked
//! at go out from the copy that they looked at.

use super::Transmitter;
use crate::counters::{CopyReason, DropReason};
use crate::guest::{Chain, Readable, Segment};
use crate::port::af_xdp::checksum;
use crate::port::af_xdp::interface::OpenSocket;
use crate::port::af_xdp::segmentation::Segmentation;
use crate::port::{Completions, Outcome};
use crate::sys::xsk::{Descriptor, checksum_request};
use crate::vnet_header::VnetHeader;

impl Transmitter {
    /// Where a frame of any kind is sent from, or the next segment of the frame that is being cut.
    #[inline(never)]
    pub(super) fn place_checked(
        &mut self,
        chain: &Chain<'_, '_, Readable>,
        slot: usize,
        open: &OpenSocket,
        done: &mut Completions,
    ) -> Result<Descriptor, DropReason> {
        if self.cut.is_none() {
            self.begin_frame(chain, done)?;
        }
        Ok(match &self.cut {
            Some((how, offset)) => self.place_segment(chain, *how, *offset, slot, open, done),
            None => self.place(chain, slot, open, done),
        })
    }

    /// Checks the frame, and sees whether it is to be cut.
    fn begin_frame(
        &mut self,
        chain: &Chain<'_, '_, Readable>,
        done: &mut Completions,
    ) -> Result<(), DropReason> {
        self.stages.check_copied(chain, &mut self.start)?;
        if self.start.needs_segmentation() {
            self.begin_cut(chain, done)?;
        }
        let length = chain.len() - self.stages.header_length();
        self.stages.observe(self.next, &self.start, length, Outcome::Sent, done);
        Ok(())
    }

    /// Sees how the frame that was just admitted is to be cut.
    // This and what follows by itself: most frames have no need of it.
    #[inline(never)]
    fn begin_cut(
        &mut self,
        chain: &Chain<'_, '_, Readable>,
        done: &mut Completions,
    ) -> Result<(), DropReason> {
        let header_length = self.stages.header_length();
        let length = chain.len() - header_length;
        let headers = &self.start.bytes()[header_length..];
        if let Some(how) = Segmentation::of(&self.start.header(), headers, length) {
            if how.longest() > self.stages.headers.max_frame {
                return Err(DropReason::TooLong);
            }
            self.cut = Some((how, 0));
            done.tx.overhead += self.start.overhead(length);
        }
        Ok(())
    }

    /// Where the frame is to be sent from.
    fn place(
        &mut self,
        chain: &Chain<'_, '_, Readable>,
        slot: usize,
        open: &OpenSocket,
        done: &mut Completions,
    ) -> Descriptor {
        let header_length = self.stages.header_length();
        // Headers that were judged go out as they were then.
        let as_it_is = !self.start.needs_checksum() && !self.stages.inspects_headers();
        let length = chain.len() - header_length;
        let in_place = chain
            .first_after(header_length)
            .filter(|piece| as_it_is && piece.len() == length)
            .and_then(|piece| open.umem.sendable(&piece));
        match in_place {
            Some(address) => Descriptor { address, length: length as u32, options: 0 },
            None => self.place_copy(chain, slot, open, done),
        }
    }

    /// Puts a copy of the frame into the bounce area.
    #[inline(never)]
    fn place_copy(
        &mut self,
        chain: &Chain<'_, '_, Readable>,
        slot: usize,
        open: &OpenSocket,
        done: &mut Completions,
    ) -> Descriptor {
        let header_length = self.stages.header_length();
        let length = chain.len() - header_length;
        let (frame, address) = open.umem.tx_frame(self.pair, slot, length);
        chain.copy_to(header_length, &frame);
        frame.write(&self.start.bytes()[header_length..]);
        let (reason, options) = if self.start.header().needs_checksum() {
            (CopyReason::Checksum, self.complete(&frame, slot, open))
        } else if self.stages.inspects_headers() {
            (CopyReason::Rules, 0)
        } else {
            (CopyReason::Pieces, 0)
        };
        done.tx_copied.push(reason);
        Descriptor { address, length: length as u32, options }
    }

    /// Puts the segment that begins at `offset` of the payload together, and goes on to the next.
    #[inline(never)]
    fn place_segment(
        &mut self,
        chain: &Chain<'_, '_, Readable>,
        how: Segmentation,
        offset: usize,
        slot: usize,
        open: &OpenSocket,
        done: &mut Completions,
    ) -> Descriptor {
        let header_length = self.stages.header_length();
        let (headers, payload) = (how.headers(), how.payload_at(offset));
        let (frame, address) = open.umem.tx_frame(self.pair, slot, headers + payload);
        let whole = &self.start.bytes()[header_length..];
        frame.write(&how.headers_at(whole, offset)[..headers]);
        chain.copy_to(header_length + headers + offset, &frame.skip(headers));
        if how.is_last(offset) {
            done.tx_copied.push(CopyReason::Segmentation);
            self.cut = None;
        } else {
            self.cut = Some((how, offset + payload));
        }
        let options = self.complete(&frame, slot, open);
        Descriptor { address, length: (headers + payload) as u32, options }
    }

    /// Has the checksum of a frame in the bounce area completed: by the kernel, or at once.
    fn complete(&mut self, frame: &Segment<'_>, slot: usize, open: &OpenSocket) -> u32 {
        let VnetHeader { csum_start, csum_offset, .. } = self.start.header();
        if open.metadata {
            let request = checksum_request(csum_start, csum_offset);
            open.umem.tx_metadata(self.pair, slot).write(&request);
            return Descriptor::HAS_METADATA;
        }
        self.scratch.resize(frame.len(), 0);
        frame.read(&mut self.scratch);
        checksum::complete(&mut self.scratch, csum_start.into(), csum_offset.into());
        frame.write(&self.scratch);
        0
    }
}
