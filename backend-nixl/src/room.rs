//! Checks that the limits of this process leave room for an agent. NIXL and UCX end the process if they do not.

use rustix::process::{Resource, getrlimit};

use crate::error::NixlError;

/// The descriptors that an agent opens before it has connected to anybody: 17 on a host without InfiniBand.
const DESCRIPTORS: u64 = 32;

/// The addresses that an agent maps, with its libraries and their threads' stacks: up to 330 MB.
const ADDRESSES: u64 = 384 << 20;

/// # Errors
///
/// The limit to raise.
pub(crate) fn check() -> Result<(), NixlError> {
    let entries = |folder: &str| std::fs::read_dir(folder).map(|entries| entries.count() as u64);
    if let (Some(limit), Ok(open)) = (getrlimit(Resource::Nofile).current, entries("/proc/self/fd"))
        && let Err(left) = is_enough(limit, open, DESCRIPTORS)
    {
        return Err(NixlError::Descriptors { left, wanted: DESCRIPTORS });
    }
    if let (Some(limit), Some(mapped)) = (getrlimit(Resource::As).current, mapped())
        && let Err(left) = is_enough(limit, mapped, ADDRESSES)
    {
        return Err(NixlError::Addresses { left, wanted: ADDRESSES });
    }
    Ok(())
}

/// Checks a limit. The error is what is left.
fn is_enough(limit: u64, used: u64, wanted: u64) -> Result<(), u64> {
    let left = limit.saturating_sub(used);
    if left < wanted { Err(left) } else { Ok(()) }
}

/// The bytes of address space that this process uses.
fn mapped() -> Option<u64> {
    let pages = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = pages.split_ascii_whitespace().next()?.parse().ok()?;
    pages.checked_mul(rustix::param::page_size() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_below_a_limit_is_enough_or_is_said() {
        assert_eq!(is_enough(64, 20, 32), Ok(()));
        assert_eq!(is_enough(24, 12, 32), Err(12));
        assert_eq!(is_enough(24, 30, 32), Err(0));
        assert!(mapped().is_some_and(|bytes| bytes > 1 << 20));
    }
}
