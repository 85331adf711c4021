//! Copies of a session's frames for a capture: after a frame has moved, and before the guest gets its chain back.

use crate::capture::Recorder;
use crate::frame::FrameDirection;
use crate::guest::{Chain, Direction, ReadSegment};
use crate::port::{Captured, Completions, Outcome, Virtqueues};
use crate::vnet_header::VnetHeader;

/// Records all completed frames. `header` is the length in bytes of the virtio-net header.
///
/// A frame from the guest begins with the header copy that was checked and sent. Frames that were sent before the
/// capture began are left out: the guest may have changed their memory.
pub(super) fn record(
    recorder: &Recorder,
    pair: u16,
    queues: &Virtqueues<'_>,
    done: &mut Completions,
    header: usize,
) {
    if let Some(tx) = &queues.tx {
        let has_completed = |it: &mut Captured| {
            usize::from(it.position.wrapping_sub(tx.published())) < tx.completed()
        };
        while let Some(captured) = done.captured.pop_front_if(has_completed) {
            let Captured { position, start, outcome } = captured;
            let chain = tx.chain(position);
            let dropped = match outcome {
                Outcome::Sent => None,
                Outcome::Dropped(reason) => Some(reason),
            };
            let private = start.as_ref().and_then(|start| start.bytes().get(header..));
            let private = private.unwrap_or_default();
            let length = chain.len().saturating_sub(header);
            let rest = (private.len() < length)
                .then(|| chain.segments_after(header + private.len()))
                .into_iter()
                .flatten()
                .map(ReadSegment::from);
            let segments = std::iter::once(ReadSegment::of_bytes(private)).chain(rest);
            recorder.record(FrameDirection::Tx, pair, dropped, length, segments);
        }
    }
    let Some(rx) = &queues.rx else { return };
    let completed = rx.completed() as u16;
    let mut index = 0;
    while index < completed {
        let chain = |index: u16| rx.chain(rx.published().wrapping_add(index));
        let first = chain(index);
        let end = index + buffers(&first, header).min(completed - index);
        let others: Vec<_> = (index + 1..end).map(chain).collect();
        let length = first.len() + others.iter().map(Chain::len).sum::<usize>();
        let start = limited(&first, header, first.len().saturating_sub(header));
        let rest = others.iter().flat_map(|chain| limited(chain, 0, chain.len()));
        recorder.record(
            FrameDirection::Rx,
            pair,
            None,
            length.saturating_sub(header),
            start.chain(rest),
        );
        index = end;
    }
}

/// Returns the number of buffers of a frame to the guest, from the header in guest memory. The guest may have
/// changed it, so callers must bound it.
fn buffers<D: Direction>(first: &Chain<'_, '_, D>, header: usize) -> u16 {
    const NUM_BUFFERS: usize = VnetHeader::NUM_BUFFERS;
    let mut bytes = [0; 2];
    if header < NUM_BUFFERS + bytes.len() {
        return 1;
    }
    if let Some(segment) = first.first_after(NUM_BUFFERS) {
        segment.read(&mut bytes);
    }
    u16::from_le_bytes(bytes).max(1)
}

/// Returns `length` bytes of a chain, after the first `skip`.
fn limited<'m, D: Direction>(
    chain: &Chain<'_, 'm, D>,
    skip: usize,
    length: usize,
) -> impl Iterator<Item = ReadSegment<'m>> + Clone {
    let mut rest = length;
    chain.segments_after(skip).map_while(move |segment| {
        let kept = segment.first(rest);
        rest -= kept.len();
        (kept.len() > 0).then_some(kept.into())
    })
}
