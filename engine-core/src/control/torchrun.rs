//! The environment that `torchrun` and most schedulers give a process.

use std::str::FromStr;

use super::Address;
use crate::{Error, ErrorKind, Rank, Result};

/// A process's place as `torchrun` states it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TorchrunEnv {
    /// `RANK`.
    pub rank: Rank,
    /// `WORLD_SIZE`.
    pub world_size: u32,
    /// `MASTER_ADDR` and `MASTER_PORT`.
    pub address: Address,
}

impl TorchrunEnv {
    /// Reads `RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`; `None` if none is set.
    ///
    /// # Errors
    ///
    /// `Config`, naming the variable, if only some are set or one cannot be read.
    pub fn from_env() -> Result<Option<Self>> {
        Self::from_lookup(|name| std::env::var(name).ok())
    }

    fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        const NAMES: [&str; 4] = ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"];
        if NAMES.iter().all(|name| lookup(name).is_none()) {
            return Ok(None);
        }
        let refuse = |name: &str, message: &str| {
            Error::new(ErrorKind::Config, format!("reading the variable {name}"), message)
        };
        let get = |name| {
            lookup(name).ok_or_else(|| refuse(name, "it is not set, while others of torchrun's are"))
        };
        fn number<T: FromStr>(text: &str) -> Option<T> {
            text.trim().parse().ok()
        }
        let [rank, world, host, port] = [get(NAMES[0])?, get(NAMES[1])?, get(NAMES[2])?, get(NAMES[3])?];
        let rank: u32 = number(&rank).ok_or_else(|| refuse("RANK", "not a number"))?;
        let world_size: u32 =
            number(&world).ok_or_else(|| refuse("WORLD_SIZE", "not a number"))?;
        if rank >= world_size {
            return Err(refuse("RANK", "not below WORLD_SIZE"));
        }
        let port: u16 = number(&port).ok_or_else(|| refuse("MASTER_PORT", "not a port"))?;
        let host = if host.contains(':') { format!("[{host}]") } else { host };
        let address = format!("{host}:{port}").parse()?;
        Ok(Some(Self { rank: Rank(rank), world_size, address }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> Result<Option<TorchrunEnv>> {
        TorchrunEnv::from_lookup(|name| {
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn a_complete_environment_is_a_place_and_an_empty_one_is_none() {
        let env = [("RANK", "1"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "::1"), ("MASTER_PORT", "9")];
        let place = read(&env).unwrap().unwrap();
        assert_eq!((place.rank, place.world_size), (Rank(1), 3));
        assert_eq!(place.address.to_string(), "[::1]:9");
        assert_eq!(read(&[]).unwrap(), None);
    }

    #[test]
    fn a_half_set_environment_names_the_variable_that_is_missing() {
        let error = read(&[("RANK", "1"), ("WORLD_SIZE", "3")]).unwrap_err();
        assert!(error.to_string().contains("MASTER_ADDR"), "{error}");
        let env = [("RANK", "3"), ("WORLD_SIZE", "3"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "9")];
        assert!(read(&env).unwrap_err().to_string().contains("RANK"));
    }
}
