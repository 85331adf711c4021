//! What the machine's own calls cost, by which the tables of two machines can be read side by side.

use std::cell::RefCell;
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nix::unistd::getppid;
use vmm_sys_util::eventfd::EventFd;

use super::cases::Measurements;
use super::report::Report;
use crate::af_xdp::{self, Load};
use crate::measure::{Cost, all_in_turns, bare, frame};
use crate::support::driver::HEADER;
use crate::tap;

const SUBJECT: &str = "this machine";
/// Calls between two looks at the clock.
const MANY: u64 = 256;

/// What each call costs, in turns.
pub(super) fn calls(report: &mut Report) {
    let bare_tap = RefCell::new(tap::Bare::new());
    af_xdp::veth("calls");
    let bare_veth = RefCell::new(af_xdp::Bare::on("calls0", false));
    let bytes = [&[0; HEADER][..], &frame(64)].concat();
    let event = EventFd::new(0).unwrap();
    let (from, mut to) = ([1u8; 1500], [0u8; 1500]);
    let calls: Measurements<'_> = vec![
        ("getppid", Box::new(|| each(|| _ = getppid()))),
        (
            "eventfd, write and read",
            Box::new(|| {
                each(|| {
                    event.write(1).unwrap();
                    event.read().unwrap();
                })
            }),
        ),
        (
            "copy of 1500 bytes",
            Box::new(|| each(|| black_box(&mut to).copy_from_slice(black_box(&from)))),
        ),
        ("line from the other processor", Box::new(line)),
        ("write of 64 bytes to a TAP", Box::new(|| bare_tap.borrow_mut().write(&bytes))),
        (
            "read of 64 bytes from a TAP",
            Box::new(|| bare_tap.borrow_mut().read(|tap| Load::flooding(tap, 64))),
        ),
        (
            "64 bytes through AF_XDP",
            Box::new(|| bare_veth.borrow_mut().send(64, af_xdp::Place::There)),
        ),
    ];
    let (names, calls): (Vec<&str>, Vec<_>) = calls.into_iter().unzip();
    for (name, costs) in names.into_iter().zip(all_in_turns(report.rounds(), calls)) {
        report.add(name, SUBJECT, "ns of a call", costs.iter().map(Cost::ns).collect());
    }
}

fn each(mut call: impl FnMut()) -> Cost {
    bare(|| {
        (0..MANY).for_each(|_| call());
        MANY
    })
}

/// A line of memory that the other processor writes and hands back each time.
fn line() -> Cost {
    let line = Arc::<AtomicU64>::default();
    let theirs = line.clone();
    let mut other = Load::default();
    other.run(move || {
        let value = theirs.load(Ordering::Acquire);
        if value % 2 == 1 {
            theirs.store(value + 1, Ordering::Release);
        }
    });
    each(|| {
        let value = line.load(Ordering::Acquire);
        line.store(value + 1, Ordering::Release);
        while line.load(Ordering::Acquire) == value + 1 {
            std::hint::spin_loop();
        }
    })
}
