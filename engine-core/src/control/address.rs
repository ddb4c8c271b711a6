//! Where a control plane is reached.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Error, ErrorKind};

/// Where rank 0 listens.
///
/// As text, and so in configurations: `host:port` or `tcp://host:port`; `unix:/path` for a socket
/// file; `unix:@name` for a Linux abstract socket, which leaves no file behind whatever dies.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// A host and a port. Port 0 takes any that is free.
    Tcp(String),
    /// A socket file.
    Unix(PathBuf),
    /// The name of an abstract socket.
    Abstract(String),
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let refuse = |message: &str| {
            Err(Error::new(ErrorKind::Config, format!("reading the address `{text}`"), message))
        };
        if let Some(name) = text.strip_prefix("unix:@") {
            // An abstract address is 108 bytes, of which one is the leading zero.
            return match name.len() {
                0 => refuse("the socket's name is missing"),
                1..=107 => Ok(Self::Abstract(name.to_owned())),
                _ => refuse("the socket's name is longer than 107 bytes"),
            };
        }
        if let Some(path) = text.strip_prefix("unix:") {
            if path.is_empty() {
                return refuse("the socket's path is missing");
            }
            return Ok(Self::Unix(PathBuf::from(path)));
        }
        let host_port = text.strip_prefix("tcp://").unwrap_or(text);
        match host_port.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => {
                Ok(Self::Tcp(host_port.to_owned()))
            }
            _ => refuse("give host:port, unix:/path or unix:@name"),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(host_port) => f.write_str(host_port),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Abstract(name) => write!(f, "unix:@{name}"),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_as_they_are_written() {
        for text in ["localhost:29500", "[::1]:80", "unix:/run/x.sock", "unix:@ckpt-1"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        assert_eq!("tcp://h:1".parse::<Address>().unwrap(), Address::Tcp("h:1".into()));
    }

    #[test]
    fn what_is_no_address_is_refused_with_the_forms_that_are() {
        for text in ["", "host", ":1", "host:port", "host:99999", "unix:", "unix:@"] {
            assert_eq!(text.parse::<Address>().unwrap_err().kind(), ErrorKind::Config, "{text}");
        }
    }
}
