//! Requests of the frontend, one enum value for each.

use std::fs::File;

use vhost::vhost_user::message::FrontendReq;

use crate::guest::RegionRequest;

/// Addresses of a ring's parts, in the frontend's address space (SET_VRING_ADDR).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringAddresses {
    /// Bit 0: log writes to the ring.
    pub flags: u32,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the used ring.
    pub used: u64,
    /// Address of the available ring.
    pub avail: u64,
}

/// A request of the frontend, by the specification's name.
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
        /// True if the frontend sends the state; false if the daemon does.
        load: bool,
        file: File,
    },
    CheckDeviceState,
    /// MAC address of a guest that has migrated to this host.
    SendRarp([u8; 6]),
    /// A request of a protocol feature that the daemon does not offer.
    Unsupported(FrontendReq),
}
