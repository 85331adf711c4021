//! What is done with frames for a port's queues: which are dropped, and what is counted.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Interface;
use crate::frame::FrameDirection;
use crate::policy::Filter;
use crate::policy::filter::seen;
use crate::port::af_xdp::OpenError;
use crate::port::af_xdp::program::{self, Attachment, Peers, QueueProgram};
use crate::sys::link::Link;
use crate::traffic::{Key, MAX_ROWS, PeerCounter, Volume};

/// What is to be done with frames for our queues.
#[derive(Debug, Clone, Default)]
pub(super) struct QueueConfig {
    pub(super) filter: Filter,
    /// Where frames are counted by who sends them.
    peers: Option<Arc<Peers>>,
}

impl Interface {
    /// Attaches the program, and has it do with frames for our queues what we want, in the stead of
    /// what somebody may have left behind.
    pub(super) fn attach(
        &self,
        link: &Link,
        wanted: &QueueConfig,
    ) -> Result<Arc<Attachment>, OpenError> {
        let attachment = Attachment::new(self.name(), link.index, self.options.attach)?;
        self.put(&attachment, wanted)?;
        self.device.store(link.index, Ordering::Relaxed);
        Ok(attachment)
    }

    fn put(&self, attachment: &Attachment, wanted: &QueueConfig) -> Result<(), OpenError> {
        let queues = self.queue(0)..self.queue(self.pairs);
        let own = QueueProgram { filter: &wanted.filter, peers: wanted.peers.as_deref() };
        attachment.load_queue_program(queues, &own).map_err(|error| {
            OpenError(format!("set the filter of {}'s queues: {error}", self.name()))
        })
    }

    /// Has something else done with frames for our queues from now on.
    fn want(&self, wanted: impl FnOnce(&QueueConfig) -> QueueConfig) -> Result<(), OpenError> {
        let mut shared = self.lock();
        let wanted = wanted(&shared.wanted);
        if let Some(attachment) = &shared.attachment {
            self.put(attachment, &wanted)?;
        }
        self.filters.store(!wanted.filter.is_none(), Ordering::Relaxed);
        shared.wanted = wanted;
        Ok(())
    }

    /// How many frames for a queue pair the program has dropped so far, for whomever.
    pub(in crate::port::af_xdp) fn filtered(&self, pair: u16) -> Option<u64> {
        let shared = self.lock();
        let counters = shared.attachment.as_ref()?.counters(self.queue(pair));
        counters.ok().map(|counters| counters.filtered)
    }

    /// Whether frames for the guest are judged.
    pub(in crate::port::af_xdp) fn filters(&self) -> bool {
        self.filters.load(Ordering::Relaxed)
    }

    /// The filter that frames for the guest are judged by.
    pub fn filter(&self) -> Filter {
        self.lock().wanted.filter.clone()
    }

    /// Has frames for the guest judged by this filter from now on.
    ///
    /// # Errors
    /// Those of loading a program; frames are judged as before then.
    pub fn set_filter(&self, filter: &Filter) -> Result<(), OpenError> {
        self.want(|before| QueueConfig { filter: filter.clone(), ..before.clone() })
    }
}

impl PeerCounter for Interface {
    fn count_peers(&self, on: bool) -> io::Result<()> {
        let peers = on.then(program::peers).transpose().map_err(|error| {
            io::Error::other(format!("count who sends to {}'s queues: {error}", self.name()))
        })?;
        self.want(|before| QueueConfig { peers: peers.map(Arc::new), ..before.clone() })
            .map_err(|error| io::Error::other(error.to_string()))
    }

    fn peers(&self) -> io::Result<Vec<(Key, Volume)>> {
        let Some(peers) = self.lock().wanted.peers.clone() else { return Ok(Vec::new()) };
        let row = |(key, [frames, bytes]): (_, [u64; 2])| {
            let (protocol, peer) = seen(&key);
            (Key { way: FrameDirection::Rx, protocol, peer }, Volume { frames, bytes })
        };
        Ok(peers.recent(2 * MAX_ROWS)?.into_iter().map(row).collect())
    }
}
