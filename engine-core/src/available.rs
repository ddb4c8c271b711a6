//! How much memory this process can take: what the machine has, and what its control groups leave.

use std::path::{Component, Path, PathBuf};

/// Memory that this process can take without swapping and without being killed, in bytes.
///
/// That is the least of the kernel's `MemAvailable` and of what the process's control group and all
/// groups above it leave, whether the memory controller is of version 1 or 2. What a group holds as
/// a cache of files counts as free, as it does in `MemAvailable`.
///
/// `None` where the kernel does not say (not Linux, or no `/proc`).
pub fn available_memory() -> Option<u64> {
    below(Path::new("/"))
}

/// The same, of the system whose files are below `root`.
fn below(root: &Path) -> Option<u64> {
    let meminfo = read(&root.join("proc/meminfo"))?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    let machine = kib.checked_mul(1024)?;
    let groups = groups(root).unwrap_or_default();
    Some(groups.iter().filter_map(Group::left).fold(machine, u64::min))
}

/// A folder of a memory controller.
#[derive(Debug)]
struct Group {
    folder: PathBuf,
    version: Controller,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Controller {
    V1,
    V2,
}

impl Group {
    /// What the group's own limit leaves; `None` without one.
    fn left(&self) -> Option<u64> {
        let (limit, usage, caches) = match self.version {
            Controller::V1 => (
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
                ["total_inactive_file", "total_active_file"],
            ),
            Controller::V2 => ("memory.max", "memory.current", ["inactive_file", "active_file"]),
        };
        let number = |name: &str| read(&self.folder.join(name))?.trim().parse::<u64>().ok();
        // `max` is no number: no limit.
        let limit = number(limit)?;
        let used = number(usage)?;
        let stat = read(&self.folder.join("memory.stat")).unwrap_or_default();
        let cached = stat.lines().filter_map(|line| {
            let (name, bytes) = line.split_once(' ')?;
            caches.contains(&name).then(|| bytes.trim().parse::<u64>().ok())?
        });
        let used = used.saturating_sub(cached.fold(0, u64::saturating_add));
        Some(limit.saturating_sub(used))
    }
}

/// The process's groups that have a memory controller, and all groups above them.
fn groups(root: &Path) -> Option<Vec<Group>> {
    let own = read(&root.join("proc/self/cgroup"))?;
    let mounts = read(&root.join("proc/self/mountinfo"))?;
    let mut groups = Vec::new();
    for line in own.lines() {
        // number:controllers:path, and the path may have colons.
        let mut fields = line.splitn(3, ':');
        let (Some(number), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let version = match controllers {
            "" if number == "0" => Controller::V2,
            list if list.split(',').any(|name| name == "memory") => Controller::V1,
            _ => continue,
        };
        for mount in mounts.lines().filter_map(|line| Mount::parse(line, version)) {
            let inside = below_mount(path, &mount.root);
            let top = root.join(mount.point.strip_prefix("/").unwrap_or(&mount.point));
            let mut folder = top.join(&inside);
            loop {
                groups.push(Group { folder: folder.clone(), version });
                if folder == top || !folder.pop() {
                    break;
                }
            }
        }
    }
    Some(groups)
}

/// A mounted hierarchy of groups: which group is at its top, and where that is.
#[derive(Debug)]
struct Mount {
    root: PathBuf,
    point: PathBuf,
}

impl Mount {
    /// A line of `mountinfo`, if it is a hierarchy with a memory controller of that version.
    fn parse(line: &str, version: Controller) -> Option<Self> {
        let (place, kind) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let (root, point) = (place.next()?, place.next()?);
        let mut kind = kind.split(' ');
        let (name, options) = (kind.next()?, kind.nth(1).unwrap_or(""));
        let is_it = match version {
            Controller::V2 => name == "cgroup2",
            Controller::V1 => {
                name == "cgroup" && options.split(',').any(|option| option == "memory")
            }
        };
        is_it.then(|| Self { root: unescaped(root), point: unescaped(point) })
    }
}

/// The way from the top of a mounted hierarchy to a group.
///
/// In a container the hierarchy may show groups only from its own on, and the path may be that of
/// the host, or lead upwards out of a namespace: then the top is the nearest group that can be seen.
fn below_mount(path: &str, top: &Path) -> PathBuf {
    let path = Path::new(path);
    let inside = path.strip_prefix(top).unwrap_or(Path::new(""));
    let normal = inside.components().all(|part| matches!(part, Component::Normal(_)));
    if normal { inside.to_owned() } else { PathBuf::new() }
}

/// `mountinfo` writes white space and backslashes in octal.
fn unescaped(text: &str) -> PathBuf {
    let mut result = String::new();
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        result.push_str(&rest[..at]);
        let code = rest.get(at + 1..at + 4).and_then(|code| u8::from_str_radix(code, 8).ok());
        let Some(code) = code else {
            result.push('\\');
            rest = &rest[at + 1..];
            continue;
        };
        result.push(char::from(code));
        rest = &rest[at + 4..];
    }
    result.push_str(rest);
    result.into()
}

fn read(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]
mod tests {
    use super::*;

    const V1: &str = "33 24 0:30 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n";
    const V2: &str = "29 23 0:26 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";

    /// A machine with 10 000 KiB and these further files.
    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let meminfo = ("proc/meminfo", "MemTotal: 20000 kB\nMemAvailable:   10000 kB\n");
        for (path, text) in files.iter().chain([&meminfo]) {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        root
    }

    fn available(files: &[(&str, &str)]) -> Option<u64> {
        below(system(files).path())
    }

    #[test]
    fn without_groups_the_machine_decides() {
        assert_eq!(available(&[]), Some(10_240_000));
        assert_eq!(below(Path::new("/nonexistent")), None);
        assert!(available_memory().is_some_and(|bytes| bytes > 0));
    }

    #[test]
    fn the_limit_of_a_version_2_group_counts_at_any_depth() {
        let base = [("proc/self/cgroup", "0::/a/b/c\n"), ("proc/self/mountinfo", V2)];
        for place in ["", "a/", "a/b/", "a/b/c/"] {
            let file = |name: &str| format!("sys/fs/cgroup/{place}{name}");
            let (max, current) = (file("memory.max"), file("memory.current"));
            let files = [base[0], base[1], (&max, "5000\n"), (&current, "3000\n")];
            assert_eq!(available(&files), Some(2000), "{place}");
        }
    }

    #[test]
    fn the_tightest_of_several_limits_counts_and_max_is_none() {
        let files = [
            ("proc/self/cgroup", "0::/a/b\n"),
            ("proc/self/mountinfo", V2),
            ("sys/fs/cgroup/a/memory.max", "9000\n"),
            ("sys/fs/cgroup/a/memory.current", "8500\n"),
            ("sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("sys/fs/cgroup/a/b/memory.current", "1\n"),
            ("sys/fs/cgroup/other/memory.max", "1\n"),
            ("sys/fs/cgroup/other/memory.current", "0\n"),
        ];
        assert_eq!(available(&files), Some(500));
    }

    #[test]
    fn the_limit_of_a_version_1_group_counts_at_any_depth() {
        let base =
            [("proc/self/cgroup", "5:cpu:/\n4:memory:/slurm/job\n"), ("proc/self/mountinfo", V1)];
        for place in ["", "slurm/", "slurm/job/"] {
            let file = |name: &str| format!("sys/fs/cgroup/memory/{place}{name}");
            let (limit, usage) = (file("memory.limit_in_bytes"), file("memory.usage_in_bytes"));
            let files = [base[0], base[1], (&limit, "5000\n"), (&usage, "4000\n")];
            assert_eq!(available(&files), Some(1000), "{place}");
        }
    }

    #[test]
    fn a_cache_of_files_is_free_memory() {
        let files = [
            ("proc/self/cgroup", "0::/a\n"),
            ("proc/self/mountinfo", V2),
            ("sys/fs/cgroup/a/memory.max", "9000\n"),
            ("sys/fs/cgroup/a/memory.current", "9000\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 2000\nactive_file 3000\ninactive_file 4000\n"),
        ];
        assert_eq!(available(&files), Some(7000));
    }

    #[test]
    fn a_container_sees_its_groups_from_its_own_on() {
        let limits =
            [("sys/fs/cgroup/memory.max", "700\n"), ("sys/fs/cgroup/memory.current", "0\n")];
        // The mount's top is the container's group; a namespace that was left shows `..`.
        for (path, top) in [("/docker/id", "/docker/id"), ("/../..", "/"), ("/x", "/docker/id")] {
            let mounts = format!("29 23 0:26 {top} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n");
            let own = format!("0::{path}\n");
            let files = [
                ("proc/self/cgroup", &*own),
                ("proc/self/mountinfo", &*mounts),
                limits[0],
                limits[1],
            ];
            assert_eq!(available(&files), Some(700), "{path}");
        }
    }

    #[test]
    fn a_mount_point_with_a_space_is_found() {
        let files = [
            ("proc/self/cgroup", "0::/\n"),
            ("proc/self/mountinfo", "29 23 0:26 / /my\\040groups rw - cgroup2 cgroup2 rw\n"),
            ("my groups/memory.max", "10\n"),
            ("my groups/memory.current", "3\n"),
        ];
        assert_eq!(available(&files), Some(7));
    }
}
