//! A queue of a TAP, open for the daemon's life: the device's capabilities and settings.
//!
//! Invariant: the recorded offloads, link state and steering are the settings that the device has, so a session sets
//! only what differs. If a session that panicked or another daemon may have changed a setting, the record is
//! cleared, or read from the kernel again.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::TapFilter;
use crate::features::{HEADER_LENGTH, Offloads, PortOffloads};
use crate::frame::LINK_OVERHEAD;
use crate::policy::Filter;
use crate::port::SessionConfig;
use crate::port::mtu::MtuComparison;
use crate::sys::tap::{Identity, Queue, offload};
use crate::sys::uring::Writer;

/// The method of writing bursts of frames to a TAP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TxMethod {
    /// io_uring if the kernel permits it and the TAP's send buffer is unlimited, else `writev`.
    Auto,
    /// One io_uring submission for each burst; an error if the kernel does not permit io_uring.
    IoUring,
    /// One `writev` for each frame.
    Writev,
}

/// One queue of a TAP, open for the daemon's life.
#[derive(Debug)]
pub struct TapQueue {
    pub(super) queue: Arc<Queue>,
    filter: Arc<TapFilter>,
    pub(super) writer: Option<Writer>,
    /// The reason for the method of writing.
    reason: String,
    offloads: PortOffloads,
    settings: Arc<Settings>,
    /// Whether this queue counts among the [small rings](Settings::small).
    pub(super) is_small: bool,
    /// Size of the last session's rx ring, if the ring was small. A ring of the same size counts as small from the
    /// next session's first frame on.
    pub(super) small_size: Option<u16>,
    /// Whether the device's link is up; `None` if another daemon may have set it.
    link: Option<bool>,
    /// Link state that the session demands.
    wanted_link: bool,
    /// Whether the kernel steers frames to this queue; `None` for a device with one queue.
    attached: Option<bool>,
    /// The filter's [generation](TapFilter::generation) that the recorded settings, `link` and `attached` belong to.
    generation: u64,
}

/// Settings that all queues of a device share.
#[derive(Debug, Default)]
struct Settings {
    /// Header length and `TUN_F_*` that were set last; `None` if unknown.
    applied: Mutex<Option<(usize, u32)>>,
    /// Number of rx rings that cannot hold a GSO frame of 64 KiB. If there is one, the kernel segments for all queues.
    small: AtomicUsize,
    mtu: MtuComparison,
}

impl Settings {
    fn applied(&self) -> MutexGuard<'_, Option<(usize, u32)>> {
        self.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// State of a TAP that a predecessor has opened. A successor cannot read this state from the kernel without changing
/// the device. It is part of the take-over's messages, so the names of its fields stay.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TapState {
    /// The device's name when it was opened.
    pub name: String,
    /// The device's index.
    #[serde(default)]
    pub index: Option<u32>,
    multi_queue: bool,
    #[serde(default)]
    is_macvtap: bool,
    offloads: PortOffloads,
}

impl TapState {
    /// Detaches additional queues of the device: the kernel steers frames to a queue from its opening on.
    ///
    /// # Errors
    /// A descriptor is no queue of this device, or the device refuses.
    pub fn detach(&self, queues: Vec<OwnedFd>) -> io::Result<Vec<OwnedFd>> {
        let detach = |fd| {
            let queue = Queue::inherit(fd)?;
            let index = queue.identity().index;
            if self.index.is_some() && index != self.index {
                let other = &queue.identity().name;
                return Err(io::Error::other(format!(
                    "cannot take over a queue: it belongs to {other}, not to {}; reload again",
                    self.name
                )));
            }
            if self.multi_queue {
                queue.set_attached(false)?;
            }
            Ok(queue.into())
        };
        queues.into_iter().map(detach).collect()
    }
}

impl TapQueue {
    /// Prepares the open queues of one device: sets the filter of frames to the guest, probes the device's offloads,
    /// and chooses the method of writing.
    ///
    /// # Errors
    /// The device refuses a setting, or io_uring is not permitted and `method` demands it.
    pub fn prepare(queues: Vec<Queue>, method: TxMethod, filter: &Filter) -> io::Result<Vec<Self>> {
        let queues: Vec<Arc<Queue>> = queues.into_iter().map(Arc::new).collect();
        let filter = Arc::new(TapFilter::new(queues.clone(), filter)?);
        let settings = Arc::default();
        queues.into_iter().map(|queue| Self::new(queue, method, &filter, &settings)).collect()
    }

    fn new(
        queue: Arc<Queue>,
        method: TxMethod,
        filter: &Arc<TapFilter>,
        settings: &Arc<Settings>,
    ) -> io::Result<Self> {
        use offload::{CSUM, TSO_ECN, TSO4, TSO6, USO4, USO6};
        queue.set_header_length(HEADER_LENGTH)?;
        let tcp = CSUM | TSO4 | TSO6 | TSO_ECN;
        let udp_segmentation = queue.set_offload(tcp | USO4 | USO6).is_ok();
        let segmentation = udp_segmentation || queue.set_offload(tcp).is_ok();
        queue.set_offload(0)?;
        let multi_queue = queue.identity().multi_queue;
        if multi_queue {
            // The kernel steers no frame here until the guest has rx buffers.
            filter.set_attached(&queue, false)?;
        }
        let (writer, reason) = choose_writer(&queue, method)?;
        Ok(TapQueue {
            queue,
            filter: filter.clone(),
            writer,
            reason,
            offloads: PortOffloads {
                checksum: segmentation,
                segmentation,
                udp_segmentation,
                both_ways: segmentation,
            },
            settings: settings.clone(),
            is_small: false,
            small_size: None,
            link: Some(true),
            wanted_link: true,
            attached: multi_queue.then_some(false),
            generation: filter.generation(),
        })
    }

    /// Prepares the queues of a device that another daemon serves, without a change of the device: the predecessor
    /// continues if the take-over fails. The first session after [`TapFilter::reassert`] sets the device.
    ///
    /// # Errors
    /// io_uring is not permitted and `method` demands it.
    pub fn of_predecessor(
        queues: Vec<OwnedFd>,
        state: &TapState,
        method: TxMethod,
        filter: &Filter,
    ) -> io::Result<Vec<Self>> {
        let TapState { name, index, multi_queue, is_macvtap, .. } = state.clone();
        let identity = Identity { name, index, multi_queue, is_macvtap };
        let queues = queues.into_iter().map(|fd| Arc::new(Queue::identified_as(fd, &identity)));
        let queues: Vec<Arc<Queue>> = queues.collect();
        let filter = Arc::new(TapFilter::of_predecessor(queues.clone(), filter));
        let settings = Arc::<Settings>::default();
        let restore = |queue: Arc<Queue>| {
            let (writer, reason) = choose_writer(&queue, method)?;
            Ok(TapQueue {
                filter: filter.clone(),
                writer,
                reason,
                offloads: state.offloads,
                settings: settings.clone(),
                is_small: false,
                small_size: None,
                link: None,
                wanted_link: true,
                attached: attached(&queue),
                generation: filter.generation(),
                queue,
            })
        };
        queues.into_iter().map(restore).collect()
    }

    /// State that a successor needs beside the queues' descriptors.
    pub fn state(&self) -> TapState {
        let Identity { name, index, multi_queue, is_macvtap } = self.queue.identity().clone();
        TapState { name, index, multi_queue, is_macvtap, offloads: self.offloads }
    }

    /// Method of writing bursts, and the reason, for the log.
    pub fn tx_method(&self) -> String {
        let method = if self.writer.is_some() { "io_uring" } else { "writev" };
        format!("{method} ({})", self.reason)
    }

    /// Offloads that the device supports.
    pub fn offloads(&self) -> PortOffloads {
        self.offloads
    }

    /// Duplicates the queue's descriptor, for frames beside those of a session.
    pub(in crate::port) fn duplicate(&self) -> io::Result<Queue> {
        self.queue.try_clone()
    }

    /// Filter of frames to the guest, for all queues of the device.
    pub fn filter(&self) -> &Arc<TapFilter> {
        &self.filter
    }

    /// Name of the device when it was opened.
    pub fn name(&self) -> &str {
        &self.queue.identity().name
    }

    /// Sets the device for a session, with exactly the offloads that the guest has accepted.
    ///
    /// # Errors
    /// The device refuses a setting, for example because the device was deleted.
    pub(super) fn configure(&mut self, config: &SessionConfig) -> io::Result<()> {
        let generation = self.filter.generation();
        if self.generation != generation {
            self.generation = generation;
            *self.settings.applied() = None;
            self.link = None;
            self.attached = attached(&self.queue);
        }
        let accepted = config.negotiated.guest();
        let is_small = self.small_size == Some(config.rx_size)
            && config.negotiated.mergeable()
            && accepted.segmentation();
        self.set_small(is_small);
        self.apply(config.negotiated.header_length(), &accepted)?;
        if !config.receives {
            self.set_attached(false)?;
        }
        self.set_link(config.link)
    }

    /// Clears the recorded settings after a session that panicked, and drops an io_uring instance that still holds
    /// frames of that session.
    pub(in crate::port) fn recover(&mut self) {
        self.writer.take_if(|writer| !writer.is_idle());
        self.set_small(false);
        *self.settings.applied() = None;
        self.link = None;
        self.attached = attached(&self.queue);
    }

    /// Longest frame in bytes without segmentation: by the larger MTU of the TAP, which can change at any time, and
    /// of the virtio-net device.
    pub(super) fn longest_frame(&self, mtu: u16) -> usize {
        let device = self.queue.mtu().unwrap_or(0);
        if device > 0 {
            self.settings.mtu.compare("tap", self.name(), device, mtu);
        }
        (device as usize).max(usize::from(mtu)) + LINK_OVERHEAD
    }

    /// Sets header length and offloads of the whole device, unless another queue has set the same.
    pub(super) fn apply(&self, header_length: usize, accepted: &Offloads) -> io::Result<()> {
        let mut offloads = tun_offloads(accepted);
        let mut applied = self.settings.applied();
        if self.settings.small.load(Ordering::Relaxed) > 0 {
            offloads &= offload::CSUM;
        }
        let settings = (header_length, offloads);
        if *applied != Some(settings) {
            // If one of the two calls fails, both settings are unknown.
            *applied = None;
            self.queue.set_header_length(header_length)?;
            self.queue.set_offload(offloads)?;
            *applied = Some(settings);
        }
        Ok(())
    }

    /// Records whether the rx ring is too small for GSO frames.
    pub(super) fn set_small(&mut self, small: bool) {
        match (std::mem::replace(&mut self.is_small, small), small) {
            (false, true) => _ = self.settings.small.fetch_add(1, Ordering::Relaxed),
            (true, false) => _ = self.settings.small.fetch_sub(1, Ordering::Relaxed),
            _ => {}
        }
    }

    /// Sets the device's link, if the recorded state differs. While the link is down the host sends no frames, so none
    /// queue up and arrive late.
    ///
    /// The kernel (`tun_net_change_carrier`) cannot set the link up while no queue is attached. Then the first queue
    /// that is attached sets the link up.
    fn set_link(&mut self, up: bool) -> io::Result<()> {
        self.wanted_link = up;
        if self.queue.identity().is_macvtap {
            // A macvtap's carrier is the lower device's. Frames that have queued up meanwhile would be late.
            if up && self.link == Some(false) {
                self.queue.drain();
            }
            self.link = Some(up);
            return Ok(());
        }
        let too_early = up && self.attached == Some(false);
        if self.link != Some(up) && !too_early {
            self.queue.set_carrier(up)?;
            self.link = Some(up);
        }
        Ok(())
    }

    /// Attaches or detaches the queue, if the device has several: the kernel steers frames to attached queues only.
    pub(super) fn set_attached(&mut self, attached: bool) -> io::Result<()> {
        if self.attached == Some(!attached) {
            self.filter.set_attached(&self.queue, attached)?;
            self.attached = Some(attached);
            if attached {
                self.set_link(self.wanted_link)?;
            }
        }
        Ok(())
    }
}

/// Asks the kernel whether it steers frames to a queue; `None` for a device with one queue. A queue of a device that
/// is gone counts as detached.
fn attached(queue: &Queue) -> Option<bool> {
    queue.identity().multi_queue.then(|| queue.is_attached().unwrap_or(false))
}

/// Chooses the method of writing: an io_uring instance, or `None` for `writev`; and the reason.
fn choose_writer(queue: &Queue, method: TxMethod) -> io::Result<(Option<Writer>, String)> {
    if method == TxMethod::Writev {
        return Ok((None, "as configured".into()));
    }
    if queue.has_send_limit() {
        // With io_uring, later frames would overtake one that found the send buffer full.
        return Ok((None, "limited send buffer".into()));
    }
    match Writer::new(queue.as_fd()) {
        Ok(writer) if method == TxMethod::IoUring => Ok((Some(writer), "as configured".into())),
        Ok(writer) => Ok((Some(writer), "a burst is one system call".into())),
        Err(error) if method == TxMethod::IoUring => Err(error),
        Err(error) => Ok((None, format!("io_uring is not available: {error}"))),
    }
}

/// Returns the `TUN_F_*` flags of the offloads that the guest has accepted.
fn tun_offloads(accepted: &Offloads) -> u32 {
    let mut flags = 0;
    for (on, flag) in [
        (accepted.checksum, offload::CSUM),
        (accepted.tcp4, offload::TSO4),
        (accepted.tcp6, offload::TSO6),
        // The kernel accepts ECN only with TSO.
        (accepted.ecn && (accepted.tcp4 || accepted.tcp6), offload::TSO_ECN),
        // The kernel accepts only both.
        (accepted.udp4 && accepted.udp6, offload::USO4 | offload::USO6),
    ] {
        if on {
            flags |= flag;
        }
    }
    flags
}
