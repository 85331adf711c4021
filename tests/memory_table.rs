//! Guests whose memory table has regions other than RAM: files on disks and read-only files, for nvdimm,
//! virtio-pmem and ivshmem. The daemon does not map them.

use std::fs::File;
use std::os::fd::AsRawFd;

use vhost::vhost_user::message::FrontendReq;

use crate::support::daemon::{Daemon, port};
use crate::support::driver::{Card, LOG_ALL, Options};
use crate::support::frontend::{Frontend, addresses, pair, region};
use crate::support::guest::{Ram, memfd};
use crate::support::network::{Wire, enter_namespace_for, enter_namespace_with_veth, ip};
use crate::support::traffic::check_both_ways;
use crate::support::vm::{HOST_ADDRESS, Vm, check_ping, needs_guest};
use crate::support::{eventually, needs_root, one_at_a_time};

const SIZE: u64 = 0x20_0000;
const ABOVE: u64 = 1 << 32;

/// Creates an unnamed file on a disk.
fn file_on_disk() -> File {
    let name = format!("{}/image-{:?}", env!("CARGO_TARGET_TMPDIR"), std::thread::current().id());
    let options = File::options().read(true).write(true).create(true).truncate(true).to_owned();
    let file = options.open(&name).unwrap();
    std::fs::remove_file(name).unwrap();
    file.set_len(SIZE).unwrap();
    file
}

/// Opens a memfd for reading only.
fn read_only(file: &File) -> File {
    File::open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
}

/// A region of guest memory, and the descriptor that the frontend sends for it.
struct Image {
    ram: Ram,
    file: File,
}

impl Image {
    fn new(number: u64, file: File) -> Self {
        Image { ram: Ram::new(ABOVE + number * SIZE, SIZE), file }
    }

    /// Creates one region of each kind.
    fn all() -> [Self; 3] {
        let disk = Image::new(0, file_on_disk());
        [
            disk,
            Image::new(1, read_only(&memfd(SIZE))),
            Image::new(2, File::open("/dev/zero").unwrap()),
        ]
    }

    fn payload(&self) -> Vec<u8> {
        [vec![0; 8], region(&self.ram)].concat()
    }

    fn add(&self, frontend: &mut Frontend) -> bool {
        let fds = [self.file.as_raw_fd()];
        frontend.try_ask(FrontendReq::ADD_MEM_REG, &self.payload(), &fds).unwrap()
    }
}

/// Sends a memory table of the guest's RAM and images.
fn set_table(card: &mut Card, images: &[&Image]) {
    let mut payload = [pair(images.len() as u32 + 1, 0), region(&card.ram)].concat();
    images.iter().for_each(|image| payload.extend(region(&image.ram)));
    let files = std::iter::once(&card.ram.file).chain(images.iter().map(|image| &image.file));
    let fds: Vec<i32> = files.map(|file| file.as_raw_fd()).collect();
    card.frontend.ask(FrontendReq::SET_MEM_TABLE, &payload, &fds);
}

/// Returns the number of log lines about regions that are not mapped.
fn said(daemon: &Daemon) -> usize {
    daemon.log().matches("memory region not mapped").count()
}

#[test]
fn images_beside_ram_are_not_mapped() {
    let mut daemon = Daemon::start(&["--loopback"]);
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    card.check_echo(50);
    let descriptors = daemon.resources().0;
    let images = Image::all();
    let [disk, constant, device] = &images;
    set_table(&mut card, &[disk, constant]);
    card.check_echo(50);
    for address in ["0x100000000", "0x100200000"] {
        let line = format!("address={address} bytes=2097152; its file");
        eventually("the log has the line", || daemon.log().contains(&line));
    }
    // Told again, as QEMU does: it is said once.
    set_table(&mut card, &[constant, disk]);
    card.check_echo(50);
    assert_eq!(said(&daemon), 2);
    assert!(device.add(&mut card.frontend));
    card.check_echo(50);
    eventually("the log has the line", || said(&daemon) == 3);
    // Neither mapped nor kept open.
    assert_eq!(daemon.resources().0, descriptors);
    assert!(!images.iter().any(|image| image.add(&mut card.frontend)), "it overlaps itself");
    for image in images {
        card.frontend.ask(FrontendReq::REM_MEM_REG, &image.payload(), &[]);
        card.frontend.refused(FrontendReq::REM_MEM_REG, &image.payload(), &[]);
    }
    card.check_echo(50);
    assert!(daemon.is_alive());
}

#[test]
fn rings_and_buffers_in_an_image_stop_their_ring() {
    let daemon = Daemon::start(&["--loopback"]);
    for image in Image::all() {
        let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
        assert!(image.add(&mut card.frontend));
        card.check_echo(20);
        card.tx[0].add(&[(image.ram.base + 64, 100)], false).unwrap();
        card.tx[0].publish();
        eventually("the frontend is told", || card.tx[0].error.read().is_ok());
        let fault = format!("a buffer of 100 bytes at {:#x} lies outside", image.ram.base + 64);
        eventually("the log has the line", || daemon.log().contains(&fault));
        drop(card);

        let mut card = Card::prepare(Frontend::new(daemon.connect()), Options::default());
        assert!(image.add(&mut card.frontend));
        let (base, frontend) = (image.ram.base, &mut card.frontend);
        frontend.ask(FrontendReq::SET_VRING_NUM, &pair(0, 256), &[]);
        let place = addresses(0, 0, base, base + 0x2000, base + 0x1000);
        frontend.ask(FrontendReq::SET_VRING_ADDR, &place, &[]);
        let kick = &card.rx[0].kick;
        frontend.refused(FrontendReq::SET_VRING_KICK, &0_u64.to_ne_bytes(), &[kick.as_raw_fd()]);
        eventually("the log has the reason", || {
            daemon.log().contains("a memory region that is not mapped")
        });
    }
}

#[test]
fn table_of_images_alone_is_refused_with_fix() {
    let daemon = Daemon::start(&["--loopback"]);
    let mut frontend = Frontend::new(daemon.connect());
    frontend.begin();
    let [disk, constant, _] = Image::all();
    for (image, why) in [(disk, "memory-backend-memfd"), (constant, "reading and writing")] {
        let table = [pair(1, 0), region(&image.ram)].concat();
        frontend.refused(FrontendReq::SET_MEM_TABLE, &table, &[image.file.as_raw_fd()]);
        eventually("the log has the reason", || daemon.log().contains(why));
        // One by one the RAM may be the next.
        assert!(image.add(&mut frontend));
    }
    let (reader, _writer) = std::io::pipe().unwrap();
    let directory = File::open("/").unwrap();
    for fd in [reader.as_raw_fd(), directory.as_raw_fd()] {
        let payload = [vec![0; 8], region(&Ram::new(0, SIZE))].concat();
        frontend.refused(FrontendReq::ADD_MEM_REG, &payload, &[fd]);
    }
}

#[test]
fn takeover_keeps_images() {
    needs_root!("takeover_keeps_images");
    let file = "control = \"{}/control\"\n".to_owned() + &port("one", "loopback = true");
    let mut daemon = Daemon::with_config(&file, "one");
    let images = Image::all();
    let mut card = Card::start(Frontend::new(daemon.connect_to("one")), Options::default());
    images.iter().for_each(|image| assert!(image.add(&mut card.frontend)));
    card.check_echo(50);
    for round in 1..=2 {
        daemon.upgrade();
        eventually("it is done", || {
            daemon.log().matches("daemon: took over ports=").count() == round
        });
        card.check_echo(50);
    }
    for image in images {
        card.frontend.ask(FrontendReq::REM_MEM_REG, &image.payload(), &[]);
    }
    card.check_echo(50);
    // At most the connection that waited for the port to listen.
    assert!(daemon.log().matches("frontend disconnected").count() <= 1, "{}", daemon.log());
}

#[test]
fn takeover_keeps_images_listed_before_ram() {
    needs_root!("takeover_keeps_images_listed_before_ram");
    let file = "control = \"{}/control\"\n".to_owned() + &port("one", "loopback = true");
    let mut daemon = Daemon::with_config(&file, "one");
    let mut frontend = Frontend::new(daemon.connect_to("one"));
    frontend.begin();
    let image = Image::new(0, file_on_disk());
    assert!(image.add(&mut frontend));
    daemon.upgrade();
    frontend.add_mem_reg(&Ram::new(0, SIZE));
    frontend.ask(FrontendReq::REM_MEM_REG, &image.payload(), &[]);
}

#[test]
fn guest_with_images_migrates() {
    let daemon = Daemon::start(&["--loopback"]);
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    let image = Image::new(0, file_on_disk());
    set_table(&mut card, &[&image]);
    // Bits for the RAM; QEMU's log has some for all.
    let log = memfd(0x1000);
    assert!(card.frontend.set_log_base(0x1000, 0, &log));
    card.frontend.set_features(card.options.features | LOG_ALL);
    card.check_echo(50);
    let mut bits = [0; 0x1000];
    std::os::unix::fs::FileExt::read_exact_at(&log, &mut bits, 0).unwrap();
    assert!(bits.iter().any(|byte| *byte != 0), "what is written is noted");
}

#[test]
fn af_xdp_registers_ram_without_images() {
    needs_root!("af_xdp_registers_ram_without_images");
    enter_namespace_with_veth(1);
    let wire = Wire::open("veth1");
    let daemon = Daemon::start(&["--af-xdp=veth0"]);
    let mut card = Card::start(Frontend::new(daemon.connect()), Options::default());
    let images = Image::all();
    set_table(&mut card, &images.each_ref());
    card.send(0, &[0; 5]);
    check_both_ways(&wire, &mut card, 200);
    // Under traffic too.
    card.frontend.ask(FrontendReq::REM_MEM_REG, &images[0].payload(), &[]);
    check_both_ways(&wire, &mut card, 200);
    assert!(images[0].add(&mut card.frontend));
    check_both_ways(&wire, &mut card, 200);
}

#[test]
fn guest_with_file_backed_nvdimm_has_network() {
    needs_guest!("guest_with_file_backed_nvdimm_has_network");
    let _alone = one_at_a_time();
    let _wire = enter_namespace_for("--tap=tap0");
    ip(&format!("address add {HOST_ADDRESS}/24 dev tap0"));
    let daemon = Daemon::start(&["--tap=tap0"]);
    let name = format!("{}/nvdimm", env!("CARGO_TARGET_TMPDIR"));
    File::create(&name).unwrap().set_len(128 << 20).unwrap();
    let file = format!("memory-backend-file,id=nv,mem-path={name},size=128M,share=on");
    let options = ["-machine", "nvdimm=on", "-object", &file, "-device", "nvdimm,memdev=nv"];
    let mut vm = Vm::start_with(&daemon.socket(), &[("SLOTS", "4")], &options);
    vm.wait_ready();
    check_ping();
    assert_eq!(said(&daemon), 1, "{}", daemon.log());
    std::fs::remove_file(name).unwrap();
}
