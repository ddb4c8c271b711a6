//! Where the leader listens: TCP, a Unix socket file, or a Linux abstract socket.

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::net::{SocketAddr, ToSocketAddrs as _};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::oneshot;

use crate::fork::{Kept, halves};
use crate::wire::Wire;
use engine_core::{Error, ErrorKind, Result};

/// Where the leader of a group listens.
///
/// As text: `host:port` or `tcp://host:port`, `unix:/path`, and `unix:@name` for a Linux abstract
/// socket, which never leaves a file behind.
///
/// # Examples
///
/// ```
/// use control_plane::Address;
///
/// let address: Address = "trainer-0:29500".parse()?;
/// assert_eq!(address.to_string(), "tcp://trainer-0:29500");
/// assert!("unix:@update".parse::<Address>().is_ok());
/// assert!("trainer-0".parse::<Address>().is_err());
/// # Ok::<(), engine_core::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Address {
    /// `host:port`, with brackets around an IPv6 address. With port 0 the system chooses a free port.
    Tcp(String),
    /// A socket of this host.
    Unix(UnixAddress),
}

/// The name of a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum UnixAddress {
    /// A socket file. The leader removes it when it closes, and replaces the file that a dead leader
    /// has left.
    Path(PathBuf),
    /// A name in Linux's abstract namespace, which each network namespace has.
    Abstract(String),
}

impl Address {
    /// The host and port of a TCP address.
    pub fn as_tcp(&self) -> Option<&str> {
        match self {
            Self::Tcp(tcp) => Some(tcp),
            Self::Unix(_) => None,
        }
    }
}

impl FromStr for Address {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = |why: &str| {
            Err(Error::new(ErrorKind::Config, "reading an address", format!("`{text}`: {why}")))
        };
        if let Some(name) = text.strip_prefix("unix:") {
            let unix = match name.strip_prefix('@') {
                Some(name) => UnixAddress::Abstract(name.to_owned()),
                None => UnixAddress::Path(name.into()),
            };
            if name.is_empty() || name == "@" || name.contains('\0') {
                return refuse("a Unix socket needs a name: `unix:/path` or `unix:@name`");
            }
            return Ok(Self::Unix(unix));
        }
        let tcp = text.strip_prefix("tcp://").unwrap_or(text);
        let Some((host, port)) = tcp.rsplit_once(':') else {
            return refuse("expected `host:port`, `unix:/path` or `unix:@name`");
        };
        if host.is_empty() || host.contains('/') {
            return refuse("the host is missing or malformed");
        }
        if host.contains(':') && !(host.starts_with('[') && host.ends_with(']')) {
            return refuse("an IPv6 address stands in brackets: `[::1]:29500`");
        }
        if port.parse::<u16>().is_err() {
            return refuse("the port is not a number from 0 to 65535");
        }
        Ok(Self::Tcp(tcp.to_owned()))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(tcp) => write!(f, "tcp://{tcp}"),
            Self::Unix(UnixAddress::Path(path)) => write!(f, "unix:{}", path.display()),
            Self::Unix(UnixAddress::Abstract(name)) => write!(f, "unix:@{name}"),
        }
    }
}

impl TryFrom<String> for Address {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Address> for String {
    fn from(address: Address) -> Self {
        address.to_string()
    }
}

impl UnixAddress {
    /// The name in tokio's form: an abstract one starts with a zero byte.
    fn as_path(&self) -> PathBuf {
        match self {
            Self::Path(path) => path.clone(),
            Self::Abstract(name) => format!("\0{name}").into(),
        }
    }
}

/// The addresses of a host and port. A name is looked up on a new thread, because tokio panics if it cannot start one
/// for that.
async fn look_up(tcp: &str) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = tcp.parse() {
        return Ok(vec![address]);
    }
    let (tell, told) = oneshot::channel();
    let name = tcp.to_owned();
    let look = move || {
        // After the connect timeout nobody waits for the answer.
        drop(tell.send(name.to_socket_addrs().map(Iterator::collect)));
    };
    std::thread::Builder::new().name("ckpt-resolve".into()).spawn(look)?;
    told.await.map_err(|_| io::Error::other("the look-up of the name panicked"))?
}

/// One attempt to reach the leader.
pub(super) async fn connect(address: &Address) -> io::Result<Wire> {
    match address {
        Address::Tcp(tcp) => tcp_wire(TcpStream::connect(&*look_up(tcp).await?).await?),
        Address::Unix(unix) => Ok(unix_wire(UnixStream::connect(unix.as_path()).await?)),
    }
}

/// A bound socket. Dropping it removes its file.
#[derive(Debug)]
pub(super) struct Listener {
    _kept: Kept,
    socket: Socket,
    _file: Option<SocketFile>,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    pub(super) async fn bind(address: &Address) -> Result<Self> {
        let failed = |error| Error::io(format!("listening on {address}"), error);
        match address {
            Address::Tcp(tcp) => {
                let addresses = look_up(tcp).await.map_err(failed)?;
                let listener = TcpListener::bind(&*addresses).await.map_err(failed)?;
                let _kept = Kept::from_children(&listener);
                Ok(Self { _kept, socket: Socket::Tcp(listener), _file: None })
            }
            Address::Unix(unix) => {
                let path = unix.as_path();
                let listener = match UnixListener::bind(&path) {
                    Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                        if matches!(unix, UnixAddress::Abstract(_)) {
                            return Err(in_use(address));
                        }
                        remove_stale(&path, address).await?;
                        UnixListener::bind(&path)
                    }
                    bound => bound,
                }
                .map_err(failed)?;
                let file = match unix {
                    UnixAddress::Path(path) => Some(SocketFile::new(path).map_err(failed)?),
                    UnixAddress::Abstract(_) => None,
                };
                let _kept = Kept::from_children(&listener);
                Ok(Self { _kept, socket: Socket::Unix(listener), _file: file })
            }
        }
    }

    /// The address to give to members: `asked` with port 0 resolved.
    pub(super) fn address(&self, asked: &Address) -> Result<Address> {
        match (&self.socket, asked) {
            (Socket::Tcp(listener), Address::Tcp(tcp)) => {
                let port = listener
                    .local_addr()
                    .map_err(|error| Error::io("reading the bound address", error))?
                    .port();
                let host = tcp.rsplit_once(':').map_or(tcp.as_str(), |(host, _)| host);
                Ok(Address::Tcp(format!("{host}:{port}")))
            }
            _ => Ok(asked.clone()),
        }
    }

    /// The next connection, and the IP address that it comes from. A Unix socket has none.
    pub(super) async fn accept(&self) -> io::Result<(Wire, Option<IpAddr>)> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, from) = listener.accept().await?;
                Ok((tcp_wire(stream)?, Some(from.ip())))
            }
            Socket::Unix(listener) => Ok((unix_wire(listener.accept().await?.0), None)),
        }
    }
}

fn tcp_wire(stream: TcpStream) -> io::Result<Wire> {
    let kept = Kept::from_children(&stream);
    stream.set_nodelay(true)?;
    let (reader, writer) = halves(kept, stream.into_split());
    Ok(Wire::new(Box::new(reader), Box::new(writer)))
}

fn unix_wire(stream: UnixStream) -> Wire {
    let (reader, writer) = halves(Kept::from_children(&stream), stream.into_split());
    Wire::new(Box::new(reader), Box::new(writer))
}

fn in_use(address: &Address) -> Error {
    Error::new(
        ErrorKind::Io,
        format!("listening on {address}"),
        "another process listens there; choose another name or end that process",
    )
}

/// Removes a socket file on which no process listens. Anything else at that path stays.
async fn remove_stale(path: &Path, address: &Address) -> Result<()> {
    let failed = |error| Error::io(format!("replacing the socket file of {address}"), error);
    if !std::fs::symlink_metadata(path).map_err(failed)?.file_type().is_socket() {
        return Err(Error::new(
            ErrorKind::Config,
            format!("listening on {address}"),
            "a file that is no socket is in the way",
        ));
    }
    match UnixStream::connect(path).await {
        Ok(_) => Err(in_use(address)),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            tracing::debug!(%address, "replacing the socket file of a dead leader");
            std::fs::remove_file(path).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

/// The socket file of a listener. Its inode identifies it, so that the file of a successor is never removed.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        // Absolute, because the working directory may change before the file is removed.
        let path = std::path::absolute(path)?;
        Ok(Self { inode: inode(&path)?, path })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if inode(&self.path).ok() == Some(self.inode)
            && let Err(error) = std::fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "the socket file stays");
        }
    }
}

fn inode(path: &Path) -> io::Result<(u64, u64)> {
    std::fs::symlink_metadata(path).map(|meta| (meta.dev(), meta.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_address_survives_its_text() {
        for text in ["tcp://host:0", "tcp://[::1]:29500", "unix:/tmp/a b", "unix:@name"] {
            let address: Address = text.parse().expect(text);
            assert_eq!(address.to_string(), text);
            let json = serde_json::to_string(&address).expect("serialises");
            assert_eq!(serde_json::from_str::<Address>(&json).expect("deserialises"), address);
        }
        assert_eq!("h:1".parse::<Address>().unwrap(), Address::Tcp("h:1".into()));
    }

    #[test]
    fn malformed_addresses_are_configuration_errors_that_quote_them() {
        for text in ["", "host", "host:", ":1", "host:70000", "::1:80", "unix:", "unix:@", "a/b:1"]
        {
            let error = text.parse::<Address>().expect_err(text);
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains(&format!("`{text}`")), "{error}");
        }
    }
}
