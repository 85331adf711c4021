//! Replies to requests, and their encoding.

use std::fs::File;

use vhost::vhost_user::message::FrontendReq;

use super::{HEADER_LENGTH, REPLY, VERSION};

/// A reply's payload.
#[derive(Debug)]
pub enum Reply {
    /// One 64-bit number.
    U64(u64),
    /// The `VhostUserLog` of an accepted dirty log. cloud-hypervisor waits for the whole structure; QEMU accepts a
    /// reply of any length.
    Log {
        /// Length of the log in bytes.
        size: u64,
        /// Offset of the log in its file, in bytes.
        offset: u64,
    },
    /// A ring's index, and a number.
    VringState {
        /// Index of the ring.
        index: u32,
        /// Index of the ring's next chain (GET_VRING_BASE).
        num: u32,
    },
    /// Bytes of the configuration space. No bytes mean that the read failed.
    Config {
        /// Offset of the first byte.
        offset: u32,
        /// The request's flags.
        flags: u32,
        /// Content from `offset` on.
        bytes: Vec<u8>,
    },
    /// An inflight buffer.
    Inflight {
        /// Length of the buffer in bytes.
        length: u64,
        /// Number of rings.
        rings: u16,
        /// Most descriptors of each ring.
        size: u16,
        /// Sealed memfd of the buffer.
        file: File,
    },
}

impl Reply {
    /// Returns the descriptor that is sent with the reply, if any.
    pub fn into_file(self) -> Option<File> {
        match self {
            Reply::Inflight { file, .. } => Some(file),
            Reply::U64(_) | Reply::Log { .. } | Reply::VringState { .. } | Reply::Config { .. } => {
                None
            }
        }
    }

    /// Encodes the reply, header first.
    pub fn to_bytes(&self, code: FrontendReq) -> Vec<u8> {
        let mut payload = Vec::with_capacity(32);
        match self {
            Reply::U64(value) => payload.extend(value.to_ne_bytes()),
            Reply::Log { size, offset } => {
                payload.extend(size.to_ne_bytes());
                payload.extend(offset.to_ne_bytes());
            }
            Reply::VringState { index, num } => {
                payload.extend(index.to_ne_bytes());
                payload.extend(num.to_ne_bytes());
            }
            Reply::Config { offset, flags, bytes } if !bytes.is_empty() => {
                payload.extend(offset.to_ne_bytes());
                payload.extend((bytes.len() as u32).to_ne_bytes());
                payload.extend(flags.to_ne_bytes());
                payload.extend(bytes);
            }
            Reply::Inflight { length, rings, size, .. } => {
                payload.extend(length.to_ne_bytes());
                payload.extend(0u64.to_ne_bytes());
                payload.extend(rings.to_ne_bytes());
                payload.extend(size.to_ne_bytes());
                // QEMU and the vhost crate require the structure's padding.
                payload.extend([0; 4]);
            }
            // The specification signals a failed read by an empty payload.
            Reply::Config { .. } => {}
        }
        let mut message = Vec::with_capacity(HEADER_LENGTH + payload.len());
        message.extend(u32::from(code).to_ne_bytes());
        message.extend((VERSION | REPLY).to_ne_bytes());
        message.extend((payload.len() as u32).to_ne_bytes());
        message.extend(payload);
        message
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failed_config_read_has_empty_payload() {
        let reply = Reply::Config { offset: 0, flags: 0, bytes: vec![] };
        assert_eq!(reply.to_bytes(FrontendReq::GET_CONFIG).len(), HEADER_LENGTH);
    }
}
