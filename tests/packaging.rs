//! The Debian package on a clean Debian 12, its units under systemd, and its manual pages, completions,
//! alerts, dashboard and examples.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;
use vmm_sys_util::tempdir::TempDir;

use crate::support::daemon::{Daemon, port, program};
use crate::support::debian::{Debian, Machine, succeed, unpacked};
use crate::support::driver::{Card, Options};
use crate::support::frontend::Frontend;
use crate::support::network::{Wire, ip};
use crate::support::traffic::check_both_ways;
use crate::support::{eventually, needs_program, needs_root, one_at_a_time, skip};

/// Unwraps a result that needs fetched packages, or skips the test.
macro_rules! fetched {
    ($test:expr, $made:expr) => {
        match $made {
            Ok(made) => made,
            Err(why) => {
                skip($test, why.lines().next().unwrap_or_default());
                return;
            }
        }
    };
}
pub(crate) use fetched;

/// Returns the path of a source file.
fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

/// The package that dist/make-deb builds, and its files.
pub(crate) struct Package {
    pub(crate) file: PathBuf,
    files: PathBuf,
}

/// Builds the package, once.
pub(crate) fn package() -> &'static Package {
    static PACKAGE: OnceLock<Package> = OnceLock::new();
    PACKAGE.get_or_init(|| {
        let _busy = one_at_a_time();
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("package");
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).unwrap();
        let (file, files) = (directory.join("package.deb"), directory.join("files"));
        // The program's directory is the profile's, below the target directory.
        let target = Path::new(env!("CARGO_BIN_EXE_vhost-user-net")).ancestors().nth(2).unwrap();
        let mut make = Command::new(source("dist/make-deb"));
        succeed(make.arg(&file).env("CARGO_TARGET_DIR", target));
        succeed(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&files));
        Package { file, files }
    })
}

/// Returns all files below a directory, by relative name.
fn files(directory: &Path) -> BTreeSet<String> {
    let mut find = Command::new("find");
    let text = succeed(find.arg(directory).args(["-type", "f", "-printf", "%P\n"]));
    text.lines().map(str::to_owned).collect()
}

#[test]
fn package_contains_all_its_files() {
    needs_program!("package_contains_all_its_files", "cargo-deb");
    let Package { file, files: root } = package();
    let files = files(root);
    for name in [
        "usr/bin/vhost-user-net",
        "usr/lib/systemd/system/vhost-user-net.service",
        "usr/lib/systemd/system/vhost-user-net@.service",
        "usr/lib/systemd/system/vhost-user-net@.socket",
        "usr/share/qemu/vhost-user/50-vhost-user-net.json",
        "usr/share/man/man8/vhost-user-net.8",
        "usr/share/man/man8/vhost-user-net-run.8",
        "usr/share/man/man8/vhost-user-net-check-config.8",
        "usr/share/man/man5/vhost-user-net.toml.5",
        "usr/share/man/man1/vhost-user-net-ctl.1",
        "usr/share/man/man1/vhost-user-net-ctl-set.1",
        "usr/share/bash-completion/completions/vhost-user-net",
        "usr/share/zsh/vendor-completions/_vhost-user-net",
        "usr/share/fish/vendor_completions.d/vhost-user-net.fish",
        "usr/share/vhost-user-net/af-xdp.conf",
        "usr/share/vhost-user-net/unprivileged.conf",
        "usr/share/vhost-user-net/grafana-dashboard.json",
        "usr/share/vhost-user-net/alerts.yml",
        "usr/share/doc/vhost-user-net/README.md",
        "usr/share/doc/vhost-user-net/docs/install.md",
        "usr/share/doc/vhost-user-net/examples/libvirt-hook",
        "usr/share/doc/vhost-user-net/copyright",
        "etc/vhost-user-net.toml",
        "etc/vhost-user-net/example.toml",
    ] {
        assert!(files.contains(name), "{name} is not in {files:#?}");
    }
    // By the control file, which the linker's needs are in.
    let depends = succeed(Command::new("dpkg-deb").arg("-f").arg(file).arg("Depends"));
    assert!(depends.contains("libc6"), "{depends}");
    let mut sections = Command::new("readelf");
    let sections = succeed(sections.arg("--sections").arg(root.join("usr/bin/vhost-user-net")));
    // What is left with that in its name, .debug_gdb_scripts, has 34 bytes.
    let stripped = !sections.contains(".debug_info") && !sections.contains(".debug_line");
    assert!(sections.contains(".text") && stripped, "{sections}");
}

#[test]
fn package_installs_and_purges_on_clean_debian() {
    const TEST: &str = "package_installs_and_purges_on_clean_debian";
    needs_root!(TEST);
    needs_program!(TEST, "cargo-deb");
    needs_program!(TEST, "mmdebstrap");
    let file = &package().file;
    let debian = fetched!(TEST, Debian::new());
    debian.install(file);
    assert_eq!(debian.run(&["dpkg", "--verify", "vhost-user-net"]), "");
    let version = debian.run(&["vhost-user-net", "--version"]);
    assert_eq!(version, format!("vhost-user-net {}\n", env!("CARGO_PKG_VERSION")));
    for file in ["/etc/vhost-user-net.toml", "/etc/vhost-user-net/example.toml"] {
        let said = debian.run(&["vhost-user-net", "check-config", file]);
        assert!(said.contains("1 ports, nothing wrong"), "{said}");
    }
    assert!(debian.run(&["getent", "group", "kvm"]).starts_with("kvm:"));
    // The unit is disabled until the operator has configured its ports.
    let enabled = debian.output(&["systemctl", "is-enabled", "vhost-user-net.service"]);
    assert_eq!(enabled.stdout, b"disabled\n");
    // Its configuration is the operator's.
    fs::write(debian.path("etc/vhost-user-net.toml"), "# mine\n").unwrap();
    debian.install(file);
    assert_eq!(fs::read(debian.path("etc/vhost-user-net.toml")).unwrap(), b"# mine\n");
    debian.run(&["dpkg", "--purge", "vhost-user-net"]);
    assert_eq!(debian.find("vhost-user-net"), "");
}

/// Returns a unit's exposure by `systemd-analyze security`, from 0 to 10.
fn exposure(debian: &Debian, unit: &str) -> f64 {
    let said = debian.run(&["systemd-analyze", "security", "--offline=true", "--no-pager", unit]);
    let line = said.lines().find(|line| line.contains("Overall exposure level")).unwrap();
    line.split(' ').find_map(|word| word.parse().ok()).unwrap()
}

#[test]
fn units_verify_with_low_exposure() {
    const TEST: &str = "units_verify_with_low_exposure";
    needs_root!(TEST);
    needs_program!(TEST, "cargo-deb");
    needs_program!(TEST, "mmdebstrap");
    let debian = fetched!(TEST, Debian::new());
    debian.install(&package().file);
    for unit in
        ["vhost-user-net.service", "vhost-user-net@vm1.service", "vhost-user-net@vm1.socket"]
    {
        let output = debian.output(&["systemd-analyze", "verify", "--man=no", unit]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{unit}: {said}");
    }
    for unit in ["vhost-user-net.service", "vhost-user-net@vm1.service"] {
        let plain = exposure(&debian, unit);
        assert!(plain < 2.0, "{unit}: {plain}");
        let with = |drop_in: &str| {
            let directory = debian.path(&format!("etc/systemd/system/{unit}.d"));
            fs::create_dir_all(&directory).unwrap();
            let file = debian.path(&format!("usr/share/vhost-user-net/{drop_in}"));
            fs::copy(file, directory.join(drop_in)).unwrap();
            let exposure = exposure(&debian, unit);
            fs::remove_dir_all(directory).unwrap();
            exposure
        };
        let (less, more) = (with("unprivileged.conf"), with("af-xdp.conf"));
        eprintln!("{unit}: exposure {plain}, unprivileged {less}, with AF_XDP {more}");
        assert!(less < plain && more < 2.5, "{unit}: {less}, {plain}, {more}");
    }
}

#[test]
fn units_serve_guests_under_systemd() {
    const TEST: &str = "units_serve_guests_under_systemd";
    needs_root!(TEST);
    needs_program!(TEST, "cargo-deb");
    needs_program!(TEST, "mmdebstrap");
    needs_program!(TEST, "systemd-nspawn");
    let debian = fetched!(TEST, Debian::new());
    debian.install(&package().file);
    let machine = Machine::boot(debian);
    machine.enter_network();
    // The group has another number here.
    let words = "ip tuntap add dev vnet2 mode tap vnet_hdr group kvm";
    machine.run(&words.split(' ').collect::<Vec<_>>());
    ip("link set vnet2 up");
    ip("link add veth0 type veth peer name veth1");
    ip("link set veth0 up");
    ip("link set veth1 up");
    let port = |name: &str, host: &str| {
        format!(
            "control = \"/run/vhost-user-net-{name}/control.sock\"\n[[port]]\n\
             socket-path = \"/run/vhost-user-net-{name}/vm.sock\"\n{host}\n"
        )
    };
    let drop_in = |name: &str, drop_in: &str| {
        let text = fs::read_to_string(source("dist").join(drop_in)).unwrap();
        machine.write(
            &format!("/etc/systemd/system/vhost-user-net@{name}.service.d/test.conf"),
            &text,
        );
    };
    machine.write("/etc/vhost-user-net/vm1.toml", &port("vm1", "tap = \"vnet1\""));
    machine.write("/etc/vhost-user-net/vm2.toml", &port("vm2", "tap = \"vnet2\""));
    drop_in("vm2", "unprivileged.conf");
    machine.write("/etc/vhost-user-net/vm3.toml", &port("vm3", "af-xdp = \"veth0\""));
    drop_in("vm3", "af-xdp.conf");
    machine.write("/etc/vhost-user-net/vm4.toml", "[[port]]\nfd = 3\nloopback = true\n");

    // A device that comes late, by far more than five starts.
    let late = "vhost-user-net@vm5.service";
    machine.write("/etc/vhost-user-net/vm5.toml", &port("vm5", "af-xdp = \"late0\""));
    drop_in("vm5", "af-xdp.conf");
    machine.run(&["systemctl", "start", "--no-block", late]);

    // A TAP that the unit makes, one that it may open, AF_XDP.
    let mut users = BTreeSet::new();
    for (name, wire, capabilities) in [
        ("vm1", "vnet1", "capabilities: none"),
        ("vm2", "vnet2", "capabilities: none"),
        ("vm3", "veth1", "capabilities: CAP_BPF CAP_IPC_LOCK CAP_NET_ADMIN CAP_NET_RAW"),
    ] {
        let unit = format!("vhost-user-net@{name}.service");
        machine.start(&unit);
        assert_eq!(machine.property(&unit, "StatusText"), "serving 1 port");
        let log = machine.log(&unit);
        assert!(log.contains(capabilities), "{log}");
        assert!(log.contains("no files and no network by landlock"), "{log}");
        let socket = format!("/run/vhost-user-net-{name}/vm.sock");
        let owner = machine.run(&["stat", "-c", "%G %a %u", &socket]);
        assert!(owner.starts_with("kvm 770 "), "{owner}");
        users.insert(owner);
        let frontend = Frontend::new(UnixStream::connect(machine.path(&socket)).unwrap());
        let mut card = Card::start(frontend, Options::default());
        check_both_ways(&Wire::open(wire), &mut card, 100);
        let control = format!("--control=/run/vhost-user-net-{name}/control.sock");
        let list = machine.run(&["vhost-user-net", "ctl", &control, "list"]);
        assert!(list.contains("running"), "{list}");
    }
    assert_eq!(users.len(), 3, "each has a user of its own: {users:?}");
    let accepted = machine.run(&["cat", "/proc/sys/net/ipv6/conf/vnet1/accept_ra"]);
    assert_eq!(accepted.trim(), "0", "{}", machine.log("vhost-user-net@vm1.service"));
    let tap = machine.run(&["ip", "-d", "link", "show", "vnet1"]);
    assert!(tap.contains(" user "), "it is the unit's alone: {tap}");

    // One that is started by its guest's VMM.
    machine.start("vhost-user-net@vm4.socket");
    assert_eq!(machine.property("vhost-user-net@vm4.service", "ActiveState"), "inactive");
    let connect = || UnixStream::connect(machine.path("/run/vhost-user-net-vm4.sock")).unwrap();
    Card::start(Frontend::new(connect()), Options::default()).check_echo(50);
    machine.wait_for("vhost-user-net@vm4.service", "ActiveState", "active");
    machine.run(&["systemctl", "stop", "vhost-user-net@vm4.service"]);
    Card::start(Frontend::new(connect()), Options::default()).check_echo(50);

    // systemd restarts a daemon that hangs.
    let unit = "vhost-user-net@vm1.service";
    machine.write(
        "/etc/systemd/system/vhost-user-net@vm1.service.d/test.conf",
        "[Service]\nWatchdogSec=1\n",
    );
    machine.run(&["systemctl", "daemon-reload"]);
    machine.run(&["systemctl", "restart", unit]);
    std::thread::sleep(std::time::Duration::from_millis(2500));
    assert_eq!(machine.property(unit, "NRestarts"), "0", "it says in time that it lives");
    let hang = format!("kill -STOP {}", machine.property(unit, "MainPID"));
    machine.run(&["sh", "-c", &hang]);
    machine.wait_for(unit, "NRestarts", "1");
    assert!(machine.log(unit).contains("Watchdog timeout"));
    machine.wait_for(unit, "ActiveState", "active");

    // Many ports in one, by the file that the package has, with one more later.
    machine.run(&["systemctl", "stop", unit]);
    let unit = "vhost-user-net.service";
    machine.start(unit);
    let list = machine.run(&["vhost-user-net", "ctl", "list"]);
    assert!(list.contains("tap vnet1"), "{list}");
    assert_eq!(machine.property(unit, "StatusText"), "serving 1 port");
    let more = "[[port]]\nname = \"more\"\nsocket-path = \"/run/vhost-user-net/more.sock\"\n\
                tap = \"vnet9\"\n";
    let file = fs::read_to_string(source("dist/vhost-user-net.toml")).unwrap();
    machine.write("/etc/vhost-user-net.toml", &(file + more));
    machine.run(&["systemctl", "reload", unit]);
    machine.wait_for(unit, "StatusText", "serving 2 ports");
    assert_eq!(machine.property(unit, "NRestarts"), "0", "{}", machine.log(unit));
    let path = machine.path("/run/vhost-user-net/more.sock");
    let frontend = Frontend::new(UnixStream::connect(path).unwrap());
    let mut card = Card::start(frontend, Options::default());
    check_both_ways(&Wire::open("vnet9"), &mut card, 100);
    drop(card);
    let mut prometheus = TcpStream::connect("127.0.0.1:9560").unwrap();
    prometheus.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut metrics = String::new();
    prometheus.read_to_string(&mut metrics).unwrap();
    assert!(metrics.contains("vhost_user_net_connections_total{port=\"more\"} 1"), "{metrics}");

    eventually("it was started many times", || {
        machine.property(late, "NRestarts").parse::<u32>().unwrap() > 6
    });
    ip("link add late0 type veth peer name late1");
    ip("link set late0 up");
    ip("link set late1 up");
    machine.wait_for(late, "ActiveState", "active");

    // What is left of it all at the end.
    machine.run(&["systemctl", "stop", "vhost-user-net*"]);
    machine.run(&["sh", "-c", "! ls /run | grep vhost-user-net"]);
    assert_eq!(machine.run(&["systemctl", "--failed", "--plain", "--no-legend"]), "");
}

#[test]
fn manual_pages_render_without_a_warning() {
    needs_program!("manual_pages_render_without_a_warning", "cargo-deb");
    needs_program!("manual_pages_render_without_a_warning", "man");
    let pages = package().files.join("usr/share/man");
    let names = files(&pages);
    assert!(names.len() >= 16, "{names:?}");
    for name in names {
        let title = Path::new(&name).file_stem().unwrap().to_str().unwrap();
        let mut man = Command::new("man");
        man.args(["--warnings", "-E", "UTF-8", "-Tutf8", "-l"]).arg(pages.join(&name));
        let output = man.env("LC_ALL", "C.UTF-8").stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{name}: {said}");
        // Bold is a letter written over itself.
        let mut text = String::new();
        for c in String::from_utf8_lossy(&output.stdout).chars() {
            if c == '\u{8}' {
                text.pop();
            } else {
                text.push(c);
            }
        }
        let plain: Vec<&str> = text.split_whitespace().collect();
        let heads = ["NAME", title, "-"];
        assert!(plain.windows(3).any(|words| words == heads), "{name}: {text}");
    }
}

#[test]
fn completions_load_in_each_shell() {
    const TEST: &str = "completions_load_in_each_shell";
    needs_program!(TEST, "cargo-deb");
    needs_program!(TEST, "zsh");
    needs_program!(TEST, "fish");
    let share = package().files.join("usr/share");
    let run = |shell: &str, options: &[&str], script: &str| {
        let mut command = Command::new(shell);
        succeed(command.args(options).arg(script).env("SHARE", &share).env("HOME", "/nonexistent"))
    };
    let script = "source \"$SHARE/bash-completion/completions/vhost-user-net\"
        COMP_WORDS=(vhost-user-net ctl se) COMP_CWORD=2
        _vhost__user__net vhost-user-net se ctl 2>/dev/null
        complete -p vhost-user-net && echo \"${COMPREPLY[@]}\"";
    let said = run("bash", &["-c"], script);
    assert!(
        said.contains("-F _vhost__user__net vhost-user-net") && said.ends_with("set\n"),
        "{said}"
    );
    let script = "fpath=($SHARE/zsh/vendor-completions $fpath)
        autoload -Uz compinit && compinit -D -u && print -r $_comps[vhost-user-net]
        autoload +X _vhost-user-net";
    assert_eq!(run("zsh", &["-fc"], script), "_vhost-user-net\n");
    let script = "source $SHARE/fish/vendor_completions.d/vhost-user-net.fish
        complete -C 'vhost-user-net ctl se'";
    assert!(run("fish", &["--no-config", "-c"], script).starts_with("set"));
}

/// Returns the words of a text that look like metrics.
fn metrics_named(text: &str) -> BTreeSet<&str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .filter(|word| word.starts_with("vhost_user_net_"))
        .collect()
}

#[test]
fn dashboard_and_alerts_name_existing_metrics() {
    let daemon = Daemon::with_config(
        &("control = \"{}/control\"\n".to_owned() + &port("one", "loopback = true")),
        "one",
    );
    let mut ask = program();
    let text = succeed(ask.arg("ctl").arg("--control").arg(daemon.path("control")).arg("metrics"));
    // A histogram's name is on no line of its own.
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let there: BTreeSet<&str> =
        samples.map(|line| line.split(['{', ' ']).next().unwrap()).collect();
    for file in ["dist/grafana-dashboard.json", "dist/alerts.yml"] {
        let text = fs::read_to_string(source(file)).unwrap();
        let named = metrics_named(&text);
        assert!(named.len() > 3, "{file}: {named:?}");
        let missing: Vec<_> = named.difference(&there).collect();
        assert!(missing.is_empty(), "{file} names {missing:?}, which no daemon has");
    }
    // Reasons for drops, which alerts choose from.
    let alerts = fs::read_to_string(source("dist/alerts.yml")).unwrap();
    for choice in alerts.split("reason=~\"").skip(1) {
        for reason in choice.split('"').next().unwrap().split('|') {
            assert!(text.contains(&format!("reason=\"{reason}\"")), "there is no reason {reason}");
        }
    }
}

#[test]
fn promtool_accepts_alert_rules_and_they_fire() {
    const TEST: &str = "promtool_accepts_alert_rules_and_they_fire";
    let promtool = fetched!(TEST, unpacked("prometheus")).join("usr/bin/promtool");
    let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    let path = |name: &str| directory.as_path().join(name);
    fs::copy(source("dist/alerts.yml"), path("alerts.yml")).unwrap();
    fs::copy(source("tests/packaging/alerts.yml"), path("cases.yml")).unwrap();
    succeed(Command::new(&promtool).args(["check", "rules"]).arg(path("alerts.yml")));
    succeed(Command::new(&promtool).args(["test", "rules"]).arg(path("cases.yml")));

    // What the dashboard asks, as rules, so that it is parsed.
    let dashboard = fs::read_to_string(source("dist/grafana-dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&dashboard).unwrap();
    let mut rules = String::from("groups:\n  - name: dashboard\n    rules:\n");
    for panel in dashboard["panels"].as_array().unwrap() {
        for (number, target) in panel["targets"].as_array().unwrap().iter().enumerate() {
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{panel}");
            let asked = target["expr"].as_str().unwrap();
            let asked = asked.replace("$__rate_interval", "5m").replace("$port", "vm1");
            let asked = Value::from(asked);
            rules += &format!("      - record: panel_{}_{number}\n", panel["id"]);
            rules += &format!("        expr: {asked}\n");
        }
    }
    fs::write(path("dashboard.yml"), rules).unwrap();
    succeed(Command::new(&promtool).args(["check", "rules"]).arg(path("dashboard.yml")));
}

#[test]
fn qemu_backend_description_is_correct() {
    let text = fs::read_to_string(source("dist/50-vhost-user-net.json")).unwrap();
    let description: Value = serde_json::from_str(&text).unwrap();
    // VhostUserBackend of QEMU's docs/interop/vhost-user.json: these three, and tags if there are any.
    let keys: Vec<&String> = description.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["binary", "description", "type"]);
    assert!(description["description"].is_string());
    assert_eq!(description["binary"], "/usr/bin/vhost-user-net");
    let manifest = fs::read_to_string(source("Cargo.toml")).unwrap();
    assert!(manifest.contains("[\"target/release/vhost-user-net\", \"usr/bin/\", \"755\"]"));
    let capabilities = succeed(program().arg("--print-capabilities"));
    let capabilities: Value = serde_json::from_str(&capabilities).unwrap();
    assert_eq!(description["type"], capabilities["type"]);
}

#[test]
fn example_files_pass_check_config() {
    for file in ["dist/vhost-user-net.toml", "dist/example.toml"] {
        let text = fs::read_to_string(source(file)).unwrap();
        let check = |text: &str| {
            let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
            let path = directory.as_path().join("file.toml");
            fs::write(&path, text).unwrap();
            succeed(program().arg("check-config").arg(&path))
        };
        assert!(check(&text).contains("nothing wrong"));
        if let Some((before, port)) = text.split_once("# [[port]]") {
            // What stands there for copying is good too.
            let port = port.replace("\n# ", "\n");
            assert!(check(&format!("{before}[[port]]{port}")).contains("2 ports"));
        }
    }
}

#[test]
fn example_domain_matches_libvirt_schema() {
    const TEST: &str = "example_domain_matches_libvirt_schema";
    needs_program!(TEST, "xmllint");
    let files = fetched!(TEST, unpacked("libvirt0"));
    let schema = files.join("usr/share/libvirt/schemas/domain.rng");
    let mut check = Command::new("xmllint");
    let domain = source("dist/examples/libvirt-domain.xml");
    succeed(check.args(["--noout", "--relaxng"]).arg(schema).arg(domain));
}

#[test]
fn hooks_start_and_stop_units_of_configured_machines() {
    let directory = TempDir::new_with_prefix("/tmp/vhost-user-net-test-").unwrap();
    let path = |name: &str| directory.as_path().join(name);
    fs::write(path("systemctl"), "#!/bin/sh\necho \"$@\"\n").unwrap();
    fs::set_permissions(path("systemctl"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(path("vm1.toml"), "").unwrap();
    let run = |hook: &str, words: &str| {
        let mut command = Command::new(source("dist/examples").join(hook));
        let programs = format!("{}:/usr/bin:/bin", directory.as_path().display());
        command.env("PATH", programs).env("CONFIG_DIRECTORY", directory.as_path());
        succeed(command.args(words.split(' ')))
    };
    let (start, stop) = ("start vhost-user-net@vm1.service\n", "stop vhost-user-net@vm1.service\n");
    for (hook, words, said) in [
        ("libvirt-hook", "vm1 prepare begin -", start),
        ("libvirt-hook", "vm1 start begin -", ""),
        ("libvirt-hook", "vm1 release end -", stop),
        ("libvirt-hook", "other prepare begin -", ""),
        ("proxmox-hook", "vm1 pre-start", start),
        ("proxmox-hook", "vm1 post-stop", stop),
        ("proxmox-hook", "vm1 pre-stop", ""),
        ("proxmox-hook", "other pre-start", ""),
    ] {
        assert_eq!(run(hook, words), said, "{hook} {words}");
    }
}

#[test]
fn example_command_makes_qemu_connect() {
    needs_program!("example_command_makes_qemu_connect", "qemu-system-x86_64");
    let daemon = Daemon::start(&["--loopback"]);
    let mut qemu = Command::new(source("dist/examples/qemu"))
        .args(["vm1", "-display", "none", "-nodefaults", "-S"])
        .env("SOCKET", daemon.socket())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap();
    // The first connection only waited for the daemon to listen.
    eventually("QEMU has connected", || daemon.log().matches("frontend connected").count() == 2);
    std::thread::sleep(std::time::Duration::from_millis(500));
    let ended = qemu.try_wait().unwrap();
    let _ = qemu.kill();
    let _ = qemu.wait();
    assert!(ended.is_none(), "QEMU has ended: {ended:?}");
    assert!(!daemon.log().contains("refused"), "{}", daemon.log());
}

#[test]
fn scripts_pass_shellcheck() {
    needs_program!("scripts_pass_shellcheck", "shellcheck");
    let mut check = Command::new("shellcheck");
    let names = ["make-deb", "vhost-user-net.postinst"].map(|name| format!("dist/{name}"));
    let examples = ["qemu", "cloud-hypervisor", "libvirt-hook", "proxmox-hook"]
        .map(|name| format!("dist/examples/{name}"));
    succeed(check.args(names.iter().chain(&examples).map(|name| source(name))));
}
