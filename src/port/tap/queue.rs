//! A queue of a TAP device, for the daemon's life: what the device can do, and what it is set to.
//!
//! Invariant: what is noted of the device's offloads, link and steering is what was set last. Where a session
//! that panicked or another daemon may have set something else, nothing is noted, or the kernel is asked
//! again; so a session sets only what differs.

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

/// How bursts of frames are written to a TAP.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TxMethod {
    /// By io_uring where it is permitted, else by `writev`.
    Auto,
    /// One io_uring submission for a burst; an error where it is not permitted.
    IoUring,
    /// One system call for each frame.
    Writev,
}

/// One queue of a TAP device, for the daemon's life.
#[derive(Debug)]
pub struct TapQueue {
    pub(super) queue: Arc<Queue>,
    filter: Arc<TapFilter>,
    pub(super) writer: Option<Writer>,
    /// Why bursts are written that way.
    reason: String,
    offloads: PortOffloads,
    settings: Arc<Settings>,
    /// Whether it counts among the [small rings](Settings::small).
    pub(super) is_small: bool,
    /// Size of the rx ring that was small in the last session: it is so from the next one's first frame on.
    pub(super) small_size: Option<u16>,
    /// Whether the device's link is up; `None` if another daemon may have set it.
    link: Option<bool>,
    /// Whether it is to be up.
    wanted_link: bool,
    /// Whether the kernel steers frames here; `None` for a device that has one queue only.
    attached: Option<bool>,
    /// The filter's [generation](TapFilter::generation) when the device's settings, `link` and `attached` were
    /// valid.
    generation: u64,
}

/// What is set for all queues of a device.
#[derive(Debug, Default)]
struct Settings {
    /// What the device was last set to: header length and `TUN_F_*`.
    applied: Mutex<Option<(usize, u32)>>,
    /// Rx rings that cannot hold a frame that is to be segmented: the kernel segments as long as there
    /// are any.
    small: AtomicUsize,
    mtu: MtuComparison,
}

impl Settings {
    fn applied(&self) -> MutexGuard<'_, Option<(usize, u32)>> {
        self.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A TAP as a predecessor has opened it: what its successor cannot ask of the kernel without changing
/// the device. Part of the take-over's messages: no name changes.
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
    /// Has the kernel steer no frames to further queues of the device, as it does from their opening on.
    ///
    /// # Errors
    /// Those of the device.
    pub fn detach(&self, queues: Vec<OwnedFd>) -> io::Result<Vec<OwnedFd>> {
        let detach = |fd| {
            let queue = Queue::inherit(fd)?;
            let index = queue.identity().index;
            if self.index.is_some() && index != self.index {
                let other = &queue.identity().name;
                return Err(io::Error::other(format!(
                    "a queue of {other} came, which is another device than the port's"
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
    /// Prepares the open queues of one device: sets what they all judge frames for the guest by,
    /// asks what the device can do, and chooses how to write.
    ///
    /// # Errors
    /// Those of the device's ioctls, and those of io_uring if `method` demands it.
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
            // No frame is steered here before a guest has buffers for it.
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

    /// Prepares the queues of a device that another daemon serves. Nothing is set: the predecessor must
    /// find its device unchanged if the take-over fails. The first session after
    /// [`TapFilter::reassert`] sets everything.
    ///
    /// # Errors
    /// Those of io_uring if `method` demands it.
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
        let adopt = |queue: Arc<Queue>| {
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
        queues.into_iter().map(adopt).collect()
    }

    /// What a successor needs beside the queues' descriptors.
    pub fn state(&self) -> TapState {
        let Identity { name, index, multi_queue, is_macvtap } = self.queue.identity().clone();
        TapState { name, index, multi_queue, is_macvtap, offloads: self.offloads }
    }

    /// How bursts are written, and why so.
    pub fn tx_method(&self) -> String {
        let way = if self.writer.is_some() { "io_uring" } else { "writev" };
        format!("{way} ({})", self.reason)
    }

    /// What the device can do with a frame's offloads.
    pub fn offloads(&self) -> PortOffloads {
        self.offloads
    }

    /// The same queue once more, for frames beside those of a session.
    pub(in crate::port) fn another_handle(&self) -> io::Result<Queue> {
        self.queue.try_clone()
    }

    /// What frames for the guest are judged by, for all queues of the device.
    pub fn filter(&self) -> &Arc<TapFilter> {
        &self.filter
    }

    /// The device's name.
    pub fn name(&self) -> &str {
        &self.queue.identity().name
    }

    /// Sets the device for a session: it leaves to the guest what the guest has accepted, and no more.
    ///
    /// # Errors
    /// Those of the device.
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

    /// Forgets what a session that panicked may have set without noting it, and an io_uring instance that
    /// holds frames of that session.
    pub(in crate::port) fn recover(&mut self) {
        self.writer.take_if(|writer| !writer.is_idle());
        self.set_small(false);
        *self.settings.applied() = None;
        self.link = None;
        self.attached = attached(&self.queue);
    }

    /// Longest frame in bytes that is not to be segmented: by the device's MTU, which can be
    /// changed at any time, or the card's.
    pub(super) fn longest_frame(&self, mtu: u16) -> usize {
        let device = self.queue.mtu().unwrap_or(0);
        if device > 0 {
            self.settings.mtu.compare("tap", self.name(), device, mtu);
        }
        (device as usize).max(usize::from(mtu)) + LINK_OVERHEAD
    }

    /// Sets what applies to the whole device, if no queue has done so already.
    pub(super) fn apply(&self, header_length: usize, accepted: &Offloads) -> io::Result<()> {
        let mut offloads = tun_offloads(accepted);
        let mut applied = self.settings.applied();
        if self.settings.small.load(Ordering::Relaxed) > 0 {
            offloads &= offload::CSUM;
        }
        let settings = (header_length, offloads);
        if *applied != Some(settings) {
            // If one of both fails, neither is known.
            *applied = None;
            self.queue.set_header_length(header_length)?;
            self.queue.set_offload(offloads)?;
            *applied = Some(settings);
        }
        Ok(())
    }

    /// Notes whether the rx ring is too small for frames that are to be segmented.
    pub(super) fn set_small(&mut self, small: bool) {
        match (std::mem::replace(&mut self.is_small, small), small) {
            (false, true) => _ = self.settings.small.fetch_add(1, Ordering::Relaxed),
            (true, false) => _ = self.settings.small.fetch_sub(1, Ordering::Relaxed),
            _ => {}
        }
    }

    /// Sets the device's link, if it is not so already. While it is down the host sends it nothing:
    /// what piled up meanwhile would be late. The kernel (`tun_net_change_carrier`) sets no link up of a
    /// device without attached queues: the first one that is attached does.
    fn set_link(&mut self, up: bool) -> io::Result<()> {
        self.wanted_link = up;
        if self.queue.identity().is_macvtap {
            // Its carrier is that of the device below. Frames that came meanwhile would be late.
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

    /// Has the kernel steer frames here, or not, if the device has several queues.
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

/// Whether the kernel steers frames to a queue; `None` for a device that has one queue only. A queue
/// of a device that is gone counts as detached.
fn attached(queue: &Queue) -> Option<bool> {
    queue.identity().multi_queue.then(|| queue.is_attached().unwrap_or(false))
}

/// An io_uring instance if bursts are to be written with one, and the reason.
fn choose_writer(queue: &Queue, method: TxMethod) -> io::Result<(Option<Writer>, String)> {
    if method == TxMethod::Writev {
        return Ok((None, "as configured".into()));
    }
    if queue.has_send_limit() {
        // Frames behind one that was refused for lack of room would overtake it.
        return Ok((None, "the device limits what it buffers".into()));
    }
    match Writer::new(queue.as_fd()) {
        Ok(writer) if method == TxMethod::IoUring => Ok((Some(writer), "as configured".into())),
        Ok(writer) => Ok((Some(writer), "a burst is one system call".into())),
        Err(error) if method == TxMethod::IoUring => Err(error),
        Err(error) => Ok((None, format!("io_uring is not available: {error}"))),
    }
}

/// `TUN_F_*` for what the guest has accepted.
fn tun_offloads(accepted: &Offloads) -> u32 {
    let mut flags = 0;
    for (on, flag) in [
        (accepted.checksum, offload::CSUM),
        (accepted.tcp4, offload::TSO4),
        (accepted.tcp6, offload::TSO6),
        // The kernel takes ECN only beside TSO.
        (accepted.ecn && (accepted.tcp4 || accepted.tcp6), offload::TSO_ECN),
        // The kernel takes both or none.
        (accepted.udp4 && accepted.udp6, offload::USO4 | offload::USO6),
    ] {
        if on {
            flags |= flag;
        }
    }
    flags
}
