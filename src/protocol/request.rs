//! Requests: one enum value for each.

use std::fs::File;

use vhost::vhost_user::message::FrontendReq;

use crate::guest::RegionRequest;

/// Where a ring lies, in the frontend's addresses (SET_VRING_ADDR).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringAddresses {
    /// Bit 0: log writes to the ring.
    pub flags: u32,
    /// Descriptor table.
    pub descriptors: u64,
    /// Used ring.
    pub used: u64,
    /// Avail ring.
    pub avail: u64,
}

/// A request of the frontend's, by the specification's names.
#[derive(Debug)]
#[allow(missing_docs)]
pub enum Request {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<(RegionRequest, File)>),
    SetVringNum {
        index: u32,
        size: u32,
    },
    SetVringAddr {
        index: u32,
        addresses: VringAddresses,
    },
    SetVringBase {
        index: u32,
        base: u32,
    },
    GetVringBase {
        index: u32,
    },
    SetVringKick {
        index: u32,
        file: Option<File>,
    },
    SetVringCall {
        index: u32,
        file: Option<File>,
    },
    SetVringErr {
        index: u32,
        file: Option<File>,
    },
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable {
        index: u32,
        enable: bool,
    },
    NetSetMtu(u64),
    SetBackendReqFd(File),
    GetConfig {
        offset: u32,
        size: u32,
        flags: u32,
    },
    SetConfig,
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(RegionRequest, File),
    RemMemReg(RegionRequest),
    SetStatus(u64),
    GetStatus,
    SetLogBase {
        size: u64,
        offset: u64,
        file: File,
    },
    GetInflightFd {
        rings: u16,
        size: u16,
    },
    SetInflightFd {
        length: u64,
        offset: u64,
        rings: u16,
        size: u16,
        file: File,
    },
    SetDeviceStateFd {
        /// The state comes, or else it is to be sent.
        load: bool,
        file: File,
    },
    CheckDeviceState,
    /// The address of a card that has moved here.
    SendRarp([u8; 6]),
    /// A request that exists but belongs to a protocol feature that is not offered.
    Unsupported(FrontendReq),
}
