//! Control virtqueue, for frontends that pass it on to the backend (virtio 1.3, section 5.1.6.5).
//!
//! Invariant: the worker answers each command, so no driver waits for ever. The two commands whose features are
//! offered succeed and change nothing in the daemon; all others fail.

use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MQ,
    VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};

use super::{Ring, RingState, Session};
use crate::guest::{Budget, Chain, Command, Fault, Published, Virtqueue};

/// Limit on the commands that one turn answers.
const BUDGET: Budget = Budget { chains: 16, bytes: usize::MAX };

/// The control virtqueue of a session.
pub(super) struct ControlQueue<'s> {
    ring: &'s Ring,
    queue: Virtqueue<'s, Command>,
    /// Number of the port's queue pairs.
    pairs: u16,
}

impl<'s> ControlQueue<'s> {
    /// Starts the session's control virtqueue, unless it is missing or disabled. A queue that the frontend has not
    /// enabled yet is served: a driver may need an answer before it reports that it is ready.
    ///
    /// # Errors
    /// A [`Fault`] if the queue's layout is not allowed, or indices in guest memory contradict each other.
    pub(super) fn start(session: &'s Session) -> Result<Option<Self>, Fault> {
        let served = |ring: &&Ring| ring.state != RingState::Disabled;
        let Some(ring) = session.control.as_ref().filter(served) else { return Ok(None) };
        let notification = session.negotiated.notification();
        let queue = Virtqueue::start(&session.memory, ring.layout, notification)?;
        Ok(Some(ControlQueue { ring, queue, pairs: session.pairs }))
    }

    /// Returns the session's ring of the queue.
    pub(super) fn ring(&self) -> &'s Ring {
        self.ring
    }

    /// Returns the used index of the first command that was not answered.
    pub(super) fn next_used(&self) -> u16 {
        self.queue.next_used()
    }

    /// Asks the driver for a kick. Returns true if commands are available already.
    ///
    /// # Errors
    /// [`Fault::AvailIndex`] if the available index covers too many chains, or went back.
    pub(super) fn enable_notify(&mut self) -> Result<bool, Fault> {
        self.queue.enable_notify()
    }

    /// Answers at most 16 commands. Returns true if there were any.
    ///
    /// # Errors
    /// A [`Fault`] if the guest broke a rule; commands popped before the fault are answered.
    pub(super) fn answer(&mut self) -> Result<bool, Fault> {
        let popped = self.queue.pop(BUDGET);
        while self.queue.in_flight() > 0 {
            let written = execute(&self.queue.chain(self.queue.next_used()), self.pairs);
            self.queue.push_used(written);
        }
        if self.queue.publish() == Published::Call {
            self.ring.call.signal();
        }
        Ok(popped? > 0)
    }
}

/// Executes a command to a device with `pairs` queue pairs, and writes its answer. Returns the bytes written.
fn execute(chain: &Chain<'_, '_, Command>, pairs: u16) -> u32 {
    let (command, answer) = chain.parts();
    let (mut bytes, mut have) = ([0; 4], 0);
    for segment in command {
        have += segment.read(&mut bytes[have..]);
    }
    let [class, command, low, high] = bytes;
    let count = u16::from_le_bytes([low, high]);
    let succeeds = match (u32::from(class), u32::from(command), have) {
        // A guest that uses fewer pairs posts buffers on fewer rings, and only rings with buffers get frames.
        (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, 4) => (1..=pairs).contains(&count),
        // The guest sends the announcement itself as a frame on a tx ring.
        (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, 2..) => true,
        _ => false,
    };
    let answered = [if succeeds { VIRTIO_NET_OK } else { VIRTIO_NET_ERR } as u8];
    answer.first().map_or(0, |segment| segment.write(&answered) as u32)
}
