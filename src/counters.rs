//! What a queue pair counts: plain numbers with one writer, its worker, and any number of readers.
//!
//! They are added to once per burst, without a locked instruction.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

/// A number that one thread adds to and others may read.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds to it. Only the counter's one writer may call this.
    #[inline]
    pub fn add(&self, amount: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(amount), Ordering::Relaxed);
    }

    /// The value at this moment.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Why a frame was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Drop {
    /// Shorter than its headers.
    TooShort,
    /// Longer than the port's MTU allows.
    TooLong,
    /// Its virtio header contradicts the frame or the negotiated features.
    BadHeader,
    /// The guest's buffers were too small or too few for it.
    NoRoom,
    /// It needs a checksum or segmentation that the guest did not accept.
    NotAccepted,
    /// Its ring is disabled.
    Disabled,
    /// The host refused it.
    HostRefused,
    /// Its source, or the sender that it names, is an Ethernet address that is not the guest's.
    SpoofedMac,
    /// Its source, or what it claims, is an IP address that is not the guest's.
    SpoofedAddress,
    /// It has a VLAN tag that is not the guest's to set.
    ForbiddenVlan,
    /// It is nothing that a guest sends: a router's, a DHCP server's, a bridge's, or unknown.
    Forbidden,
    /// The operator's filter denies it.
    Filtered,
}

impl Drop {
    /// All reasons.
    pub const ALL: [Drop; 12] = [
        Drop::TooShort,
        Drop::TooLong,
        Drop::BadHeader,
        Drop::NoRoom,
        Drop::NotAccepted,
        Drop::Disabled,
        Drop::HostRefused,
        Drop::SpoofedMac,
        Drop::SpoofedAddress,
        Drop::ForbiddenVlan,
        Drop::Forbidden,
        Drop::Filtered,
    ];

    /// The reason as it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Drop::TooShort => "too_short",
            Drop::TooLong => "too_long",
            Drop::BadHeader => "bad_header",
            Drop::NoRoom => "no_room",
            Drop::NotAccepted => "not_accepted",
            Drop::Disabled => "disabled",
            Drop::HostRefused => "host_refused",
            Drop::SpoofedMac => "spoofed_mac",
            Drop::SpoofedAddress => "spoofed_address",
            Drop::ForbiddenVlan => "forbidden_vlan",
            Drop::Forbidden => "forbidden",
            Drop::Filtered => "filtered",
        }
    }
}

/// Why a frame's payload was copied in user space, on a port that can do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum CopyReason {
    /// The host completes its checksum: metadata or the sum itself goes with a private copy.
    Checksum,
    /// The guest's frame lies in several pieces.
    Pieces,
    /// There are rules for the guest's frame, and it must be sent as it was judged.
    Rules,
    /// The guest's frame was cut into segments.
    Segmentation,
    /// The guest's buffer does not suit the host, which put the frame into one of ours.
    Unsuitable,
    /// The frame came before the guest's buffer, and waited for it in one of ours.
    Late,
}

impl CopyReason {
    /// All reasons.
    pub const ALL: [CopyReason; 6] = [
        CopyReason::Checksum,
        CopyReason::Pieces,
        CopyReason::Rules,
        CopyReason::Segmentation,
        CopyReason::Unsuitable,
        CopyReason::Late,
    ];

    /// The reason as it is shown.
    pub fn name(self) -> &'static str {
        match self {
            CopyReason::Checksum => "checksum",
            CopyReason::Pieces => "pieces",
            CopyReason::Rules => "rules",
            CopyReason::Segmentation => "segmentation",
            CopyReason::Unsuitable => "unsuitable_buffer",
            CopyReason::Late => "late_buffer",
        }
    }
}

/// The numbers of one direction of a queue pair.
#[derive(Debug, Default)]
pub struct DirectionCounters {
    /// Frames moved.
    pub frames: Counter,
    /// Bytes of those frames, without the virtio header.
    pub bytes: Counter,
    /// Frames dropped, by reason.
    drops: [Counter; Drop::ALL.len()],
    /// Of those moved, frames whose payload was copied in user space, by reason.
    copies: [Counter; CopyReason::ALL.len()],
    /// Interrupts sent to the guest.
    pub calls: Counter,
    /// Times that the used index moved and the guest wanted no interrupt.
    pub calls_suppressed: Counter,
    /// Times that a kick woke the worker.
    pub kicks: Counter,
    /// Bursts that the port's limit cut short.
    pub limited: Counter,
}

impl DirectionCounters {
    /// Counts dropped frames.
    pub fn dropped(&self, reason: Drop, frames: u64) {
        self.drops[reason as usize].add(frames);
    }

    /// Counts frames whose payload was copied.
    pub fn copied(&self, reason: CopyReason, frames: u64) {
        self.copies[reason as usize].add(frames);
    }

    /// Frames whose payload was copied for `reason`.
    pub fn copies(&self, reason: CopyReason) -> u64 {
        self.copies[reason as usize].get()
    }

    /// Frames dropped for `reason`.
    pub fn drops(&self, reason: Drop) -> u64 {
        self.drops[reason as usize].get()
    }
}

impl fmt::Display for DirectionCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} frames, {} bytes", self.frames.get(), self.bytes.get())?;
        for reason in Drop::ALL {
            let count = self.drops(reason);
            if count > 0 {
                write!(f, ", {count} dropped ({})", reason.name())?;
            }
        }
        for reason in CopyReason::ALL {
            let count = self.copies(reason);
            if count > 0 {
                write!(f, ", {count} copied ({})", reason.name())?;
            }
        }
        let limited = self.limited.get();
        if limited > 0 {
            write!(f, ", {limited} bursts limited")?;
        }
        write!(
            f,
            ", {} kicks, {} calls, {} calls suppressed",
            self.kicks.get(),
            self.calls.get(),
            self.calls_suppressed.get()
        )
    }
}

/// The numbers of a queue pair. rx and tx are the guest's: tx is from the guest to the host.
#[derive(Debug, Default)]
pub struct PairCounters {
    /// To the guest.
    pub rx: DirectionCounters,
    /// From the guest.
    pub tx: DirectionCounters,
    /// Turns of the worker that moved something.
    pub turns: Counter,
    /// Times that the worker went to sleep.
    pub sleeps: Counter,
    /// Times that rx had to wait for the guest to provide buffers.
    pub starved: Counter,
}
