//! Ethernet frames.

/// Direction of a frame, as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Way {
    /// From the guest.
    Tx,
    /// To the guest.
    Rx,
}
