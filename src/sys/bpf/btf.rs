//! Numbers of kernel functions that a program may call. BTF, the kernel's description of its own types,
//! assigns them (`Documentation/bpf/btf.rst`).

use std::fs;

/// Finds the number of the function `name` in `/sys/kernel/btf/vmlinux`. Returns `None` if the kernel has no
/// such function, or no BTF. The file has some megabytes: call this once, before the sandbox forbids opening
/// files.
pub fn function(name: &str) -> Option<i32> {
    find_function(&fs::read("/sys/kernel/btf/vmlinux").ok()?, name)
}

/// Finds the number of the function `name` in BTF data.
fn find_function(btf: &[u8], name: &str) -> Option<i32> {
    const MAGIC: u16 = 0xeb9f;
    /// `BTF_KIND_FUNC`
    const FUNCTION: u32 = 12;
    let word = |at: usize| Some(u32::from_ne_bytes(*btf.get(at..)?.first_chunk()?));
    if u16::from_ne_bytes(*btf.first_chunk()?) != MAGIC {
        return None;
    }
    // struct btf_header: its own length, then the offsets and lengths of the two sections behind it.
    let header = word(4)? as usize;
    let types = header.checked_add(word(8)? as usize)?;
    let end = types.checked_add(word(12)? as usize)?;
    let strings = btf.get(header.checked_add(word(16)? as usize)?..)?;
    let is_name = |offset: u32| {
        let text =
            strings.get(offset as usize..).and_then(|text| text.strip_prefix(name.as_bytes()));
        text.is_some_and(|rest| rest.first() == Some(&0))
    };
    let (mut at, mut number) = (types, 1);
    while at < end {
        // struct btf_type: name, kind and number of entries that follow, size or type.
        let (name, info) = (word(at)?, word(at + 4)?);
        let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
        if kind == FUNCTION && is_name(name) {
            return Some(number);
        }
        at += 12
            + match kind {
                1 | 14 | 17 => 4,              // integer, variable, tag of a declaration
                3 => 12,                       // array
                4 | 5 | 15 | 19 => 12 * count, // structure, union, section, enumeration of 64 bits
                6 | 13 => 8 * count,           // enumeration, arguments
                _ => 0,
            };
        number += 1;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns BTF with a structure of two members, an array, and the function `xyz`.
    fn sample() -> Vec<u8> {
        let header = [0x0001_eb9f_u32, 24, 0, 12 + 24 + 24 + 12, 72, 10];
        let structure = [1, 4 << 24 | 2, 8, 0, 0, 0, 0, 0, 0];
        let array = [0, 3 << 24, 0, 1, 1, 2];
        let function = [5, 12 << 24, 1];
        let words = header.into_iter().chain(structure).chain(array).chain(function);
        words.flat_map(u32::to_ne_bytes).chain(*b"\0abc\0xyz\0\0").collect()
    }

    #[test]
    fn functions_are_found_behind_types_of_any_length() {
        let btf = sample();
        assert_eq!(find_function(&btf, "xyz"), Some(3));
        assert_eq!(find_function(&btf, "xy"), None, "the start of a name");
        assert_eq!(find_function(&btf, "abc"), None, "a structure");
        (0..btf.len() - 10)
            .for_each(|length| assert_eq!(find_function(&btf[..length], "xyz"), None));
    }
}
