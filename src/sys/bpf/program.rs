//! XDP programs: loading, test runs and information.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use super::{MAX_NAME, bpf, bpf_open, command, information, name_bytes, name_from, open_by_id};

const PROG_TYPE_XDP: u32 = 6;

/// A program that the kernel has verified and loaded.
#[derive(Debug)]
pub struct Program(OwnedFd);

/// Result of a test run.
struct TestRun {
    /// `enum xdp_action`.
    verdict: u32,
    /// Average time of a run in nanoseconds.
    duration: u32,
}

/// Name and maps of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramInfo {
    /// Name that the program was loaded with.
    pub name: String,
    /// Ids of the program's maps: at most the first 8.
    pub maps: Vec<u32>,
}

impl Program {
    /// Loads an XDP program of `instructions` (`struct bpf_insn`). `name` has at most 15 bytes.
    ///
    /// # Errors
    /// EPERM without CAP_BPF and CAP_NET_ADMIN; EINVAL or EACCES if the verifier refuses the program, with
    /// the last two lines of its log.
    pub fn load(name: &str, instructions: &[u64]) -> io::Result<Self> {
        Self::load_for(name, instructions, 0)
    }

    /// Loads an XDP program that runs only in the driver of the device with this index
    /// (`BPF_F_XDP_DEV_BOUND_ONLY`). The program may ask the driver for a frame's metadata. Index 0 stands
    /// for any device, without metadata.
    ///
    /// # Errors
    /// As for [`load`](Self::load); EINVAL before Linux 6.3, and before 6.16 if the program calls other
    /// programs.
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

    /// Returns the descriptor, by which maps and links refer to the program.
    pub(super) fn descriptor(&self) -> &OwnedFd {
        &self.0
    }

    /// Opens the program with this id, of any process.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN; ENOENT if there is no such program.
    pub fn by_id(id: u32) -> io::Result<Self> {
        open_by_id(command::PROG_GET_FD_BY_ID, id).map(Program)
    }

    /// Runs the program on `count` copies of a frame, as if they had arrived on a device's first queue, and
    /// carries out its verdict (Linux 5.18). With XDP_TX it sends more than a million frames per second, for
    /// the benchmarks.
    ///
    /// # Errors
    /// EINVAL if there is no such device.
    pub fn run_live(&self, device: u32, frame: &[u8], count: u32) -> io::Result<()> {
        const LIVE_FRAMES: u32 = 1 << 1;
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index,
        // egress_ifindex.
        let context = [0, frame.len() as u32, 0, device, 0, 0];
        self.test_run(frame, Some(&context), count, LIVE_FRAMES).map(drop)
    }

    /// Runs the program on a frame, and returns the verdict (`enum xdp_action`) without carrying it out.
    ///
    /// # Errors
    /// EINVAL if the frame has less than 14 bytes, or more than a page.
    pub fn verdict(&self, frame: &[u8]) -> io::Result<u32> {
        self.test_run(frame, None, 1, 0).map(|run| run.verdict)
    }

    /// Measures the program's average time for a frame, over `times` runs.
    ///
    /// # Errors
    /// As for [`verdict`](Self::verdict).
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
            // Padding: the kernel requires zeros behind the fields that it knows.
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

    /// Reads the program's name and maps.
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
        // SAFETY: all fields are integers; `maps` has room for `map_count` ids.
        unsafe { information(&self.0, &mut info)? };
        let count = (info.map_count as usize).min(maps.len());
        Ok(ProgramInfo { name: name_from(&info.name), maps: maps[..count].to_vec() })
    }
}
