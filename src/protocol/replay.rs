//! Messages as a frontend sends them. On a take-over, the old daemon replays its frontend's state to the new one.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::FrontendReq;

use super::{NO_DESCRIPTOR, VERSION};
use crate::guest::RegionRequest;
use crate::sys::socket::send_message;

/// Time for which the kernel may refuse a descriptor because too many descriptors are in flight.
const IN_FLIGHT_TIMEOUT: Duration = Duration::from_millis(50);

/// A message to replay. Its descriptors are the port's own, so a replay opens none.
#[derive(Debug)]
pub struct ReplayMessage {
    bytes: Vec<u8>,
    files: Vec<Arc<File>>,
}

impl ReplayMessage {
    fn new(code: FrontendReq, payload: &[u8], files: Vec<Arc<File>>) -> Self {
        let header = [u32::from(code), VERSION, payload.len() as u32].map(u32::to_ne_bytes);
        ReplayMessage { bytes: [&header.concat(), payload].concat(), files }
    }

    /// Creates a message with one 64-bit number.
    pub fn number(code: FrontendReq, value: u64) -> Self {
        Self::new(code, &value.to_ne_bytes(), Vec::new())
    }

    /// Creates a message with a ring's index and a number.
    pub fn ring(code: FrontendReq, index: u32, value: u32) -> Self {
        Self::new(code, &[index, value].map(u32::to_ne_bytes).concat(), Vec::new())
    }

    /// Creates SET_VRING_ADDR, with addresses of the frontend's.
    pub fn addresses(index: u32, descriptors: u64, used: u64, avail: u64) -> Self {
        let flags = [index, 0].map(u32::to_ne_bytes).concat();
        let places = [descriptors, used, avail, 0].map(u64::to_ne_bytes).concat();
        Self::new(FrontendReq::SET_VRING_ADDR, &[flags, places].concat(), Vec::new())
    }

    /// Creates SET_VRING_KICK, CALL or ERR, with or without a descriptor.
    pub fn event(code: FrontendReq, index: u32, file: Option<Arc<File>>) -> Self {
        let none = if file.is_some() { 0 } else { NO_DESCRIPTOR };
        let value = u64::from(index) | none;
        Self::new(code, &value.to_ne_bytes(), file.into_iter().collect())
    }

    /// Creates SET_MEM_TABLE, for at most [`MAX_TABLE_REGIONS`](super::MAX_TABLE_REGIONS) regions.
    pub fn memory(regions: Vec<(RegionRequest, Arc<File>)>) -> Self {
        let mut payload = [regions.len() as u32, 0].map(u32::to_ne_bytes).concat();
        regions.iter().for_each(|(region, _)| payload.extend(region_bytes(region)));
        let files = regions.into_iter().map(|(_, file)| file).collect();
        Self::new(FrontendReq::SET_MEM_TABLE, &payload, files)
    }

    /// Creates ADD_MEM_REG.
    pub fn region(region: &RegionRequest, file: Arc<File>) -> Self {
        let payload = [vec![0; 8], region_bytes(region)].concat();
        Self::new(FrontendReq::ADD_MEM_REG, &payload, vec![file])
    }

    /// Creates SET_LOG_BASE; size and offset in bytes.
    pub fn log(size: u64, offset: u64, file: Arc<File>) -> Self {
        let payload = [size, offset].map(u64::to_ne_bytes).concat();
        Self::new(FrontendReq::SET_LOG_BASE, &payload, vec![file])
    }

    /// Creates SET_INFLIGHT_FD; length and offset in bytes, `size` descriptors for each ring.
    pub fn inflight(length: u64, offset: u64, rings: u16, size: u16, file: Arc<File>) -> Self {
        let place = [length, offset].map(u64::to_ne_bytes).concat();
        let numbers = [rings, size].map(u16::to_ne_bytes).concat();
        Self::new(FrontendReq::SET_INFLIGHT_FD, &[place, numbers].concat(), vec![file])
    }

    /// Creates SET_BACKEND_REQ_FD.
    pub fn backend_requests(file: Arc<File>) -> Self {
        Self::new(FrontendReq::SET_BACKEND_REQ_FD, &[], vec![file])
    }

    /// Sends the message with its descriptors.
    ///
    /// # Errors
    /// `WouldBlock` if the receiver has to read first; otherwise an error of `sendmsg`.
    pub fn send(&self, socket: &UnixStream) -> io::Result<()> {
        let files: Vec<BorrowedFd<'_>> = self.files.iter().map(|file| file.as_fd()).collect();
        match send_message(socket, &self.bytes, &files) {
            // Too many descriptors are in flight.
            Err(error) if error.raw_os_error() == Some(libc::ETOOMANYREFS) => {
                std::thread::sleep(Duration::from_millis(1));
                Err(io::ErrorKind::WouldBlock.into())
            }
            sent => sent,
        }
    }
}

/// Returns whether the kernel passes a descriptor to another process.
///
/// The kernel refuses a unix socket in whose queue sockets are in flight that have sockets in flight, and so on.
/// The process at the other end can cause this.
///
/// # Errors
/// The kernel makes no socket pair.
pub fn can_be_passed(file: &impl AsFd) -> io::Result<bool> {
    let (ours, _theirs) = UnixStream::pair()?;
    let end = Instant::now() + IN_FLIGHT_TIMEOUT;
    loop {
        match send_message(&ours, &[0], &[file.as_fd()]) {
            Ok(()) => return Ok(true),
            Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(1)),
            Err(_) => return Ok(false),
        }
    }
}

/// Returns the bytes of a `VhostUserMemoryRegion`.
fn region_bytes(region: &RegionRequest) -> Vec<u8> {
    let RegionRequest { guest_address, size, frontend_address, file_offset } = *region;
    [guest_address, size, frontend_address, file_offset].map(u64::to_ne_bytes).concat()
}
