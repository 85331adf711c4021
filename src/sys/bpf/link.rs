//! Links: attachments of XDP programs to network devices.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use super::{Program, bpf, bpf_open, command, information, open_by_id};

const ATTACH_XDP: u32 = 37;
const LINK_TYPE_XDP: u32 = 6;

/// How an XDP program is run (`XDP_FLAGS_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// By the device's driver, before the kernel has made a packet of the frame.
    Native,
    /// By the kernel, for devices whose driver can't.
    Generic,
}

/// A program's attachment to a device, which ends with the last descriptor of it.
#[derive(Debug)]
pub struct Link(OwnedFd);

/// What the kernel knows of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkInfo {
    /// Id of the program.
    pub program: u32,
    /// Index of the device, in the namespace where it is; 0 if the device has gone.
    pub device: u32,
}

impl Link {
    /// Attaches a program to a network device.
    ///
    /// # Errors
    /// EBUSY or EEXIST if the device has a program, EOPNOTSUPP if its driver can't run one,
    /// EINVAL if it can't with the MTU, or the number of queues, that it has.
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

    /// The link that attaches program `program` to an XDP hook, whoever has it.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN, ENOENT if the program was not attached by a link.
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
                // Gone meanwhile.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
                other => Link(other?),
            };
            if link.info()?.is_some_and(|info| info.program == program) {
                return Ok(link);
            }
        }
    }

    /// What the kernel knows of it, if it is one of an XDP program.
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
