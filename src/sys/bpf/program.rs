//! XDP programs: loading, trying and finding them.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use super::{MAX_NAME, bpf, bpf_open, command, information, name_bytes, name_from, open_by_id};

const PROG_TYPE_XDP: u32 = 6;

/// A verified program.
#[derive(Debug)]
pub struct Program(OwnedFd);

/// What a program said, and how many nanoseconds it took on the average.
struct TestRun {
    verdict: u32,
    duration: u32,
}

/// What the kernel knows of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramInfo {
    /// Its name.
    pub name: String,
    /// Ids of the first maps that it uses.
    pub maps: Vec<u32>,
}

impl Program {
    /// Loads an XDP program of `instructions` (`struct bpf_insn`). `name` has 15 bytes at the most.
    ///
    /// # Errors
    /// EPERM without CAP_BPF and CAP_NET_ADMIN; EINVAL or EACCES if the verifier refuses it, with
    /// the end of what it said.
    pub fn load(name: &str, instructions: &[u64]) -> io::Result<Self> {
        Self::load_for(name, instructions, 0)
    }

    /// Loads an XDP program that runs on this device only, in its driver: it may ask the driver what
    /// it knows of a frame (`BPF_F_XDP_DEV_BOUND_ONLY`). For any device if that is 0.
    ///
    /// # Errors
    /// As [`load`](Self::load); EINVAL before Linux 6.3, and before 6.16 if it uses other programs.
    pub fn load_for(name: &str, instructions: &[u64], device: u32) -> io::Result<Self> {
        const DEVICE_BOUND: u32 = 1 << 6;
        #[repr(C)]
        struct Attributes {
            kind: u32,
            count: u32,
            instructions: u64,
            license: u64,
            log_level: u32,
            log_size: u32,
            log: u64,
            kernel_version: u32,
            flags: u32,
            name: [u8; MAX_NAME + 1],
            device: u32,
            attach: u32,
        }
        let load = |log: &mut [u8]| {
            let mut attributes = Attributes {
                kind: PROG_TYPE_XDP,
                count: instructions.len() as u32,
                instructions: instructions.as_ptr() as u64,
                license: c"Dual BSD/GPL".as_ptr() as u64,
                log_level: u32::from(!log.is_empty()),
                log_size: log.len() as u32,
                log: if log.is_empty() { 0 } else { log.as_mut_ptr() as u64 },
                kernel_version: 0,
                flags: if device == 0 { 0 } else { DEVICE_BOUND },
                name: name_bytes(name),
                device,
                attach: 0,
            };
            // SAFETY: instructions, licence and log live through the call, with the lengths given.
            unsafe { bpf_open(command::PROG_LOAD, &mut attributes) }
        };
        load(&mut []).map(Program).map_err(|error| {
            if !matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EACCES)) {
                return error;
            }
            let mut log = vec![0; 1 << 16];
            let _ = load(&mut log);
            let text = name_from(&log);
            let end: Vec<&str> = text.trim().lines().rev().take(2).collect();
            io::Error::new(error.kind(), format!("{error}: {}", end.join("; ")))
        })
    }

    /// Its descriptor, by which maps and links name it.
    pub(super) fn descriptor(&self) -> &OwnedFd {
        &self.0
    }

    /// Opens a program that somebody has loaded.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN, ENOENT if there is none.
    pub fn by_id(id: u32) -> io::Result<Self> {
        open_by_id(command::PROG_GET_FD_BY_ID, id).map(Program)
    }

    /// Runs it on `count` copies of a frame, as if they had arrived on a device's first queue, and
    /// does with them what it says: a program that says XDP_TX sends them through the device, more
    /// than a million a second (Linux 5.18). The benchmark's source of frames.
    ///
    /// # Errors
    /// EINVAL without such a device.
    pub fn run_live(&self, device: u32, frame: &[u8], count: u32) -> io::Result<()> {
        const LIVE_FRAMES: u32 = 1 << 1;
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index,
        // egress_ifindex.
        let context = [0, frame.len() as u32, 0, device, 0, 0];
        self.test_run(frame, Some(&context), count, LIVE_FRAMES).map(drop)
    }

    /// Runs it on a frame, with which nothing happens; returns what it says.
    ///
    /// # Errors
    /// EINVAL if the frame has less than 14 bytes, or more than a page.
    pub fn verdict(&self, frame: &[u8]) -> io::Result<u32> {
        self.test_run(frame, None, 1, 0).map(|run| run.verdict)
    }

    /// How long it takes for a frame, on the average of so many times.
    ///
    /// # Errors
    /// As [`verdict`](Self::verdict).
    pub fn time(&self, frame: &[u8], times: u32) -> io::Result<Duration> {
        let run = self.test_run(frame, None, times, 0)?;
        Ok(Duration::from_nanos(run.duration.into()))
    }

    fn test_run(
        &self,
        frame: &[u8],
        context: Option<&[u32; 6]>,
        repeat: u32,
        flags: u32,
    ) -> io::Result<TestRun> {
        #[repr(C)]
        #[derive(Default)]
        struct Attributes {
            program: RawFd,
            verdict: u32,
            frame_length: u32,
            output_length: u32,
            frame: u64,
            output: u64,
            repeat: u32,
            duration: u32,
            context_length: u32,
            context_output_length: u32,
            context: u64,
            context_output: u64,
            flags: u32,
            cpu: u32,
            batch: u32,
            // The kernel wants zeros behind what it knows.
            rest: u32,
        }
        let mut attributes = Attributes {
            program: self.0.as_raw_fd(),
            frame_length: frame.len() as u32,
            frame: frame.as_ptr() as u64,
            repeat,
            context_length: context.map_or(0, mem::size_of_val) as u32,
            context: context.map_or(0, |context| context.as_ptr() as u64),
            flags,
            ..Attributes::default()
        };
        // SAFETY: frame and context live through the call, with the lengths given.
        unsafe { bpf(command::PROG_TEST_RUN, &mut attributes)? };
        let Attributes { verdict, duration, .. } = attributes;
        Ok(TestRun { verdict, duration })
    }

    /// What the kernel knows of it.
    pub fn info(&self) -> io::Result<ProgramInfo> {
        #[repr(C)]
        #[derive(Default)]
        struct Info {
            kind: u32,
            id: u32,
            tag: [u8; 8],
            jited_length: u32,
            translated_length: u32,
            jited: u64,
            translated: u64,
            load_time: u64,
            user: u32,
            map_count: u32,
            maps: u64,
            name: [u8; MAX_NAME + 1],
        }
        let mut maps = [0u32; 8];
        let mut info = Info {
            map_count: maps.len() as u32,
            maps: maps.as_mut_ptr() as u64,
            ..Info::default()
        };
        // SAFETY: all fields are integers; `maps` has room for as many ids as it says.
        unsafe { information(&self.0, &mut info)? };
        let count = (info.map_count as usize).min(maps.len());
        Ok(ProgramInfo { name: name_from(&info.name), maps: maps[..count].to_vec() })
    }
}
