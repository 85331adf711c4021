//! The host's files, below a root that tests can choose, and what they say of this process.

use std::cell::OnceCell;
use std::fs;
use std::path::PathBuf;
use std::str::FromStr;

/// Capabilities by their numbers in `linux/capability.h`.
pub(super) mod capability {
    pub(crate) const NET_ADMIN: u32 = 12;
    pub(crate) const NET_RAW: u32 = 13;
    pub(crate) const IPC_LOCK: u32 = 14;
    pub(crate) const SYS_ADMIN: u32 = 21;
    pub(crate) const BPF: u32 = 39;
}

/// The files of a host.
#[derive(Debug)]
pub(super) struct Host {
    root: PathBuf,
    /// Looked for once: there may be many processes, and many ports to ask for.
    infos: OnceCell<Vec<(String, String)>>,
}

impl Host {
    /// This host's.
    pub(super) fn real() -> Self {
        Host { root: "/".into(), infos: OnceCell::new() }
    }

    /// Those below a directory.
    #[cfg(test)]
    pub(super) fn at(root: impl Into<PathBuf>) -> Self {
        Host { root: root.into(), infos: OnceCell::new() }
    }

    fn place(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// What a file holds, without blanks around it; bytes that are no text are replaced.
    pub(super) fn read(&self, path: &str) -> Option<String> {
        let bytes = fs::read(self.place(path)).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// The number that a file holds.
    pub(super) fn number<T: FromStr>(&self, path: &str) -> Option<T> {
        self.read(path)?.parse().ok()
    }

    /// The names in a directory, in order; none if there is no such directory.
    pub(super) fn list(&self, path: &str) -> Vec<String> {
        let entries = fs::read_dir(self.place(path)).into_iter().flatten().flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort_by_key(|name| (name.len(), name.clone()));
        names
    }

    /// Whether there is such a file or directory.
    pub(super) fn exists(&self, path: &str) -> bool {
        self.place(path).exists()
    }

    /// Processes, with their programs' names, that have a descriptor of which the kernel says what
    /// `is_it` looks for (proc_pid_fdinfo(5)), if that is of a TAP or a BPF program.
    pub(super) fn holders(&self, is_it: impl Fn(&str) -> bool) -> Vec<(String, String)> {
        let infos = self.infos.get_or_init(|| self.descriptors());
        let mut holders: Vec<&String> =
            infos.iter().filter(|(_, info)| is_it(info)).map(|(process, _)| process).collect();
        holders.dedup();
        let program =
            |process: &String| self.read(&format!("/proc/{process}/comm")).unwrap_or_default();
        holders.into_iter().map(|process| (process.clone(), program(process))).collect()
    }

    /// Processes, and what the kernel says of their descriptors, as far as `holders` asks for it.
    fn descriptors(&self) -> Vec<(String, String)> {
        let mut infos = Vec::new();
        for process in self.processes() {
            let directory = format!("/proc/{process}/fdinfo");
            for number in self.list(&directory) {
                let info = self.read(&format!("{directory}/{number}")).unwrap_or_default();
                if info.contains("iff:\t") || info.contains("prog_id:\t") {
                    infos.push((process.clone(), info));
                }
            }
        }
        infos
    }

    /// The processes that there are.
    pub(super) fn processes(&self) -> Vec<String> {
        let is_number = |name: &String| name.bytes().all(|byte| byte.is_ascii_digit());
        self.list("/proc").into_iter().filter(is_number).collect()
    }

    /// A soft limit of this process by its name in `/proc/self/limits`; `u64::MAX`: none.
    pub(super) fn limit(&self, name: &str) -> Option<u64> {
        let limits = self.read("/proc/self/limits")?;
        let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
        match line.split_whitespace().next()? {
            "unlimited" => Some(u64::MAX),
            number => number.parse().ok(),
        }
    }

    /// What a symbolic link holds.
    pub(super) fn link(&self, path: &str) -> Option<PathBuf> {
        fs::read_link(self.place(path)).ok()
    }

    /// Where a symbolic link leads, as a path below the root.
    pub(super) fn resolve(&self, path: &str) -> Option<String> {
        let real = fs::canonicalize(self.place(path)).ok()?;
        let root = fs::canonicalize(&self.root).ok()?;
        Some(format!("/{}", real.strip_prefix(root).ok()?.display()))
    }
}

/// What a process may do. This one's is taken for what the daemon may do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Myself {
    pub(super) user: u32,
    pub(super) groups: Vec<u32>,
    pub(super) umask: u32,
    pub(super) capabilities: u64,
}

impl Myself {
    /// What this process may do.
    pub(super) fn of(host: &Host) -> Self {
        Self::of_process(host, "self")
    }

    /// As `/proc/PID/status` tells (proc_pid_status(5)).
    pub(super) fn of_process(host: &Host, process: &str) -> Self {
        let status = host.read(&format!("/proc/{process}/status")).unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_default().trim().to_owned()
        };
        // Real, effective, saved and file system's.
        let second = |text: String| text.split_whitespace().nth(1).and_then(|id| id.parse().ok());
        let mut groups: Vec<u32> =
            field("Groups").split_whitespace().filter_map(|group| group.parse().ok()).collect();
        groups.extend(second(field("Gid")));
        Myself {
            user: second(field("Uid")).unwrap_or(u32::MAX),
            groups,
            umask: u32::from_str_radix(&field("Umask"), 8).unwrap_or(0o022),
            capabilities: u64::from_str_radix(&field("CapEff"), 16).unwrap_or(0),
        }
    }

    /// Whether it has a capability.
    pub(super) fn can(&self, capability: u32) -> bool {
        self.capabilities >> capability & 1 != 0
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    /// A host of these files, for as long as the directory lives.
    pub(crate) fn fake(files: &[(&str, &str)]) -> (TempDir, Host) {
        let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
        for (path, contents) in files {
            let path = directory.as_path().join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, contents).unwrap();
        }
        let host = Host::at(directory.as_path());
        (directory, host)
    }

    #[test]
    fn a_process_is_what_its_status_says() {
        let status = "Name:\tx\nUmask:\t0027\nUid:\t0\t1000\t0\t0\nGid:\t5\t6\t5\t5\n\
                      Groups:\t7 8 \nCapEff:\t0000000000003000\n";
        let (_directory, host) = fake(&[("/proc/self/status", status)]);
        let myself = Myself::of(&host);
        assert_eq!((myself.user, myself.umask), (1000, 0o27));
        assert_eq!(myself.groups, [7, 8, 6]);
        assert!(myself.can(capability::NET_ADMIN) && myself.can(capability::NET_RAW));
        assert!(!myself.can(capability::IPC_LOCK) && !myself.can(capability::BPF));
    }

    #[test]
    fn a_host_without_files_has_nothing_to_say() {
        let (_directory, host) = fake(&[]);
        assert_eq!(host.read("/proc/x"), None);
        assert!(host.list("/sys").is_empty() && !host.exists("/sys"));
        assert!(!Myself::of(&host).can(capability::NET_ADMIN));
    }
}
