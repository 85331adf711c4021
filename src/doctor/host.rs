//! The host's files, below a root directory that tests choose, and a process's credentials.

use std::cell::OnceCell;
use std::fs;
use std::path::PathBuf;
use std::str::FromStr;

/// Numbers of capabilities, from `linux/capability.h`.
pub(super) mod capability {
    pub(crate) const NET_ADMIN: u32 = 12;
    pub(crate) const NET_RAW: u32 = 13;
    pub(crate) const IPC_LOCK: u32 = 14;
    pub(crate) const SYS_ADMIN: u32 = 21;
    pub(crate) const BPF: u32 = 39;
}

/// Access to the files of a host.
#[derive(Debug)]
pub(super) struct Host {
    root: PathBuf,
    /// Processes, and their `fdinfo` texts of TAPs and BPF programs. Read once, because a host may have many
    /// processes and many ports.
    infos: OnceCell<Vec<(String, String)>>,
}

impl Host {
    /// Returns this host.
    pub(super) fn real() -> Self {
        Host { root: "/".into(), infos: OnceCell::new() }
    }

    /// Returns a host whose files are below the directory `root`.
    #[cfg(test)]
    pub(super) fn at(root: impl Into<PathBuf>) -> Self {
        Host { root: root.into(), infos: OnceCell::new() }
    }

    fn below_root(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Reads a file as text without surrounding white space. Replaces bytes that are not UTF-8.
    pub(super) fn read(&self, path: &str) -> Option<String> {
        let bytes = fs::read(self.below_root(path)).ok()?;
        Some(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// Reads a file that holds one number.
    pub(super) fn number<T: FromStr>(&self, path: &str) -> Option<T> {
        self.read(path)?.parse().ok()
    }

    /// Lists the names in a directory, the shortest first; none if the directory cannot be read.
    pub(super) fn list(&self, path: &str) -> Vec<String> {
        let entries = fs::read_dir(self.below_root(path)).into_iter().flatten().flatten();
        let mut names: Vec<_> =
            entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort_by_key(|name| (name.len(), name.clone()));
        names
    }

    /// Returns whether a file or directory exists.
    pub(super) fn exists(&self, path: &str) -> bool {
        self.below_root(path).exists()
    }

    /// Finds the processes that have a TAP or BPF program open whose `fdinfo` text (proc_pid_fdinfo(5)) meets
    /// `is_it`. Returns the process ids with the names of the programs.
    pub(super) fn holders(&self, is_it: impl Fn(&str) -> bool) -> Vec<(String, String)> {
        let infos = self.infos.get_or_init(|| self.descriptors());
        let mut holders: Vec<&String> =
            infos.iter().filter(|(_, info)| is_it(info)).map(|(process, _)| process).collect();
        holders.dedup();
        let program =
            |process: &String| self.read(&format!("/proc/{process}/comm")).unwrap_or_default();
        holders.into_iter().map(|process| (process.clone(), program(process))).collect()
    }

    /// Reads the `fdinfo` texts of all TAPs and BPF programs that processes have open.
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

    /// Returns the ids of all visible processes.
    pub(super) fn processes(&self) -> Vec<String> {
        let is_number = |name: &String| name.bytes().all(|byte| byte.is_ascii_digit());
        self.list("/proc").into_iter().filter(is_number).collect()
    }

    /// Reads a soft limit of this process, by its name in `/proc/self/limits`; `u64::MAX` is "unlimited".
    pub(super) fn limit(&self, name: &str) -> Option<u64> {
        let limits = self.read("/proc/self/limits")?;
        let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
        match line.split_whitespace().next()? {
            "unlimited" => Some(u64::MAX),
            number => number.parse().ok(),
        }
    }

    /// Reads the content of a symbolic link.
    pub(super) fn link(&self, path: &str) -> Option<PathBuf> {
        fs::read_link(self.below_root(path)).ok()
    }

    /// Follows symbolic links; returns the target as a path below the root.
    pub(super) fn resolve(&self, path: &str) -> Option<String> {
        let real = fs::canonicalize(self.below_root(path)).ok()?;
        let root = fs::canonicalize(&self.root).ok()?;
        Some(format!("/{}", real.strip_prefix(root).ok()?.display()))
    }
}

/// Credentials of a process (credentials(7)). The doctor assumes that the daemon has the doctor's own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Credentials {
    /// Effective user id.
    pub(super) user: u32,
    /// Supplementary groups, then the effective group id.
    pub(super) groups: Vec<u32>,
    pub(super) umask: u32,
    /// Effective capabilities, as bits.
    pub(super) capabilities: u64,
}

impl Credentials {
    /// Reads the credentials of this process.
    pub(super) fn of(host: &Host) -> Self {
        Self::of_process(host, "self")
    }

    /// Reads the credentials of a process from `/proc/PID/status` (proc_pid_status(5)).
    pub(super) fn of_process(host: &Host, process: &str) -> Self {
        let status = host.read(&format!("/proc/{process}/status")).unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.unwrap_or_default().trim().to_owned()
        };
        // The ids are: real, effective, saved, file system.
        let effective =
            |text: String| text.split_whitespace().nth(1).and_then(|id| id.parse().ok());
        let mut groups: Vec<u32> =
            field("Groups").split_whitespace().filter_map(|group| group.parse().ok()).collect();
        groups.extend(effective(field("Gid")));
        Credentials {
            user: effective(field("Uid")).unwrap_or(u32::MAX),
            groups,
            umask: u32::from_str_radix(&field("Umask"), 8).unwrap_or(0o022),
            capabilities: u64::from_str_radix(&field("CapEff"), 16).unwrap_or(0),
        }
    }

    /// Returns whether the process has a capability.
    pub(super) fn has(&self, capability: u32) -> bool {
        self.capabilities >> capability & 1 != 0
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use vmm_sys_util::tempdir::TempDir;

    /// Creates a host with these files, which exist until the directory is dropped.
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
    fn credentials_are_read_from_proc_status() {
        let status = "Name:\tx\nUmask:\t0027\nUid:\t0\t1000\t0\t0\nGid:\t5\t6\t5\t5\n\
                      Groups:\t7 8 \nCapEff:\t0000000000003000\n";
        let (_directory, host) = fake(&[("/proc/self/status", status)]);
        let credentials = Credentials::of(&host);
        assert_eq!((credentials.user, credentials.umask), (1000, 0o27));
        assert_eq!(credentials.groups, [7, 8, 6]);
        assert!(credentials.has(capability::NET_ADMIN) && credentials.has(capability::NET_RAW));
        assert!(!credentials.has(capability::IPC_LOCK) && !credentials.has(capability::BPF));
    }

    #[test]
    fn missing_files_give_defaults() {
        let (_directory, host) = fake(&[]);
        assert_eq!(host.read("/proc/x"), None);
        assert!(host.list("/sys").is_empty() && !host.exists("/sys"));
        assert!(!Credentials::of(&host).has(capability::NET_ADMIN));
    }
}
