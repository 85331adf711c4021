//! Links: attachments of XDP programs to network devices.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::{Program, bpf, bpf_open, command, information, open_by_id};

const ATTACH_XDP: u32 = 37;
const LINK_TYPE_XDP: u32 = 6;

/// Hook at which an XDP program runs (`XDP_FLAGS_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// The device's driver, before the kernel allocates a socket buffer for the frame.
    Native,
    /// The kernel's generic code, for every device.
    Generic,
}

/// A program's attachment to a device, which ends when its last descriptor is closed.
#[derive(Debug)]
pub struct Link(OwnedFd);

/// Program and device of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkInfo {
    /// Id of the program.
    pub program: u32,
    /// Index of the device in its own namespace; 0 if the device is gone.
    pub device: u32,
}

impl Link {
    /// Attaches a program to a network device.
    ///
    /// # Errors
    /// EBUSY or EEXIST if the device has a program; EOPNOTSUPP if its driver does not support XDP; EINVAL if
    /// the driver does not support XDP with the device's MTU or number of queues.
    pub fn attach(program: &Program, device: u32, hook: Hook) -> io::Result<Self> {
        #[repr(C)]
        struct Attributes {
            program: RawFd,
            device: u32,
            attach: u32,
            flags: u32,
        }
        let flags = match hook {
            Hook::Generic => 1 << 1,
            Hook::Native => 1 << 2,
        };
        let mut attributes = Attributes {
            program: program.descriptor().as_raw_fd(),
            device,
            attach: ATTACH_XDP,
            flags,
        };
        // SAFETY: LINK_CREATE reads numbers only.
        unsafe { bpf_open(command::LINK_CREATE, &mut attributes) }.map(Link)
    }

    /// Opens the link that attaches the program with id `program` to an XDP hook, of any process.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN; ENOENT if no link attaches the program.
    pub fn of_program(program: u32) -> io::Result<Self> {
        #[repr(C)]
        struct Attributes {
            start: u32,
            next: u32,
            open_flags: u32,
        }
        let mut attributes = Attributes { start: 0, next: 0, open_flags: 0 };
        loop {
            // SAFETY: LINK_GET_NEXT_ID reads and writes numbers only.
            unsafe { bpf(command::LINK_GET_NEXT_ID, &mut attributes)? };
            attributes.start = attributes.next;
            let link = match open_by_id(command::LINK_GET_FD_BY_ID, attributes.next) {
                // The link was closed in between.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
                other => Link(other?),
            };
            if link.info()?.is_some_and(|info| info.program == program) {
                return Ok(link);
            }
        }
    }

    /// Reads the link's program and device. Returns `None` if the link is not one of an XDP program.
    pub fn info(&self) -> io::Result<Option<LinkInfo>> {
        #[repr(C)]
        #[derive(Default)]
        struct Info {
            kind: u32,
            id: u32,
            program: u32,
            _align: u32,
            device: u32,
            _rest: u32,
        }
        let mut info = Info::default();
        // SAFETY: all fields are integers, and none of them is a pointer for this kind of link.
        unsafe { information(&self.0, &mut info)? };
        let found = LinkInfo { program: info.program, device: info.device };
        Ok((info.kind == LINK_TYPE_XDP).then_some(found))
    }
}
