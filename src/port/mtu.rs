//! Where the MTU of a card and that of the device behind it differ, somebody has to say so: frames
//! that are too long for one of them are lost without a word.

use std::sync::atomic::{AtomicU64, Ordering};

use log::{info, warn};

/// The MTUs of a card and its device as they were compared last, for all queues of the device.
#[derive(Debug, Default)]
pub(super) struct MtuComparison(AtomicU64);

impl MtuComparison {
    /// Compares the MTUs in bytes of a device of that kind and name, and of the card; says what that
    /// means if it has changed.
    pub(super) fn compare(&self, kind: &str, name: &str, device: u32, card: u16) {
        let now = u64::from(card) << 32 | u64::from(device);
        let before = self.0.swap(now, Ordering::Relaxed);
        let card = u32::from(card);
        if now == before {
            return;
        }
        if device < card {
            warn!(
                "{kind} {name}: MTU differs device={device} card={card}; longer frames are lost; run \
                 'ip link set {name} mtu {card}', or lower --mtu and the VMM's host_mtu="
            );
        } else if device > card {
            info!(
                "{kind} {name}: MTU differs device={device} card={card}; the guest may drop longer \
                 frames"
            );
        } else if before != 0 {
            info!("{kind} {name}: MTU agrees device={device} card={card}");
        }
    }
}
