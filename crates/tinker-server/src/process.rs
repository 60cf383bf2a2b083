//! What the operating system says of this process; `None` where it does not say.

use std::fs;
use std::path::{Path, PathBuf};

/// Memory in use, bytes.
pub(crate) fn memory_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    Some(field(&status, "VmRSS:")? * 1024)
}

/// Memory that this process can still take without pushing anything out: of the machine, and of the group of
/// processes (a container, say) whose limit holds for it.
pub(crate) fn available_memory() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok()?;
    let of_machine = field(&machine, "MemAvailable:")? * 1024;
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let of_groups = group_dirs(&groups).into_iter().filter_map(|(dir, names)| {
        let read = |name: &str| fs::read_to_string(dir.join(name)).ok();
        left_of_group(&read(names[0])?, &read(names[1])?, &read("memory.stat")?)
    });
    Some(of_groups.fold(of_machine, u64::min))
}

/// Files of the limit on a group's memory and of what it uses.
const NAMES_V2: [&str; 2] = ["memory.max", "memory.current"];
const NAMES_V1: [&str; 2] = ["memory.limit_in_bytes", "memory.usage_in_bytes"];

/// Where `/proc/self/cgroup` says that limits on memory may be: those of every group around this one hold, too (of
/// a job or a slice, say). In a container the group is its root.
fn group_dirs(groups: &str) -> Vec<(PathBuf, [&'static str; 2])> {
    let of_line = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let (root, names) = match controllers {
            "" => ("/sys/fs/cgroup", NAMES_V2),
            _ if controllers.split(',').any(|c| c == "memory") => {
                ("/sys/fs/cgroup/memory", NAMES_V1)
            }
            _ => return None,
        };
        let root = Path::new(root);
        let own = root.join(path.trim_start_matches('/'));
        let dirs = own.ancestors().take_while(|dir| dir.starts_with(root));
        Some(dirs.map(|dir| (dir.to_owned(), names)).collect::<Vec<_>>())
    };
    groups.lines().filter_map(of_line).flatten().collect()
}

/// What a group may still take, of the texts of its files; `None` if it has no limit. Pages of files count as
/// used, and are given back when they are needed.
fn left_of_group(limit: &str, usage: &str, stat: &str) -> Option<u64> {
    let limit: u64 = limit.trim().parse().ok()?;
    let usage: u64 = usage.trim().parse().ok()?;
    let pages = |kind: &str| {
        let of_tree = field(stat, &format!("total_{kind}_file "));
        of_tree.or_else(|| field(stat, &format!("{kind}_file ")))
    };
    let files = pages("inactive").unwrap_or(0) + pages("active").unwrap_or(0);
    Some(limit.saturating_sub(usage.saturating_sub(files)))
}

/// Open file descriptors.
pub(crate) fn open_files() -> Option<u64> {
    // The directory's own descriptor is among them.
    let n = fs::read_dir("/proc/self/fd").ok()?.count() as u64;
    Some(n.saturating_sub(1))
}

/// Most file descriptors that may be open at a time.
#[cfg(unix)]
pub(crate) fn max_open_files() -> Option<u64> {
    rustix::process::getrlimit(rustix::process::Resource::Nofile).current
}

/// Other systems have no such limit.
#[cfg(not(unix))]
pub(crate) fn max_open_files() -> Option<u64> {
    None
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
        let text = "VmPeak:\t  9 kB\nVmRSS:\t   1234 kB\nThreads:\t12\n";

        assert_eq!(field(text, "VmRSS:"), Some(1234));
        assert_eq!(field(text, "Threads:"), Some(12));
        assert_eq!(field(text, "VmSwap:"), None);
    }

    #[test]
    fn a_group_has_what_its_limit_leaves_and_gives_pages_of_files_back() {
        let stat = "anon 10\ninactive_file 30\nactive_file 5\n";
        assert_eq!(left_of_group("100\n", "90\n", stat), Some(45));
        assert_eq!(left_of_group("100", "200", ""), Some(0));
        assert_eq!(left_of_group("max\n", "90\n", stat), None);
        let v1 = "inactive_file 1\nactive_file 1\ntotal_inactive_file 15\ntotal_active_file 5\n";
        assert_eq!(left_of_group("100", "90", v1), Some(30));
    }

    #[test]
    fn groups_are_looked_for_where_the_kernel_says() {
        let found = group_dirs("9:name=systemd:/\n4:memory,cpu:/a/b\n3:cpuset:/\n0::/c\n");
        let dirs: Vec<_> = found
            .iter()
            .map(|(dir, _)| dir.display().to_string())
            .collect();
        assert_eq!(
            dirs,
            [
                "/sys/fs/cgroup/memory/a/b",
                "/sys/fs/cgroup/memory/a",
                "/sys/fs/cgroup/memory",
                "/sys/fs/cgroup/c",
                "/sys/fs/cgroup"
            ]
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_process_has_memory_and_files() {
        let open = open_files().unwrap();

        assert!(memory_bytes() > Some(1 << 16));
        assert!(available_memory() > Some(1 << 16));
        assert!(open >= 1 && Some(open) <= max_open_files());
    }
}
