//! The environment variables with which torchrun describes the group.

use crate::Address;
use engine_core::{Error, ErrorKind, Rank, Result};

/// A process's place in the group, according to torchrun.
///
/// torchrun's own agent listens on `MASTER_PORT` if `TORCHELASTIC_USE_AGENT_STORE` is `True`. The leader then
/// needs another port.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TorchrunEnv {
    /// `RANK`. Rank 0 leads.
    pub rank: Rank,
    /// `WORLD_SIZE`.
    pub world_size: u32,
    /// `MASTER_ADDR` and `MASTER_PORT`.
    pub address: Address,
}

/// Reads torchrun's `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` from the environment;
/// `None` when none of them is set.
///
/// # Errors
///
/// `Config` when only some of them are set (it names the missing ones), one is malformed, or `RANK` is not below
/// `WORLD_SIZE`.
pub fn from_env() -> Result<Option<TorchrunEnv>> {
    from_lookup(|name| std::env::var(name).ok())
}

/// As [`from_env`], but `lookup` gives the variables. An empty variable counts as not set.
///
/// # Errors
///
/// Those of [`from_env`].
pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Option<TorchrunEnv>> {
    const NAMES: [&str; 4] = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"];
    let refuse = |why| Error::new(ErrorKind::Config, "reading torchrun's environment", why);
    let values = NAMES.map(|name| lookup(name).filter(|value| !value.is_empty()));
    let missing: Vec<_> =
        NAMES.iter().zip(&values).filter(|(_, value)| value.is_none()).map(|(n, _)| *n).collect();
    let [Some(rank), Some(world_size), Some(host), Some(port)] = &values else {
        return if missing.len() == NAMES.len() {
            Ok(None)
        } else {
            Err(refuse(format!("{} missing: set all of {}", missing.join(", "), NAMES.join(", "))))
        };
    };
    let number = |name: &str, text: &String| {
        text.parse::<u32>().map_err(|_| refuse(format!("{name} is `{text}`, not a number")))
    };
    let (rank, world_size) = (number("RANK", rank)?, number("WORLD_SIZE", world_size)?);
    if rank >= world_size {
        return Err(refuse(format!("RANK {rank} does not fit WORLD_SIZE {world_size}")));
    }
    let address = if host.contains(':') && !host.starts_with('[') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    };
    let address = address.parse().map_err(|error: Error| {
        refuse("MASTER_ADDR and MASTER_PORT are no address".into()).with_source(error)
    })?;
    Ok(Some(TorchrunEnv { rank: Rank(rank), world_size, address }))
}
