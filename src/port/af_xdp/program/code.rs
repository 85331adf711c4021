//! Instructions of the device's program and of queue programs. The device's program ends in a tail call to
//! the queue program, where the queue has one. A queue program is the device's program with filter and
//! counters.

use super::{COUNTED, HAS_QUEUE_PROGRAM, HEADER_LENGTH, Maps, Peers, QueueProgram};
use crate::features;
use crate::policy::filter::{SEEN_AT, extended};
use crate::sys::bpf::assembly::{Assembly, Label};
use crate::sys::bpf::instructions::{
    add, add_atomic64, add_register, and32, call, call_kernel, copy, exit, from_network,
    if_any_bit32, if_equal, if_greater, if_not_equal, if_not_equal32, instruction, jump, load16,
    load32, load64, put16, put32, put64, set, store16, store32, store64, subtract_register,
};
use crate::sys::bpf::{Map, MapKind};

// Helpers of linux/bpf.h.
const MAP_LOOKUP_ELEM: i32 = 1;
const MAP_UPDATE_ELEM: i32 = 2;
const TAIL_CALL: i32 = 12;
const XDP_ADJUST_HEAD: i32 = 44;
const REDIRECT_MAP: i32 = 51;
const XDP_GET_BUFF_LEN: i32 = 188;
// Verdicts of `enum xdp_action`.
const DROP: i32 = 1;
const PASS: i32 = 2;
const REDIRECT: i32 = 4;
// Offsets in `struct xdp_md`.
const DATA: i16 = 0;
const DATA_END: i16 = 4;
const RX_QUEUE_INDEX: i16 = 16;

// Registers that calls preserve.
const QUEUE: u8 = 6;
const LENGTH: u8 = 7;
const SETTINGS: u8 = 8;
const FRAME: u8 = 9;
/// Stack offset of the queue's number.
const KEY: i16 = -4;

/// A pair of a queue's counters: frames and bytes.
#[derive(Debug, Clone, Copy)]
enum Count {
    Passed,
    Filtered,
}

const _: () = assert!(COUNTED == 2 * (Count::Filtered as usize + 1));

/// Returns the instructions that load a map's address into a register.
fn map(target: u8, map: &Map<impl MapKind>) -> [u64; 2] {
    // BPF_PSEUDO_MAP_FD
    [instruction(0x18, target, 1, 0, map.descriptor()), 0]
}

/// Looks up the queue in a map. Jumps to `nothing` if the queue is beyond the map's end.
fn look_up(code: &mut Assembly, of: &Map<impl MapKind>, nothing: Label) {
    code.extend(map(1, of));
    code.extend([copy(2, 10), add(2, KEY.into()), call(MAP_LOOKUP_ELEM)]);
    code.jump(nothing, if_equal(0, 0, 0));
}

/// Loads the frame's length in bytes into `LENGTH`. Done only for frames that are counted: the call takes a
/// tenth of the program's time for a frame.
fn measure(code: &mut Assembly) {
    code.extend([copy(1, FRAME), call(XDP_GET_BUFF_LEN), copy(LENGTH, 0)]);
}

/// Adds the frame to a pair of the queue's counters.
fn count(code: &mut Assembly, maps: &Maps, what: Count) {
    let done = code.label();
    measure(code);
    look_up(code, &maps.counters, done);
    code.extend([
        add(0, 16 * what as i32),
        load64(1, 0, 0),
        add(1, 1),
        store64(0, 1, 0),
        load64(1, 0, 8),
        add_register(1, LENGTH),
        store64(0, 1, 8),
    ]);
    code.place(done);
}

/// Counts the frame by protocol and sender, as the filter has parsed them.
fn count_peer(code: &mut Assembly, peers: &Peers) {
    /// Stack offset of a new row's frames and bytes.
    const ROW: i16 = -88;
    /// Stack offset of the frame's ports in the parsed fields. The program zeroes them: rows ignore ports.
    const PORTS: i16 = SEEN_AT + 16;
    let [first, done] = [(); 2].map(|()| code.label());
    measure(code);
    code.extend([put32(10, PORTS, 0), put32(10, PORTS + 4, 0)]);
    code.extend(map(1, peers));
    code.extend([copy(2, 10), add(2, SEEN_AT.into()), call(MAP_LOOKUP_ELEM)]);
    code.jump(first, if_equal(0, 0, 0));
    code.extend([set(1, 1), add_atomic64(0, 1, 0), add_atomic64(0, LENGTH, 8)]);
    code.jump(done, jump(0));
    code.place(first);
    code.extend([put64(10, ROW, 1), store64(10, LENGTH, ROW + 8)]);
    code.extend(map(1, peers));
    code.extend([
        copy(2, 10),
        add(2, SEEN_AT.into()),
        copy(3, 10),
        add(3, ROW.into()),
        set(4, 0),
        call(MAP_UPDATE_ELEM),
    ]);
    code.place(done);
}

/// Restores the VLAN tag that the driver keeps beside the frame. `function` is the number of the kernel's
/// `bpf_xdp_metadata_rx_vlan_tag`.
fn restore_tag(code: &mut Assembly, function: i32, lost: Label) {
    /// Stack offset of the tag: its protocol, in network order, then its content, in host order.
    const TAG: i16 = -16;
    let untagged = code.label();
    code.extend([
        put64(10, TAG, 0),
        copy(1, FRAME),
        copy(2, 10),
        add(2, TAG.into()),
        copy(3, 10),
        add(3, (TAG + 2).into()),
        call_kernel(function),
    ]);
    code.jump(untagged, if_not_equal32(0, 0, 0));
    code.extend([copy(1, FRAME), set(2, -4), call(XDP_ADJUST_HEAD)]);
    code.jump(lost, if_not_equal(0, 0, 0)); // no room
    code.extend([load32(1, FRAME, DATA), load32(2, FRAME, DATA_END), copy(3, 1), add(3, 16)]);
    code.jump(lost, if_greater(3, 2, 0));
    code.extend([
        load64(2, 1, 4),
        store64(1, 2, 0),
        load32(2, 1, 12),
        store32(1, 2, 8),
        load16(2, 10, TAG),
        store16(1, 2, 12),
        load16(2, 10, TAG + 2),
        from_network(2, 16), // host to network order
        store16(1, 2, 14),
    ]);
    code.place(untagged);
}

/// Assembles the device's program, or with `queue_program` a queue program. With the number of the kernel's
/// function in `tags`, the program restores VLAN tags.
pub(super) fn assemble(
    maps: &Maps,
    queue_program: Option<&QueueProgram<'_>>,
    tags: Option<i32>,
) -> Vec<u64> {
    let mut code = Assembly::default();
    let [passed, plain, unheaded, lost] = [(); 4].map(|()| code.label());
    code.extend([copy(FRAME, 1), load32(QUEUE, 1, RX_QUEUE_INDEX), store32(10, QUEUE, KEY)]);
    code.extend(map(1, &maps.sockets));
    code.extend([
        copy(2, QUEUE),
        set(3, PASS), // verdict if the queue has no socket
        call(REDIRECT_MAP),
    ]);
    code.jump(passed, if_not_equal(0, REDIRECT, 0));
    if let Some(function) = tags {
        restore_tag(&mut code, function, lost);
    }

    look_up(&mut code, &maps.queues, plain);
    code.push(load32(SETTINGS, 0, 0));
    match queue_program {
        None => {
            let unfiltered = code.label();
            code.push(if_any_bit32(SETTINGS, HAS_QUEUE_PROGRAM as i32, 1));
            code.jump(unfiltered, jump(0));
            code.push(copy(1, FRAME));
            code.extend(map(2, &maps.programs));
            code.extend([copy(3, QUEUE), call(TAIL_CALL)]);
            // The tail call returns only if the queue program is missing.
            count(&mut code, maps, Count::Filtered);
            code.extend([set(0, DROP), exit()]);
            code.place(unfiltered);
        }
        Some(QueueProgram { filter, peers }) => {
            let allowed = code.label();
            code.extend(extended(filter));
            code.jump(allowed, if_not_equal(0, 0, 0));
            count(&mut code, maps, Count::Filtered);
            code.extend([set(0, DROP), exit()]);
            code.place(allowed);
            if let Some(peers) = peers {
                count_peer(&mut code, peers);
            }
        }
    }
    code.push(and32(SETTINGS, HEADER_LENGTH as i32));
    code.jump(unheaded, if_equal(SETTINGS, 0, 0));
    code.extend([copy(1, FRAME), set(2, 0), subtract_register(2, SETTINGS), call(XDP_ADJUST_HEAD)]);
    code.jump(lost, if_not_equal(0, 0, 0)); // no room
    let whole = features::HEADER_LENGTH as i32;
    code.extend([load32(1, FRAME, DATA), load32(2, FRAME, DATA_END), copy(3, 1), add(3, whole)]);
    code.jump(lost, if_greater(3, 2, 0));
    code.extend([
        put64(1, 0, 0),
        if_equal(SETTINGS, whole, 2),
        put16(1, 8, 0), // the legacy header
        jump(1),
        put32(1, 8, 1 << 16), // in one buffer
    ]);
    code.place(unheaded);
    code.extend([set(0, REDIRECT), exit()]);

    // A queue beyond the map has no settings.
    code.place(plain);
    code.extend([set(0, REDIRECT), exit()]);

    code.place(passed);
    count(&mut code, maps, Count::Passed);
    code.extend([set(0, PASS), exit()]);

    code.place(lost);
    code.extend([set(0, DROP), exit()]);
    code.finish()
}
