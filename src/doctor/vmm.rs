//! Checks of running VMs: the guest's memory is shared, and sealed against truncation.
//!
//! The doctor takes a VMM's largest readable and writable mapping for the guest's memory.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use nix::unistd::User;

use super::finding::{Finding, quoted};
use super::host::{Credentials, Host};
use crate::sys::process::file_facts;

const CHECK: &str = "vm-memory";
/// Name of the program that changes a VM's definition in libvirt.
const LIBVIRT: &str = "virt-xml";

/// A process that runs a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Vmm {
    process: String,
    /// Command line.
    words: Vec<String>,
}

/// A mapping in `/proc/PID/maps` (proc_pid_maps(5)).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Mapping {
    bytes: u64,
    shared: bool,
    inode: u64,
    name: String,
}

/// Checks each running VMM.
pub(super) fn check(host: &Host, require_sealed: bool) -> Vec<Finding> {
    let of_running = |vmm: &Vmm| {
        let found = check_vmm(host, vmm, require_sealed);
        // The finding about a process that has exited meanwhile is void.
        words(host, &vmm.process).is_some_and(|words| words == vmm.words).then_some(found)
    };
    let mut found: Vec<_> = vmms(host).iter().filter_map(of_running).collect();
    if found.is_empty() {
        let why = "not applicable: no QEMU or cloud-hypervisor is running";
        found.push(Finding::pass(CHECK, "host", why));
    }
    found
}

fn vmms(host: &Host) -> Vec<Vmm> {
    host.processes()
        .into_iter()
        .filter_map(|process| {
            let words = words(host, &process)?;
            let program = words.first()?.rsplit('/').next()?;
            let runs_guests = program.starts_with("qemu-system-")
                || ["qemu-kvm", "kvm", "cloud-hypervisor"].contains(&program);
            runs_guests.then_some(Vmm { process, words })
        })
        .collect()
}

/// Reads a process's command line.
fn words(host: &Host, process: &str) -> Option<Vec<String>> {
    let line = host.read(&format!("/proc/{process}/cmdline"))?;
    Some(line.trim_end_matches('\0').split('\0').map(str::to_owned).collect())
}

fn check_vmm(host: &Host, vmm: &Vmm, require_sealed: bool) -> Finding {
    let program = vmm.words[0].rsplit('/').next().unwrap_or_default();
    let what = format!("{program} (pid {})", vmm.process);
    let maps = host.read(&format!("/proc/{}/maps", vmm.process)).unwrap_or_default();
    let Some(memory) = guest_memory(&maps) else {
        let why = "cannot read its memory mappings; run doctor as root";
        return Finding::warn(CHECK, what, why);
    };
    let size = memory.bytes >> 20;
    let has_vhost_user =
        vmm.words.iter().any(|word| word.contains("vhost-user") || word.contains("vhost_user"));
    let expected = expected_bytes(&vmm.words);
    if has_vhost_user && memory.bytes < expected / 2 {
        let why = format!(
            "has not mapped its {} MiB of guest memory yet: it waits for a socket, or has just started; \
             run doctor again when the guest runs",
            expected >> 20
        );
        return Finding::warn(CHECK, what, why);
    }
    if !memory.shared {
        let why = format!("guest memory ({size} MiB) is not shared");
        if !has_vhost_user {
            let why = format!("{why}; not applicable without a vhost-user device");
            return Finding::pass(CHECK, what, why);
        }
        let why = format!(
            "{why}, but its vhost-user device requires shared memory. Shut the guest down, and start it \
             with shared memory"
        );
        let found = Finding::fail(CHECK, what, why);
        // In a container, the VMM's paths and users are not the operator's.
        let namespace = |process: &str| host.link(&format!("/proc/{process}/ns/pid"));
        let is_here = namespace(&vmm.process) == namespace("self");
        let command = is_here
            .then(|| shared_memory_command(&vmm.words))
            .flatten()
            .and_then(|command| as_its_user(host, vmm, command));
        return match command {
            Some(command) => found.fix(command),
            None => found,
        };
    }
    match seals(&vmm.process, &memory) {
        Some(true) => {
            let why = format!("guest memory ({size} MiB) is shared, and sealed against truncation");
            Finding::pass(CHECK, what, why)
        }
        Some(false) => {
            let why = format!(
                "guest memory ({size} MiB) is shared, but not sealed: truncating its file stops the port. \
                 Use memory-backend-memfd, without seal=off"
            );
            let make = if require_sealed { Finding::fail } else { Finding::warn };
            make(CHECK, what, why)
        }
        None => {
            let why = format!(
                "guest memory ({size} MiB) is shared ({}); doctor cannot tell whether it is a sealed \
                 memory file",
                memory.name
            );
            Finding::warn(CHECK, what, why)
        }
    }
}

fn guest_memory(maps: &str) -> Option<Mapping> {
    let read = |line: &str| {
        let mut fields = line.split_whitespace();
        let (start, end) = fields.next()?.split_once('-')?;
        let rights = fields.next()?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        let bytes = number(end)?.checked_sub(number(start)?)?;
        let inode = fields.nth(2)?.parse().ok()?;
        let name = fields.collect::<Vec<_>>().join(" ");
        // An executable mapping holds the code that an emulator generates.
        (rights.starts_with("rw-")).then(|| Mapping {
            bytes,
            shared: rights.ends_with('s'),
            inode,
            name,
        })
    };
    maps.lines().filter_map(read).max_by_key(|mapping| mapping.bytes)
}

/// Returns whether the file behind the memory is sealed against truncation; `None` if it cannot be read.
fn seals(process: &str, memory: &Mapping) -> Option<bool> {
    let descriptors = std::fs::read_dir(format!("/proc/{process}/fd")).ok()?;
    for descriptor in descriptors.flatten() {
        let path = descriptor.path();
        // Opens the mapped file only, and so no pipe or device.
        let is_it = path.metadata().is_ok_and(|file| file.is_file() && file.ino() == memory.inode)
            && std::fs::read_link(&path).is_ok_and(|link| link.to_string_lossy() == memory.name);
        if is_it {
            return Some(file_facts(&File::open(path).ok()?).ok()??.sealed);
        }
    }
    None
}

/// Makes a command that contains a process's command line run as the process's own user, who chose its words.
/// Returns `None` if that user has no name.
fn as_its_user(host: &Host, vmm: &Vmm, command: String) -> Option<String> {
    let user = Credentials::of_process(host, &vmm.process).user;
    if user == Credentials::of(host).user || command.starts_with(&format!("{LIBVIRT} ")) {
        return Some(command);
    }
    let user = User::from_uid(user.into()).ok()??;
    Some(format!("runuser -u {} -- {command}", quoted(&user.name)))
}

/// Returns the word after an option.
fn after<'a>(words: &'a [String], option: &str) -> Option<&'a str> {
    let found = words.windows(2).find(|pair| pair[0].trim_start_matches('-') == option)?;
    Some(&found[1])
}

/// Returns the size of the guest's memory, or of its smallest part, in bytes, from the VMM's command line;
/// 0 if the command line does not contain it.
fn expected_bytes(words: &[String]) -> u64 {
    const MIB: u64 = 1 << 20;
    // A number, and a letter for a power of 1024.
    let bytes = |text: &str, unit: u64| {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let number: u64 = text[..digits].parse().ok()?;
        let letter = text[digits..].chars().next().map(|letter| letter.to_ascii_uppercase());
        let power = letter.and_then(|letter| "BKMGT".find(letter));
        number.checked_mul(power.map_or(unit, |power| 1 << (10 * power)))
    };
    let size = |word: &str| {
        let text = word.split(',').find_map(|part| part.strip_prefix("size="));
        // libvirt's JSON form.
        let text = text.or_else(|| Some(word.split_once("\"size\":")?.1.trim_start()));
        bytes(text?, 1)
    };
    let parts = words.iter().filter(|word| word.contains("memory-backend-"));
    if let Some(smallest) = parts.filter_map(|word| size(word)).min() {
        return smallest;
    }
    if let Some(memory) = after(words, "memory") {
        return size(memory).unwrap_or(0);
    }
    let first = after(words, "m").and_then(|word| word.split(',').next());
    bytes(first.map_or("128", |word| word.trim_start_matches("size=")), MIB).unwrap_or(0)
}

/// Returns the command that starts a VM with shared memory.
fn shared_memory_command(words: &[String]) -> Option<String> {
    let program = words.first()?.rsplit('/').next()?;
    let after = |option| after(words, option);
    let libvirt = after("name").filter(|name| name.starts_with("guest="));
    if let Some(name) = libvirt {
        let name = quoted(name.trim_start_matches("guest=").split(',').next()?);
        return Some(format!(
            "{LIBVIRT} {name} --edit --memorybacking source.type=memfd,access.mode=shared"
        ));
    }
    let mut words = words.to_vec();
    if program == "cloud-hypervisor" {
        let at = words.iter().position(|word| word == "--memory")? + 1;
        let memory = words.get_mut(at)?;
        *memory = memory.replace(",shared=off", "").replace(",shared=on", "") + ",shared=on";
    } else if let Some(backend) = words.iter_mut().find(|word| word.starts_with("memory-backend-"))
    {
        // Anonymous memory has no file to pass to the daemon.
        let kept = backend.replace(",share=off", "").replace(",share=on", "");
        *backend = kept.replace("memory-backend-ram", "memory-backend-memfd") + ",share=on";
        let id = backend.split(',').find_map(|part| part.strip_prefix("id="))?;
        let uses = ["memory-backend", "memdev"].map(|option| format!("{option}={id}"));
        // Only a reference by the id makes the backend the guest's memory.
        let machine = uses[0].clone();
        let is_use = |part: &str| uses.iter().any(|it| it == part);
        if !words.iter().any(|word| word.split(',').any(is_use)) {
            words.extend(["-machine".into(), machine]);
        }
    } else if words.iter().any(|word| word.starts_with('{') && word.contains("memory-backend-")) {
        return None;
    } else {
        // QEMU's default size, in MiB, which is also its default unit.
        let size = after("m").map_or("128", |size| size.trim_start_matches("size="));
        let size = size.split(',').next()?;
        let unit = if size.bytes().all(|byte| byte.is_ascii_digit()) { "M" } else { "" };
        words.extend([
            "-object".into(),
            format!("memory-backend-memfd,id=shared-memory,size={size}{unit},share=on"),
            "-machine".into(),
            "memory-backend=shared-memory".into(),
        ]);
    }
    Some(words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;
    use crate::doctor::host::tests::fake;

    const PRIVATE: &str = "7f0000000000-7f0040000000 rw-p 00000000 00:00 0 \n\
                           7f1000000000-7f1080000000 rwxp 00000000 00:00 0 \n\
                           7f2000000000-7f2000001000 rw-s 00000000 00:01 9 /memfd:x (deleted)\n";

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn largest_data_mapping_is_guest_memory() {
        let memory = guest_memory(PRIVATE).unwrap();
        assert_eq!((memory.bytes, memory.shared), (1 << 30, false));
        let shared = "7f0000000000-7f0040000000 rw-s 00000000 00:01 7 /memfd:mem (deleted)\n";
        let memory = guest_memory(shared).unwrap();
        assert!(memory.shared && memory.inode == 7 && memory.name == "/memfd:mem (deleted)");
        assert_eq!(guest_memory("nonsense\n"), None);
    }

    #[test]
    fn shared_memory_is_required_by_vhost_user_only() {
        let finding = |line: &str| {
            let line = line.replace(' ', "\0") + "\0";
            let files = [("/proc/7/cmdline", &line[..]), ("/proc/7/maps", PRIVATE)];
            let (_directory, host) = fake(&files);
            check(&host, false).remove(0)
        };
        assert_eq!(finding("/usr/bin/qemu-system-x86_64 -m 1G").status, Status::Pass);
        let found = finding("/usr/bin/qemu-system-x86_64 -m 1G -netdev vhost-user,id=n,chardev=c");
        assert_eq!(found.status, Status::Fail);
        assert!(found.fix.unwrap().ends_with("-machine memory-backend=shared-memory"));
        assert!(finding("/bin/sh -c vhost-user").why.contains("not applicable"));
    }

    #[test]
    fn unmapped_guest_memory_warns_only() {
        const EARLY: &str = "7f0000000000-7f0000800000 rw-p 00000000 00:00 0 \n";
        let finding = |line: &str, maps: &str| {
            let line = line.replace(' ', "\0") + "\0";
            let (_directory, host) = fake(&[("/proc/7/cmdline", &line), ("/proc/7/maps", maps)]);
            check(&host, false).remove(0)
        };
        let device = "-netdev vhost-user,id=n,chardev=c";
        for memory in [
            "-m 192",
            "-m size=1G,slots=2",
            "",
            "-object memory-backend-memfd,id=mem,size=192M,share=on",
            "-object {\"qom-type\":\"memory-backend-memfd\",\"id\":\"m\",\"size\":201326592}",
        ] {
            let found = finding(&format!("qemu-system-x86_64 {memory} {device}"), EARLY);
            assert_eq!((found.status, &found.fix), (Status::Warn, &None), "{memory}: {found:?}");
            assert!(found.why.contains("guest memory yet"), "{found:?}");
        }
        let line = "cloud-hypervisor --memory size=1G,shared=on --net vhost_user=true";
        assert!(finding(line, EARLY).why.contains("not mapped its 1024 MiB"));
        // Two parts of a guest's memory, each as large as the visible mapping.
        let halves = "-m 2G -object memory-backend-ram,id=a,size=1G -numa node,memdev=a \
                      -object memory-backend-ram,id=b,size=1G -numa node,memdev=b";
        let found = finding(&format!("qemu-system-x86_64 {halves} {device}"), PRIVATE);
        assert_eq!(found.status, Status::Fail);
    }

    #[test]
    fn vmm_that_exits_or_is_elsewhere_gets_no_command() {
        let line = "qemu-system-x86_64\0-netdev\0vhost-user,id=n\0";
        let (directory, host) = fake(&[("/proc/7/cmdline", line), ("/proc/7/maps", PRIVATE)]);
        let root = directory.as_path();
        let link = |process: &str, namespace: &str| {
            let place = root.join(format!("proc/{process}/ns"));
            std::fs::create_dir_all(&place).unwrap();
            std::os::unix::fs::symlink(namespace, place.join("pid")).unwrap();
        };
        assert!(check(&host, false)[0].fix.is_some());
        link("self", "pid:[1]");
        link("7", "pid:[2]");
        let found = check(&host, false).remove(0);
        assert_eq!((found.status, found.fix), (Status::Fail, None), "it is in a container");
        // A process that has exited: a zombie has no command line.
        std::fs::write(root.join("proc/7/cmdline"), "").unwrap();
        assert!(check(&host, false)[0].why.contains("not applicable"));
    }

    #[test]
    fn command_line_of_another_user_runs_as_that_user() {
        let line = "/home/x/qemu-system-x86_64\0-netdev\0vhost-user,id=n\0";
        let fix = |owner: u32| {
            let status = format!("Uid:\t{owner}\t{owner}\t{owner}\t{owner}\n");
            let (_directory, host) = fake(&[
                ("/proc/7/cmdline", line),
                ("/proc/7/maps", PRIVATE),
                ("/proc/7/status", &status),
                ("/proc/self/status", "Uid:\t0\t0\t0\t0\n"),
            ]);
            check(&host, false).remove(0).fix
        };
        assert!(fix(0).unwrap().starts_with("/home/x/qemu-system-x86_64 "));
        let nobody = User::from_name("nobody").unwrap().unwrap().uid.as_raw();
        assert!(fix(nobody).unwrap().starts_with("runuser -u nobody -- /home/x/qemu"));
        assert_eq!(fix(0xffff_fff0), None, "the user has no name");
    }

    #[test]
    fn command_for_shared_memory_depends_on_the_vmm() {
        let fix = |line| shared_memory_command(&words(line)).unwrap();
        assert_eq!(
            fix("qemu-system-x86_64 -object memory-backend-ram,id=m,size=1G,share=off"),
            "qemu-system-x86_64 -object memory-backend-memfd,id=m,size=1G,share=on -machine \
             memory-backend=m"
        );
        let unused = fix("kvm -object memory-backend-memfd,id=m,size=1G,share=on");
        assert_eq!(unused.matches("share=on").count(), 1, "{unused}");
        assert!(unused.ends_with(" -machine memory-backend=m"), "{unused}");
        let used = "kvm -machine q35,memory-backend=m -object memory-backend-file,id=m,size=1G";
        assert_eq!(fix(used), format!("{used},share=on"));
        assert!(fix("kvm -m 512").contains("size=512M,share=on"));
        assert_eq!(
            fix("cloud-hypervisor --memory size=1G"),
            "cloud-hypervisor --memory size=1G,shared=on"
        );
        let libvirt = fix("qemu-system-x86_64 -name guest=a;b,debug-threads=on");
        assert!(libvirt.starts_with("virt-xml 'a;b' --edit --memorybacking"), "{libvirt}");
    }
}
