//! Replies, and their bytes.

use std::fs::File;

use vhost::vhost_user::message::FrontendReq;

use super::{HEADER_LENGTH, REPLY, VERSION};

/// A reply's payload.
#[derive(Debug)]
pub enum Reply {
    /// One 64-bit number.
    U64(u64),
    /// `VhostUserLog` of a dirty log that was taken: cloud-hypervisor waits for all of it, QEMU takes a
    /// reply of any length.
    Log {
        /// The log's length in bytes.
        size: u64,
        /// Where it starts in its file.
        offset: u64,
    },
    /// Index and number of a ring.
    VringState {
        /// The ring.
        index: u32,
        /// The number asked for.
        num: u32,
    },
    /// Bytes of the configuration space; none says that they could not be read.
    Config {
        /// First byte.
        offset: u32,
        /// The request's flags.
        flags: u32,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// An inflight buffer.
    Inflight {
        /// Its length in bytes.
        length: u64,
        /// Rings that it is for.
        rings: u16,
        /// Descriptors of each at the most.
        size: u16,
        /// Its memory.
        file: File,
    },
}

impl Reply {
    /// The descriptor that goes with it, if one does.
    pub fn into_file(self) -> Option<File> {
        match self {
            Reply::Inflight { file, .. } => Some(file),
            Reply::U64(_) | Reply::Log { .. } | Reply::VringState { .. } | Reply::Config { .. } => {
                None
            }
        }
    }

    /// The reply's bytes, header first.
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
                // The structure's padding, without which QEMU and the vhost crate refuse it.
                payload.extend([0; 4]);
            }
            // The specification's way to say that the read failed.
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
    fn a_failed_read_of_the_configuration_space_has_no_payload() {
        let reply = Reply::Config { offset: 0, flags: 0, bytes: vec![] };
        assert_eq!(reply.to_bytes(FrontendReq::GET_CONFIG).len(), HEADER_LENGTH);
    }
}
