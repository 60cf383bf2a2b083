//! What the operating system says of this process; `None` where it does not say.

use std::fs;

/// Memory in use, bytes.
pub(crate) fn memory_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    Some(field(&status, "VmRSS:")? * 1024)
}

/// Open file descriptors.
pub(crate) fn open_files() -> Option<u64> {
    // The directory's own descriptor is among them.
    let n = fs::read_dir("/proc/self/fd").ok()?.count() as u64;
    Some(n.saturating_sub(1))
}

/// Most file descriptors that may be open at a time.
pub(crate) fn max_open_files() -> Option<u64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    field(&limits, "Max open files")
}

/// The first number after `name`.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_found_by_the_beginning_of_their_line() {
        let text =
            "VmPeak:\t  9 kB\nVmRSS:\t   1234 kB\nMax open files            1024   4096 files";

        assert_eq!(field(text, "VmRSS:"), Some(1234));
        assert_eq!(field(text, "Max open files"), Some(1024));
        assert_eq!(field(text, "VmSwap:"), None);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_process_has_memory_and_files() {
        let open = open_files().unwrap();

        assert!(memory_bytes() > Some(1 << 16));
        assert!(open >= 1 && Some(open) <= max_open_files());
    }
}
