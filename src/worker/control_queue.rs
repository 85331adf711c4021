//! The control virtqueue, for frontends that do not serve it themselves (virtio 1.3, section 5.1.6.5).
//!
//! Invariant: each command is answered, so that no driver waits for ever. The two commands whose
//! features are offered change nothing here and succeed; all others fail.

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use super::{Ring, RingState, Session};
use crate::guest::{Budget, Chain, Command, Fault, Published, Virtqueue};

/// Commands that are answered in one turn.
const BUDGET: Budget = Budget { chains: 16, bytes: usize::MAX };

/// The control ring of a session.
pub(super) struct ControlQueue<'s> {
    ring: &'s Ring,
    queue: Virtqueue<'s, Command>,
    /// Queue pairs of the port.
    pairs: u16,
}

impl<'s> ControlQueue<'s> {
    /// Starts the session's ring, if it has one that is to be served. One that the frontend has not
    /// enabled yet is served: a driver waits for its first answer before it says that it is ready.
    ///
    /// # Errors
    /// As [`Virtqueue::start`].
    pub(super) fn start(session: &'s Session) -> Result<Option<Self>, Fault> {
        let served = |ring: &&Ring| ring.state != RingState::Disabled;
        let Some(ring) = session.control.as_ref().filter(served) else { return Ok(None) };
        let notification = session.negotiated.notification();
        let queue = Virtqueue::start(&session.memory, ring.layout, notification)?;
        Ok(Some(ControlQueue { ring, queue, pairs: session.pairs }))
    }

    /// The ring.
    pub(super) fn ring(&self) -> &'s Ring {
        self.ring
    }

    /// Used index of the first command that was not answered.
    pub(super) fn next_used(&self) -> u16 {
        self.queue.next_used()
    }

    /// Asks for a kick; says whether there are commands already.
    ///
    /// # Errors
    /// As [`Virtqueue::enable_notify`].
    pub(super) fn arm(&mut self) -> Result<bool, Fault> {
        self.queue.enable_notify()
    }

    /// Answers a few commands; says whether there were any.
    ///
    /// # Errors
    /// As [`Virtqueue::pop`].
    pub(super) fn answer(&mut self) -> Result<bool, Fault> {
        let popped = self.queue.pop(BUDGET);
        while self.queue.in_flight() > 0 {
            let written = carry_out(&self.queue.chain(self.queue.next_used()), self.pairs);
            self.queue.push_used(written);
        }
        if self.queue.publish() == Published::Call {
            self.ring.call.signal();
        }
        Ok(popped? > 0)
    }
}

/// Answers a command of a device with so many queue pairs; returns the bytes written.
fn carry_out(chain: &Chain<'_, '_, Command>, pairs: u16) -> u32 {
    let (command, answer) = chain.parts();
    let (mut bytes, mut have) = ([0; 4], 0);
    for segment in command {
        have += segment.read(&mut bytes[have..]);
    }
    let [class, command, low, high] = bytes;
    let wanted = u16::from_le_bytes([low, high]);
    let succeeds = match (u32::from(class), u32::from(command), have) {
        // A ring is given frames once it has buffers: a guest that uses fewer pairs fills fewer rings.
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, 4) => (1..=pairs).contains(&wanted),
        // The announcement itself comes over a tx ring.
        (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, 2..) => true,
        _ => false,
    };
    let answered = [if succeeds { VIRTIO_NET_OK } else { VIRTIO_NET_ERR } as u8];
    answer.first().map_or(0, |segment| segment.write(&answered) as u32)
}
