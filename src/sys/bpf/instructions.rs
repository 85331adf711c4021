//! BPF instructions as numbers, in the layout of `struct bpf_insn`
//! (`Documentation/bpf/standardization/instruction-set.rst`). Registers are 0 to 10. A jump's distance is the
//! number of instructions that it skips.

/// Encodes an instruction: opcode, registers, offset, immediate.
pub const fn instruction(code: u8, target: u8, source: u8, offset: i16, immediate: i32) -> u64 {
    code as u64
        | ((target | source << 4) as u64) << 8
        | (offset as u16 as u64) << 16
        | (immediate as u32 as u64) << 32
}

macro_rules! instructions {
    ($($(#[$about:meta])* $name:ident($($argument:ident: $kind:ty),*) = $value:expr;)*) => {
        $(
            $(#[$about])*
            pub const fn $name($($argument: $kind),*) -> u64 {
                $value
            }
        )*
    };
}

instructions! {
    /// target = source
    copy(target: u8, source: u8) = instruction(0xbf, target, source, 0, 0);
    /// target = value
    set(target: u8, value: i32) = instruction(0xb7, target, 0, 0, value);
    /// target += value
    add(target: u8, value: i32) = instruction(0x07, target, 0, 0, value);
    /// target += source
    add_register(target: u8, source: u8) = instruction(0x0f, target, source, 0, 0);
    /// target -= source
    subtract_register(target: u8, source: u8) = instruction(0x1f, target, source, 0, 0);
    /// target = value, of 32 bits
    set32(target: u8, value: i32) = instruction(0xb4, target, 0, 0, value);
    /// target += value, of 32 bits
    add32(target: u8, value: i32) = instruction(0x04, target, 0, 0, value);
    /// target += source, of 32 bits
    add_register32(target: u8, source: u8) = instruction(0x0c, target, source, 0, 0);
    /// target &= value, of 32 bits
    and32(target: u8, value: i32) = instruction(0x54, target, 0, 0, value);
    /// target <<= bits, of 32 bits
    shift_left32(target: u8, bits: i32) = instruction(0x64, target, 0, 0, bits);
    /// target >>= bits, of 32 bits
    shift_right32(target: u8, bits: i32) = instruction(0x74, target, 0, 0, bits);
    /// target = the lower `bits` of target, converted between network and host order
    from_network(target: u8, bits: i32) = instruction(0xdc, target, 0, 0, bits);
    /// target = *(u8 *)(source + offset)
    load8(target: u8, source: u8, offset: i16) = instruction(0x71, target, source, offset, 0);
    /// target = *(u16 *)(source + offset)
    load16(target: u8, source: u8, offset: i16) = instruction(0x69, target, source, offset, 0);
    /// target = *(u32 *)(source + offset)
    load32(target: u8, source: u8, offset: i16) = instruction(0x61, target, source, offset, 0);
    /// target = *(u64 *)(source + offset)
    load64(target: u8, source: u8, offset: i16) = instruction(0x79, target, source, offset, 0);
    /// *(u16 *)(target + offset) = source
    store16(target: u8, source: u8, offset: i16) = instruction(0x6b, target, source, offset, 0);
    /// *(u32 *)(target + offset) = source
    store32(target: u8, source: u8, offset: i16) = instruction(0x63, target, source, offset, 0);
    /// *(u64 *)(target + offset) = source
    store64(target: u8, source: u8, offset: i16) = instruction(0x7b, target, source, offset, 0);
    /// *(u64 *)(target + offset) += source, atomically
    add_atomic64(target: u8, source: u8, offset: i16) = instruction(0xdb, target, source, offset, 0);
    /// *(u16 *)(target + offset) = value
    put16(target: u8, offset: i16, value: i32) = instruction(0x6a, target, 0, offset, value);
    /// *(u32 *)(target + offset) = value
    put32(target: u8, offset: i16, value: i32) = instruction(0x62, target, 0, offset, value);
    /// *(u64 *)(target + offset) = value
    put64(target: u8, offset: i16, value: i32) = instruction(0x7a, target, 0, offset, value);
    /// Calls a helper. Arguments are in registers 1 to 5, which the call overwrites; the result is in 0.
    call(helper: i32) = instruction(0x85, 0, 0, 0, helper);
    /// Calls a kernel function by its BTF number. Registers as for [`call`].
    call_kernel(function: i32) = instruction(0x85, 0, 2, 0, function);
    /// Jumps unconditionally.
    jump(skip: i16) = instruction(0x05, 0, 0, skip, 0);
    /// Jumps if register == value
    if_equal(register: u8, value: i32, skip: i16) = instruction(0x15, register, 0, skip, value);
    /// Jumps if register != value
    if_not_equal(register: u8, value: i32, skip: i16) = instruction(0x55, register, 0, skip, value);
    /// Jumps if register > than, which is a register too
    if_greater(register: u8, than: u8, skip: i16) = instruction(0x2d, register, than, skip, 0);
    /// Jumps if register == value, of 32 bits
    if_equal32(register: u8, value: i32, skip: i16) = instruction(0x16, register, 0, skip, value);
    /// Jumps if register != value, of 32 bits
    if_not_equal32(register: u8, value: i32, skip: i16) =
        instruction(0x56, register, 0, skip, value);
    /// Jumps if register >= value, of 32 bits, unsigned
    if_at_least32(register: u8, value: i32, skip: i16) =
        instruction(0x36, register, 0, skip, value);
    /// Jumps if register & value, of 32 bits
    if_any_bit32(register: u8, value: i32, skip: i16) = instruction(0x46, register, 0, skip, value);
    /// Ends the program with the verdict in register 0.
    exit() = instruction(0x95, 0, 0, 0, 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instruction_has_the_kernels_layout() {
        // r2 += -4, as clang encodes it.
        assert_eq!(add(2, -4).to_le_bytes(), [7, 2, 0, 0, 0xfc, 0xff, 0xff, 0xff]);
        // *(u32 *)(r10 - 4) = r6
        assert_eq!(store32(10, 6, -4).to_le_bytes(), [0x63, 0x6a, 0xfc, 0xff, 0, 0, 0, 0]);
    }
}
