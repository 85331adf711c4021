//! Messages as a frontend would send them: what one daemon was told, for the next to be told again.

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

/// Time for which the kernel may refuse a descriptor because too many are in flight.
const IN_FLIGHT_TIMEOUT: Duration = Duration::from_millis(50);

/// A message, and the descriptors that go with it: those that the port keeps, so that a replay takes no
/// others.
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

    /// One with a number of 64 bits.
    pub fn number(code: FrontendReq, value: u64) -> Self {
        Self::new(code, &value.to_ne_bytes(), Vec::new())
    }

    /// One about a ring.
    pub fn ring(code: FrontendReq, index: u32, value: u32) -> Self {
        Self::new(code, &[index, value].map(u32::to_ne_bytes).concat(), Vec::new())
    }

    /// SET_VRING_ADDR.
    pub fn addresses(index: u32, descriptors: u64, used: u64, avail: u64) -> Self {
        let flags = [index, 0].map(u32::to_ne_bytes).concat();
        let places = [descriptors, used, avail, 0].map(u64::to_ne_bytes).concat();
        Self::new(FrontendReq::SET_VRING_ADDR, &[flags, places].concat(), Vec::new())
    }

    /// SET_VRING_KICK, CALL or ERR, with a descriptor or without.
    pub fn event(code: FrontendReq, index: u32, file: Option<Arc<File>>) -> Self {
        let none = if file.is_some() { 0 } else { NO_DESCRIPTOR };
        let value = u64::from(index) | none;
        Self::new(code, &value.to_ne_bytes(), file.into_iter().collect())
    }

    /// SET_MEM_TABLE, for no more regions than one message takes.
    pub fn memory(regions: Vec<(RegionRequest, Arc<File>)>) -> Self {
        let mut payload = [regions.len() as u32, 0].map(u32::to_ne_bytes).concat();
        regions.iter().for_each(|(region, _)| payload.extend(region_bytes(region)));
        let files = regions.into_iter().map(|(_, file)| file).collect();
        Self::new(FrontendReq::SET_MEM_TABLE, &payload, files)
    }

    /// ADD_MEM_REG.
    pub fn region(region: &RegionRequest, file: Arc<File>) -> Self {
        let payload = [vec![0; 8], region_bytes(region)].concat();
        Self::new(FrontendReq::ADD_MEM_REG, &payload, vec![file])
    }

    /// SET_LOG_BASE.
    pub fn log(size: u64, offset: u64, file: Arc<File>) -> Self {
        let payload = [size, offset].map(u64::to_ne_bytes).concat();
        Self::new(FrontendReq::SET_LOG_BASE, &payload, vec![file])
    }

    /// SET_INFLIGHT_FD.
    pub fn inflight(length: u64, offset: u64, rings: u16, size: u16, file: Arc<File>) -> Self {
        let place = [length, offset].map(u64::to_ne_bytes).concat();
        let numbers = [rings, size].map(u16::to_ne_bytes).concat();
        Self::new(FrontendReq::SET_INFLIGHT_FD, &[place, numbers].concat(), vec![file])
    }

    /// SET_BACKEND_REQ_FD.
    pub fn backend_requests(file: Arc<File>) -> Self {
        Self::new(FrontendReq::SET_BACKEND_REQ_FD, &[], vec![file])
    }

    /// Sends the message whole, or not at all.
    ///
    /// # Errors
    /// `WouldBlock` if the other side has to read first; otherwise those of `sendmsg`.
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

/// Whether the kernel passes a descriptor to another process. It refuses a unix socket that has sockets
/// in flight that have sockets in flight, and so on: whoever holds the other end can bring that about.
///
/// # Errors
/// No socket pair can be made.
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

/// `VhostUserMemoryRegion`.
fn region_bytes(region: &RegionRequest) -> Vec<u8> {
    let RegionRequest { guest_address, size, frontend_address, file_offset } = *region;
    [guest_address, size, frontend_address, file_offset].map(u64::to_ne_bytes).concat()
}
