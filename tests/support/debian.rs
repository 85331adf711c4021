//! A clean Debian 12, in which the package must install, and a container of it, in which the package's units
//! must run under systemd.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmm_sys_util::tempdir::TempDir;

use super::eventually;
use super::network::silence_kernel;

const RELEASE: &str = "bookworm";
/// Packages beyond the essential ones.
const PACKAGES: &str = "systemd,passwd,iproute2";
/// Search path of programs in a Debian.
const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

/// Returns the path of a file or directory that stays between test runs.
fn kept(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Runs a command. Returns its standard output, or all of its output if it fails.
fn attempt(command: &mut Command) -> Result<String, String> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| error.to_string())?;
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    Err(format!("{command:?}: {}{}", text(&output.stdout), text(&output.stderr)))
}

/// Runs a command, which must succeed. Returns its standard output.
#[track_caller]
pub(crate) fn succeed(command: &mut Command) -> String {
    match attempt(command) {
        Ok(text) => text,
        Err(what) => panic!("{what}"),
    }
}

/// Returns the first child of a process. For the creator of a PID namespace, this is its first process.
pub(crate) fn first_child(process: &Child) -> Option<i32> {
    let id = process.id();
    let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).ok()?;
    children.split(' ').next()?.parse().ok()
}

/// Makes `name` unless it exists. `make` gets a temporary path, which is renamed after success.
fn once(name: &str, make: impl FnOnce(&Path) -> Result<(), String>) -> Result<PathBuf, String> {
    let path = kept(name);
    let lock = fs::File::create(kept(&format!("{name}.lock"))).unwrap();
    lock.lock().unwrap();
    if !path.exists() {
        let unfinished = kept(&format!("{name}.unfinished"));
        let _ = fs::remove_dir_all(&unfinished);
        make(&unfinished)?;
        fs::rename(&unfinished, &path).unwrap();
    }
    Ok(path)
}

/// Returns the mirror of this machine's packages.
///
/// # Errors
///
/// apt has no source of the release.
fn mirror() -> Result<String, String> {
    let mut which = Command::new("apt-get");
    let format = ["indextargets", "--format", "$(REPO_URI)"];
    let release = format!("Codename: {RELEASE}");
    let mirrors = attempt(which.args(format).args(["Created-By: Packages", &release]))?;
    mirrors.lines().next().map(str::to_owned).ok_or(format!("apt has no source of {RELEASE}"))
}

/// Makes a directory with a Debian release, from this machine's mirror.
///
/// # Errors
///
/// The packages cannot be fetched.
fn bootstrap(variant: &str, packages: &str, release: &str, at: &Path) -> Result<(), String> {
    let mut make = Command::new("mmdebstrap");
    make.arg("--quiet").arg(format!("--variant={variant}")).arg(format!("--include={packages}"));
    // A machine whose clock is ahead must accept the list of packages.
    make.arg("--aptopt=Acquire::Check-Valid-Until \"false\"");
    attempt(make.arg(release).arg(at).arg(mirror()?)).map(drop)
}

/// Unpacks the QEMU of Debian's unstable suite. Returns a program that runs it with that suite's libraries.
///
/// # Errors
///
/// The packages cannot be fetched.
pub(crate) fn newest_qemu() -> Result<PathBuf, String> {
    let tree = once("newest-qemu", |directory| {
        bootstrap("extract", "qemu-system-x86", "sid", directory)?;
        let run = "#!/bin/sh\n\
            tree=$(dirname \"$0\")/usr lib=$(dirname \"$0\")/usr/lib/x86_64-linux-gnu\n\
            exec \"$lib/ld-linux-x86-64.so.2\" --library-path \"$lib:$lib/pulseaudio\" \\\n\
            \"$tree/bin/qemu-system-x86_64\" -L \"$tree/share/qemu\" -L \"$tree/share/seabios\" \\\n\
            -L \"$tree/lib/ipxe/qemu\" \"$@\"\n";
        fs::write(directory.join("qemu"), run).unwrap();
        fs::set_permissions(directory.join("qemu"), fs::Permissions::from_mode(0o755)).unwrap();
        Ok(())
    })?;
    Ok(tree.join("qemu"))
}

/// Fetches and unpacks a Debian package once, without installing it. Returns its directory.
///
/// # Errors
///
/// The package cannot be fetched.
pub(crate) fn unpacked(package: &str) -> Result<PathBuf, String> {
    once(package, |directory| {
        fs::create_dir_all(directory).unwrap();
        let mut fetch = Command::new("apt-get");
        attempt(fetch.args(["-qq", "download", package]).current_dir(directory))?;
        let files = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
        for file in files.collect::<Vec<_>>() {
            succeed(Command::new("dpkg-deb").arg("-x").arg(&file).arg(directory));
            fs::remove_file(file).unwrap();
        }
        Ok(())
    })
}

/// Unpacks the libraries of another Debian release once. Returns their directory.
///
/// # Errors
///
/// The packages cannot be fetched.
pub(crate) fn libraries(release: &str, packages: &str) -> Result<PathBuf, String> {
    once(&format!("libraries-{release}"), |directory| {
        bootstrap("extract", packages, release, directory)?;
        // The package base-files has these links.
        for name in ["lib", "lib64"] {
            let _ = symlink(format!("usr/{name}"), directory.join(name));
        }
        Ok(())
    })
}

/// A directory with a Debian, deleted on drop.
#[derive(Debug)]
pub(crate) struct Debian(TempDir);

impl Debian {
    /// Copies a Debian with the essential packages and `PACKAGES`, which is made once.
    ///
    /// # Errors
    ///
    /// The packages cannot be fetched.
    pub(crate) fn new() -> Result<Self, String> {
        let clean = once(&format!("{RELEASE},{PACKAGES}"), |directory| {
            bootstrap("essential", PACKAGES, RELEASE, directory)
        })?;
        let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
        succeed(Command::new("cp").args(["-a", "-T"]).arg(clean).arg(directory.as_path()));
        Ok(Debian(directory))
    }

    /// Returns the path of a file in the directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.as_path().join(name.trim_start_matches('/'))
    }

    /// Runs a program in the directory.
    pub(crate) fn output(&self, words: &[&str]) -> Output {
        let mut command = Command::new("chroot");
        command.arg(self.0.as_path()).args(words).env("PATH", PATH);
        command.stdin(Stdio::null()).output().unwrap()
    }

    /// Runs a program there, which must succeed. Returns its output.
    #[track_caller]
    pub(crate) fn run(&self, words: &[&str]) -> String {
        succeed(Command::new("chroot").arg(self.0.as_path()).args(words).env("PATH", PATH))
    }

    /// Installs a package file.
    #[track_caller]
    pub(crate) fn install(&self, package: &Path) {
        fs::copy(package, self.path("package.deb")).unwrap();
        self.run(&["dpkg", "--install", "/package.deb"]);
    }

    /// Returns the names of files that contain `part`.
    pub(crate) fn find(&self, part: &str) -> String {
        let pattern = format!("*{part}*");
        let mut find = Command::new("find");
        succeed(find.arg(self.0.as_path()).args([
            "-mindepth",
            "1",
            "-name",
            &pattern,
            "-printf",
            "/%P\n",
        ]))
    }
}

/// A running Debian container with its own network.
#[derive(Debug)]
pub(crate) struct Machine {
    nspawn: Child,
    /// Process id of the container's init in this PID namespace.
    first: i32,
    debian: Debian,
}

impl Machine {
    /// Starts the container, and waits until systemd reports `running`.
    ///
    /// The container has the capabilities and system calls that its services need at their start. It has a
    /// unified control group hierarchy, on which systemd filters devices and packets.
    pub(crate) fn boot(debian: Debian) -> Self {
        let console = fs::File::create(debian.path("console")).unwrap();
        // This Debian has no message bus, login or name resolution. multi-user.target does not wait for them.
        let wanted = debian.path("etc/systemd/system/default.target");
        let _ = fs::remove_file(&wanted);
        symlink("/lib/systemd/system/multi-user.target", wanted).unwrap();
        // One container at a time, since its control group has a fixed name.
        let mut nspawn = Command::new("flock");
        nspawn.args(["--no-fork", "/run/lock/vhost-user-net-test", "systemd-nspawn"]);
        nspawn.args(["--quiet", "--boot", "--register=no", "--keep-unit", "--console=pipe"]);
        nspawn.args(["--private-network", "--machine=vhost-user-net-test"]);
        nspawn.arg("--capability=CAP_NET_ADMIN,CAP_NET_RAW,CAP_BPF,CAP_IPC_LOCK");
        nspawn.arg(
            "--system-call-filter=bpf landlock_create_ruleset landlock_add_rule \
             landlock_restrict_self",
        );
        nspawn.arg("--directory").arg(debian.0.as_path());
        nspawn.env("SYSTEMD_NSPAWN_UNIFIED_HIERARCHY", "1").stdin(Stdio::null());
        let nspawn = nspawn.stdout(console.try_clone().unwrap()).stderr(console).spawn().unwrap();
        let mut machine = Machine { nspawn, first: 0, debian };
        let end = Instant::now() + Duration::from_secs(90);
        while !machine.is_running() {
            let console = || fs::read_to_string(machine.debian.path("console")).unwrap();
            assert!(Instant::now() < end, "systemd does not start: {}", console());
            std::thread::sleep(Duration::from_millis(200));
        }
        machine
    }

    fn is_running(&mut self) -> bool {
        self.first = first_child(&self.nspawn).unwrap_or(0);
        self.first != 0 && {
            let output = self.command(&["systemctl", "is-system-running"]).output().unwrap();
            output.stdout == b"running\n"
        }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        let first = self.first.to_string();
        command.args(["--target", &first, "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w", "--"]);
        command.args(words).env("PATH", PATH).stdin(Stdio::null());
        command
    }

    /// Runs a program in the container.
    pub(crate) fn output(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// Runs a program there, which must succeed. Returns its output.
    #[track_caller]
    pub(crate) fn run(&self, words: &[&str]) -> String {
        succeed(&mut self.command(words))
    }

    /// Starts a unit, and prints the unit's log if it fails.
    #[track_caller]
    pub(crate) fn start(&self, unit: &str) {
        let started = self.command(&["systemctl", "start", unit]).output().unwrap();
        assert!(started.status.success(), "{unit}: {}", self.log(unit));
    }

    /// Returns a unit's log.
    pub(crate) fn log(&self, unit: &str) -> String {
        self.run(&["journalctl", "--no-pager", "--unit", unit])
    }

    /// Returns a property of a unit.
    pub(crate) fn property(&self, unit: &str, property: &str) -> String {
        self.run(&["systemctl", "show", "--value", "--property", property, unit]).trim().to_owned()
    }

    /// Waits until a property of a unit is `value`.
    #[track_caller]
    pub(crate) fn wait_for(&self, unit: &str, property: &str, value: &str) {
        eventually(&format!("{property} of {unit} is {value}"), || {
            self.property(unit, property) == value
        });
    }

    /// Returns the path of a file in the container's mount namespace.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{name}", self.first))
    }

    /// Writes a file in the container, and creates its directory.
    pub(crate) fn write(&self, name: &str, text: &str) {
        let path = self.debian.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// Moves this thread into the container's network namespace, in which the kernel sends no frames itself.
    pub(crate) fn enter_network(&self) {
        let network = fs::File::open(format!("/proc/{}/ns/net", self.first)).unwrap();
        setns(network, CloneFlags::CLONE_NEWNET).unwrap();
        silence_kernel();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.first != 0 {
            let _ = kill(Pid::from_raw(self.first), Signal::SIGKILL);
        } else {
            let _ = self.nspawn.kill();
        }
        let _ = self.nspawn.wait();
    }
}
