//! Comparison of the virtio-net device's MTU with the host device's. If the two differ, a frame that is too long
//! for one of them is lost silently, so a log line warns the operator.

use std::sync::atomic::{AtomicU64, Ordering};

use log::{info, warn};

/// The MTUs of both devices at the last comparison, shared by all queues of the host device.
#[derive(Debug, Default)]
pub(super) struct MtuComparison(AtomicU64);

impl MtuComparison {
    /// Compares the MTUs, in bytes, of the host device `name` and of the guest's virtio-net device. Logs the result
    /// if an MTU has changed.
    pub(super) fn compare(&self, kind: &str, name: &str, device: u32, guest: u16) {
        let now = u64::from(guest) << 32 | u64::from(device);
        let before = self.0.swap(now, Ordering::Relaxed);
        let guest = u32::from(guest);
        if now == before {
            return;
        }
        if device < guest {
            warn!(
                "{kind} {name}: MTU differs device={device} guest={guest}; longer frames are lost; run \
                 'ip link set {name} mtu {guest}', or lower --mtu and the VMM's host_mtu="
            );
        } else if device > guest {
            info!(
                "{kind} {name}: MTU differs device={device} guest={guest}; the guest may drop longer \
                 frames"
            );
        } else if before != 0 {
            info!("{kind} {name}: MTU agrees device={device} guest={guest}");
        }
    }
}
