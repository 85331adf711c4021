//! The frontend's state of one ring.

use std::fs::File;
use std::io;
use std::sync::Arc;

use crate::device::Refusal;
use crate::features::Negotiated;
use crate::guest::{GuestMemory, RingLayout};
use crate::protocol::VringAddresses;
use crate::sys::eventfd::{ForeignEvent, NotifyFd};
use crate::worker::{Ring, RingState};

/// Kick descriptor of a ring; SET_VRING_KICK starts the ring.
#[derive(Debug, Default)]
pub(super) enum Kick {
    /// Not started.
    #[default]
    NotGiven,
    /// Started. The worker polls a ring without a descriptor.
    Given(Option<Arc<NotifyFd>>),
}

/// Addresses of a ring's parts, in the frontend's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Addresses {
    descriptors: u64,
    used: u64,
    avail: u64,
}

impl From<VringAddresses> for Addresses {
    fn from(sent: VringAddresses) -> Self {
        Addresses { descriptors: sent.descriptors, used: sent.used, avail: sent.avail }
    }
}

impl Addresses {
    /// Returns the addresses of descriptor table, used ring and available ring.
    pub(super) fn all(self) -> (u64, u64, u64) {
        (self.descriptors, self.used, self.avail)
    }

    pub(super) fn same_place(&self, sent: &VringAddresses) -> bool {
        *self == Addresses::from(*sent)
    }
}

/// State of one ring.
#[derive(Debug, Default)]
pub(super) struct VringState {
    /// Number of descriptors; 0 before SET_VRING_NUM.
    pub(super) size: u16,
    pub(super) addresses: Option<Addresses>,
    /// Index of the next chain: of SET_VRING_BASE, or of the last session's end.
    pub(super) base: u16,
    /// State by SET_VRING_ENABLE; `None` before the first one.
    pub(super) enabled: Option<bool>,
    pub(super) kick: Kick,
    pub(super) call: Arc<ForeignEvent>,
    pub(super) error: Arc<ForeignEvent>,
    /// Reason why a started ring does not run.
    pub(super) fault: Option<String>,
}

impl VringState {
    pub(super) fn is_running(&self) -> bool {
        matches!(self.kick, Kick::Given(_)) && self.fault.is_none()
    }

    /// Returns whether the ring was started, and then disabled.
    pub(super) fn is_idle(&self) -> bool {
        self.is_running() && self.enabled == Some(false)
    }

    pub(super) fn has_kick(&self) -> bool {
        matches!(self.kick, Kick::Given(Some(_)))
    }

    /// Returns the number of descriptors that are kept for the ring.
    pub(super) fn descriptors(&self) -> usize {
        let kept = [self.has_kick(), self.call.is_set(), self.error.is_set()];
        kept.into_iter().filter(|is| *is).count()
    }

    /// Stops the ring. Size, addresses, and call and error descriptors stay, as QEMU expects over a reset.
    pub(super) fn stop(&mut self) {
        self.kick = Kick::NotGiven;
        self.fault = None;
    }

    /// Finds the ring in `memory`.
    ///
    /// # Errors
    /// Addresses or size are not set, or the ring is not wholly in mapped regions, or not aligned.
    pub(super) fn layout(&self, memory: &GuestMemory) -> Result<RingLayout, String> {
        let addresses = self.addresses.ok_or("it was started before SET_VRING_ADDR")?;
        if self.size == 0 {
            return Err("it was started before SET_VRING_NUM".into());
        }
        let find = |address: u64, part: &str| {
            memory.guest_address(address).ok_or_else(|| {
                let mut unmapped = memory.unmapped().iter();
                let is_there = unmapped.any(|region| region.holds(address));
                let region = if is_there {
                    "a memory region that is not mapped; give the guest memory from \
                     memory-backend-memfd, with share=on"
                } else {
                    "no memory region"
                };
                format!("its {part} at {address:#x} is in {region}")
            })
        };
        let layout = RingLayout {
            size: self.size,
            descriptors: find(addresses.descriptors, "descriptor table")?,
            avail: find(addresses.avail, "available ring")?,
            used: find(addresses.used, "used ring")?,
        };
        layout.check(memory).map_err(|fault| fault.to_string())?;
        Ok(layout)
    }

    /// Checks that guest memory holds the descriptor table of a ring that has been used.
    ///
    /// During post-copy migration, a page arrives when the guest touches it, and only in the VMM. The daemon
    /// would read zeros, and the page would never arrive.
    ///
    /// # Errors
    /// The base is not 0, and the descriptor table is all zeros.
    pub(super) fn check_arrival(
        &self,
        memory: &GuestMemory,
        layout: &RingLayout,
    ) -> Result<(), String> {
        if self.base != 0 && memory.is_blank(layout.descriptors, 16 * u64::from(layout.size)) {
            return Err(format!(
                "its descriptor table is missing from guest memory at index {}: post-copy migration is \
                 not supported; migrate with pre-copy",
                self.base
            ));
        }
        Ok(())
    }

    /// Returns the ring for a session; `None` if the ring does not run. If a started ring has no valid layout, the
    /// reason goes to `complain`, and becomes the ring's fault.
    pub(super) fn session(
        &mut self,
        memory: &GuestMemory,
        negotiated: &Negotiated,
        complain: impl FnOnce(&str),
    ) -> Option<Ring> {
        let Kick::Given(kick) = &self.kick else { return None };
        if self.fault.is_some() {
            return None;
        }
        match self.layout(memory) {
            Ok(layout) => Some(Ring {
                layout,
                base: self.base,
                state: match self.enabled {
                    Some(true) => RingState::Enabled,
                    Some(false) => RingState::Disabled,
                    // Without protocol features there is no SET_VRING_ENABLE.
                    None if !negotiated.protocol_features() => RingState::Enabled,
                    // cloud-hypervisor starts a ring before it enables the ring. The worker would drop the
                    // guest's frames meanwhile if the ring counted as disabled.
                    None => RingState::Waiting,
                },
                kick: kick.clone(),
                call: self.call.clone(),
                error: self.error.clone(),
            }),
            Err(why) => {
                complain(&why);
                self.fault = Some(why);
                None
            }
        }
    }
}

/// Takes a descriptor of the frontend, if it passes `check`.
pub(super) fn foreign(
    file: Option<File>,
    check: fn(File) -> io::Result<NotifyFd>,
) -> Result<Option<NotifyFd>, Refusal> {
    file.map(check).transpose().map_err(|error| Refusal::Refused(error.to_string()))
}
