//! The treatment of frames that arrive on a port's queues: the packet filter, and counters by peer.

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

/// Filter and counters of the port's queues.
#[derive(Debug, Clone, Default)]
pub(super) struct QueueConfig {
    pub(super) filter: Filter,
    /// Map in which the program counts frames by sender, while an operator asks for it.
    peers: Option<Arc<Peers>>,
}

impl Interface {
    /// Attaches the program, and replaces what an earlier daemon may have configured for our queues.
    pub(super) fn attach(
        &self,
        link: &Link,
        queue_config: &QueueConfig,
    ) -> Result<Arc<Attachment>, OpenError> {
        let attachment = Attachment::new(self.name(), link.index, self.options.attach)?;
        self.load_programs(&attachment, queue_config)?;
        self.device.store(link.index, Ordering::Relaxed);
        Ok(attachment)
    }

    fn load_programs(
        &self,
        attachment: &Attachment,
        queue_config: &QueueConfig,
    ) -> Result<(), OpenError> {
        let queues = self.queue(0)..self.queue(self.pairs);
        let program =
            QueueProgram { filter: &queue_config.filter, peers: queue_config.peers.as_deref() };
        attachment.load_queue_program(queues, &program).map_err(|error| {
            OpenError(format!("cannot set the filter of {}'s queues: {error}", self.name()))
        })
    }

    /// Replaces the configuration by `change` of it. The old one stays in force if the new one fails to load.
    fn configure(&self, change: impl FnOnce(&QueueConfig) -> QueueConfig) -> Result<(), OpenError> {
        let mut shared = self.lock();
        let queue_config = change(&shared.queue_config);
        if let Some(attachment) = &shared.attachment {
            self.load_programs(attachment, &queue_config)?;
        }
        self.has_filter.store(!queue_config.filter.is_none(), Ordering::Relaxed);
        shared.queue_config = queue_config;
        Ok(())
    }

    /// Returns the number of frames that the filter has dropped on a queue pair's queue, on behalf of every
    /// daemon that used the queue since the program was attached.
    pub(in crate::port::af_xdp) fn filtered(&self, pair: u16) -> Option<u64> {
        let shared = self.lock();
        let counters = shared.attachment.as_ref()?.counters(self.queue(pair));
        counters.ok().map(|counters| counters.filtered)
    }

    /// Returns true if a filter checks frames to the guest.
    pub(in crate::port::af_xdp) fn has_filter(&self) -> bool {
        self.has_filter.load(Ordering::Relaxed)
    }

    /// Returns the filter of frames to the guest.
    pub fn filter(&self) -> Filter {
        self.lock().queue_config.filter.clone()
    }

    /// Replaces the filter of frames to the guest.
    ///
    /// # Errors
    /// Those of loading a program; the old filter then stays in force.
    pub fn set_filter(&self, filter: &Filter) -> Result<(), OpenError> {
        self.configure(|before| QueueConfig { filter: filter.clone(), ..before.clone() })
    }
}

impl PeerCounter for Interface {
    fn count_peers(&self, on: bool) -> io::Result<()> {
        let peers = on.then(program::peers).transpose().map_err(|error| {
            io::Error::other(format!("cannot count the peers of {}: {error}", self.name()))
        })?;
        self.configure(|before| QueueConfig { peers: peers.map(Arc::new), ..before.clone() })
            .map_err(|error| io::Error::other(error.to_string()))
    }

    fn peers(&self) -> io::Result<Vec<(Key, Volume)>> {
        let Some(peers) = self.lock().queue_config.peers.clone() else { return Ok(Vec::new()) };
        let row = |(key, [frames, bytes]): (_, [u64; 2])| {
            let (protocol, peer) = seen(&key);
            (Key { direction: FrameDirection::Rx, protocol, peer }, Volume { frames, bytes })
        };
        Ok(peers.recent(2 * MAX_ROWS)?.into_iter().map(row).collect())
    }
}
