//! vhost-user messages: framing, and one enum value per request.
//!
//! Knows no device. Invariant: whatever the frontend sends, and however slowly, nothing here
//! waits for it; a message is handed out only when it is whole, has the length its request must
//! have, and came with the descriptors that belong to it. Structures and numbers are those of
//! `vhost::vhost_user::message`.

mod connection;
mod message;
mod replay;
mod reply;
mod request;

use std::fmt;

use vhost::vhost_user::message::{FrontendReq, MAX_MSG_SIZE};

pub use connection::{Connection, Event};
pub use message::Message;
pub use replay::{ReplayMessage, can_be_passed};
pub use reply::Reply;
pub use request::{Request, VringAddresses};

/// Length in bytes of a message's header: request, flags, payload size.
pub const HEADER_LENGTH: usize = 12;
/// Longest payload in bytes that any request may have.
pub const MAX_PAYLOAD: usize = MAX_MSG_SIZE;
/// Regions of one SET_MEM_TABLE (the specification's VHOST_USER_MAX_RAM_SLOTS of old).
pub const MAX_TABLE_REGIONS: usize = 8;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 0x3;
const REPLY: u32 = 0x4;
const NEED_REPLY: u32 = 0x8;
const RESERVED: u32 = !0xf;

/// Bit of a SET_VRING_KICK, CALL or ERR payload that says that no descriptor comes with it.
const NO_DESCRIPTOR: u64 = 0x100;

/// Why the connection has to be closed: what came is no vhost-user.
#[derive(Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// The header's version or reserved flags are wrong, or it claims to be a reply.
    Flags(u32),
    /// There is no such request.
    UnknownRequest(u32),
    /// The payload is longer than any may be.
    TooLong(u32),
    /// The payload's size is not the request's.
    Size {
        /// Name of the request.
        request: FrontendReq,
        /// Payload size in bytes.
        size: usize,
    },
    /// More or fewer descriptors came than belong to the request.
    Descriptors {
        /// Name of the request.
        request: FrontendReq,
        /// How many came.
        count: usize,
    },
    /// A field of the payload has a value that the specification does not have.
    Value {
        /// Name of the request.
        request: FrontendReq,
        /// What is wrong.
        what: &'static str,
    },
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProtocolError::Flags(flags) => write!(f, "header flags {flags:#x} are not allowed"),
            ProtocolError::UnknownRequest(code) => write!(f, "there is no request {code}"),
            ProtocolError::TooLong(size) => write!(f, "a payload of {size} bytes is too long"),
            ProtocolError::Size { request, size } => {
                write!(f, "{request:?} with a payload of {size} bytes")
            }
            ProtocolError::Descriptors { request, count } => {
                write!(f, "{request:?} with {count} descriptors")
            }
            ProtocolError::Value { request, what } => write!(f, "{request:?}: {what}"),
        }
    }
}

impl std::error::Error for ProtocolError {}
