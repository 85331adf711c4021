//! Placement of frames that are not plain: in guest memory, or copied into a bounce buffer, whole or segment
//! by segment.
//!
//! Invariant: headers that the checks or a policy have inspected are sent from the inspected copy.

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
    /// Places a frame, or the next segment of the GSO frame that is being segmented. Returns its descriptor.
    ///
    /// # Errors
    /// The reason to drop the frame.
    #[inline(never)]
    pub(super) fn place_checked(
        &mut self,
        chain: &Chain<'_, '_, Readable>,
        slot: usize,
        open: &OpenSocket,
        done: &mut Completions,
    ) -> Result<Descriptor, DropReason> {
        if self.segmenting.is_none() {
            self.begin_frame(chain, done)?;
        }
        Ok(match &self.segmenting {
            Some((how, offset)) => self.place_segment(chain, *how, *offset, slot, open, done),
            None => self.place(chain, slot, open, done),
        })
    }

    /// Checks the next frame, and begins segmentation if the frame needs it.
    fn begin_frame(
        &mut self,
        chain: &Chain<'_, '_, Readable>,
        done: &mut Completions,
    ) -> Result<(), DropReason> {
        self.stages.check_copied(chain, &mut self.start)?;
        if self.start.needs_segmentation() {
            self.begin_segmentation(chain, done)?;
        }
        let length = chain.len() - self.stages.header_length();
        self.stages.observe(self.next, &self.start, length, Outcome::Sent, done);
        Ok(())
    }

    /// Begins the segmentation of the frame that was just checked.
    // This function and the next ones are not inlined, since most frames do not need them.
    #[inline(never)]
    fn begin_segmentation(
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
            self.segmenting = Some((how, 0));
            done.tx.overhead += self.start.overhead(length);
        }
        Ok(())
    }

    /// Places a frame that needs no segmentation: in guest memory if possible.
    fn place(
        &mut self,
        chain: &Chain<'_, '_, Readable>,
        slot: usize,
        open: &OpenSocket,
        done: &mut Completions,
    ) -> Descriptor {
        let header_length = self.stages.header_length();
        // Inspected headers are sent from the copy, so the guest cannot change them.
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

    /// Copies the frame into its bounce buffer.
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

    /// Builds the segment at payload `offset` in its bounce buffer, and advances to the next segment.
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
            self.segmenting = None;
        } else {
            self.segmenting = Some((how, offset + payload));
        }
        let options = self.complete(&frame, slot, open);
        Descriptor { address, length: (headers + payload) as u32, options }
    }

    /// Completes the checksum of a frame in a bounce buffer: requests it from the kernel by metadata, or
    /// computes it here. Returns the descriptor's options.
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
