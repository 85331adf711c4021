//! vhost-user messages: their framing, and one enum value per request.
//!
//! This module knows no device. Invariants: no function here waits for the frontend. [`Connection::receive`]
//! returns a message only when the message is whole, and has the payload size and the descriptors of its request.
//! Structures and numbers are those of `vhost::vhost_user::message`.

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

/// Length of a message's header in bytes: request, flags, payload size.
pub const HEADER_LENGTH: usize = 12;
/// Longest payload of a request in bytes.
pub const MAX_PAYLOAD: usize = MAX_MSG_SIZE;
/// Most regions of one SET_MEM_TABLE (the specification's former VHOST_USER_MAX_RAM_SLOTS).
pub const MAX_TABLE_REGIONS: usize = 8;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 0x3;
const REPLY: u32 = 0x4;
const NEED_REPLY: u32 = 0x8;
const RESERVED: u32 = !0xf;

/// Bit of the payload of SET_VRING_KICK, CALL or ERR: the message has no descriptor.
const NO_DESCRIPTOR: u64 = 0x100;

/// Violation of the vhost-user framing, after which the connection must be closed.
#[derive(Debug, PartialEq, Eq)]
pub enum ProtocolError {
    /// The header has another version, reserved flags, or the flag of a reply.
    Flags(u32),
    /// The specification has no request of this number.
    UnknownRequest(u32),
    /// The payload size in bytes exceeds [`MAX_PAYLOAD`].
    TooLong(u32),
    /// The payload size is not the request's.
    Size {
        /// Name of the request.
        request: FrontendReq,
        /// Payload size in bytes.
        size: usize,
    },
    /// The message has more or fewer descriptors than its request takes.
    Descriptors {
        /// Name of the request.
        request: FrontendReq,
        /// Number of descriptors of the message.
        count: usize,
    },
    /// The specification does not allow the value of a payload field.
    Value {
        /// Name of the request.
        request: FrontendReq,
        /// The field's mistake.
        what: &'static str,
    },
}

impl fmt::Display for ProtocolError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProtocolError::Flags(flags) => write!(f, "header flags {flags:#x} are not allowed"),
            ProtocolError::UnknownRequest(code) => write!(f, "unknown request {code}"),
            ProtocolError::TooLong(size) => write!(f, "a payload of {size} bytes is too long"),
            ProtocolError::Size { request, size } => {
                write!(f, "{request:?} has a payload of wrong size, {size} bytes")
            }
            ProtocolError::Descriptors { request, count } => {
                write!(f, "{request:?} has a wrong number of descriptors, {count}")
            }
            ProtocolError::Value { request, what } => write!(f, "{request:?}: {what}"),
        }
    }
}

impl std::error::Error for ProtocolError {}
