//! What the frontend has told about one ring.

use std::fs::File;
use std::io;
use std::sync::Arc;

use crate::device::Refusal;
use crate::features::Negotiated;
use crate::guest::{GuestMemory, RingLayout};
use crate::protocol::VringAddresses;
use crate::sys::eventfd::{ForeignEvent, NotifyFd};
use crate::worker::{Ring, RingState};

/// Whether the frontend has started the ring, and how its driver kicks.
#[derive(Debug, Default)]
pub(super) enum Kick {
    /// Not started.
    #[default]
    NotGiven,
    /// Started; without a descriptor the ring is to be polled.
    Given(Option<Arc<NotifyFd>>),
}

/// A ring's addresses as the frontend sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Addresses {
    descriptors: u64,
    used: u64,
    avail: u64,
}

impl From<VringAddresses> for Addresses {
    fn from(told: VringAddresses) -> Self {
        Addresses { descriptors: told.descriptors, used: told.used, avail: told.avail }
    }
}

impl Addresses {
    /// Of descriptor table, used and avail ring.
    pub(super) fn all(self) -> (u64, u64, u64) {
        (self.descriptors, self.used, self.avail)
    }

    pub(super) fn same_place(&self, told: &VringAddresses) -> bool {
        *self == Addresses::from(*told)
    }
}

/// One ring.
#[derive(Debug, Default)]
pub(super) struct VringState {
    pub(super) size: u16,
    pub(super) addresses: Option<Addresses>,
    /// By SET_VRING_BASE, or where the ring stood when it last stopped.
    pub(super) base: u16,
    /// By SET_VRING_ENABLE; nothing before the first one.
    pub(super) enabled: Option<bool>,
    pub(super) kick: Kick,
    pub(super) call: Arc<ForeignEvent>,
    pub(super) error: Arc<ForeignEvent>,
    /// Why the ring does not run though it was started.
    pub(super) fault: Option<String>,
}

impl VringState {
    pub(super) fn is_running(&self) -> bool {
        matches!(self.kick, Kick::Given(_)) && self.fault.is_none()
    }

    /// Whether it was started, and then disabled.
    pub(super) fn is_idle(&self) -> bool {
        self.is_running() && self.enabled == Some(false)
    }

    pub(super) fn has_kick(&self) -> bool {
        matches!(self.kick, Kick::Given(Some(_)))
    }

    /// Descriptors that are kept for it.
    pub(super) fn descriptors(&self) -> usize {
        let kept = [self.has_kick(), self.call.is_set(), self.error.is_set()];
        kept.into_iter().filter(|is| *is).count()
    }

    /// Stops the ring; size, addresses and descriptors for call and error stay, as QEMU expects
    /// over a reset.
    pub(super) fn stop(&mut self) {
        self.kick = Kick::NotGiven;
        self.fault = None;
    }

    /// Where the ring lies in `memory`.
    ///
    /// # Errors
    /// What is missing or wrong.
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
            avail: find(addresses.avail, "avail ring")?,
            used: find(addresses.used, "used ring")?,
        };
        layout.check(memory).map_err(|fault| fault.to_string())?;
        Ok(layout)
    }

    /// Whether the memory of a ring that has been used is there.
    ///
    /// With post-copy migration, a page arrives when the guest touches it, and only at the VMM. The daemon
    /// would read zeros, and the page would never arrive.
    ///
    /// # Errors
    /// The descriptor table is blank.
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

    /// The ring as a session needs it; none if it is not to run. `complain` hears why not, if it
    /// was started.
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
                    // cloud-hypervisor enables a ring after it has started it. What the guest
                    // sent before must not be dropped in between, as for a disabled ring.
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

/// Takes over a descriptor, which `check` looks at.
pub(super) fn foreign(
    file: Option<File>,
    check: fn(File) -> io::Result<NotifyFd>,
) -> Result<Option<NotifyFd>, Refusal> {
    file.map(check).transpose().map_err(|error| Refusal::Refused(error.to_string()))
}
