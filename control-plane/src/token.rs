//! The shared secret of a group.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use sha2::{Digest as _, Sha256};

use engine_core::{Error, ErrorKind, Result};

/// The secret that every rank of a group knows.
///
/// It never travels. Both sides of a connection prove that they know it. What they say afterwards is encrypted with
/// keys of that connection alone, so a recording stays secret even if the token becomes known later.
#[derive(Clone)]
pub struct Token(Arc<[u8]>);

impl Token {
    /// The shortest secret that is accepted, in bytes.
    pub const MIN_BYTES: usize = 16;
    /// The longest secret that is accepted, in bytes.
    pub const MAX_BYTES: usize = 4096;

    /// A secret from the caller.
    ///
    /// # Errors
    ///
    /// `Config` when it is shorter than [`MIN_BYTES`](Self::MIN_BYTES) or longer than
    /// [`MAX_BYTES`](Self::MAX_BYTES).
    pub fn new(secret: &[u8]) -> Result<Self> {
        if !(Self::MIN_BYTES..=Self::MAX_BYTES).contains(&secret.len()) {
            return Err(Error::new(
                ErrorKind::Config,
                "reading the token",
                format!(
                    "it has {} bytes; between {} and {} are accepted",
                    secret.len(),
                    Self::MIN_BYTES,
                    Self::MAX_BYTES
                ),
            ));
        }
        Ok(Self(secret.into()))
    }

    /// A new secret: 256 random bits of the operating system, as 64 hexadecimal digits.
    ///
    /// # Errors
    ///
    /// `Io` when the operating system has no randomness.
    pub fn generate() -> Result<Self> {
        let hex: String = random()?.iter().map(|byte| format!("{byte:02x}")).collect();
        Self::new(hex.as_bytes())
    }

    /// Reads the secret from a file, without white space at its end.
    ///
    /// # Errors
    ///
    /// `Config` when others than its owner have any access to the file, or when the secret has a length that
    /// [`new`](Self::new) refuses; `Io` when the file cannot be read.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let operation = format!("reading the token file {}", path.display());
        let failed = |error| Error::io(operation.clone(), error);
        let file = File::open(path).map_err(failed)?;
        // The mode of the open file, not of the path: another file may be there by now.
        let mode = file.metadata().map_err(failed)?.mode();
        if mode & 0o077 != 0 {
            return Err(Error::new(
                ErrorKind::Config,
                operation,
                format!(
                    "others than its owner can access it (mode {:03o}); run `chmod 600 {}`",
                    mode & 0o777,
                    path.display()
                ),
            ));
        }
        let mut secret = Vec::new();
        let limit = Self::MAX_BYTES as u64 + 2;
        file.take(limit).read_to_end(&mut secret).map_err(failed)?;
        Self::new(secret.trim_ascii_end())
    }

    /// Generates a secret and writes it to a new file that only its owner can read.
    ///
    /// # Errors
    ///
    /// `Io` when the file exists already or cannot be written.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let failed =
            |error| Error::io(format!("creating the token file {}", path.display()), error);
        let token = Self::generate()?;
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(failed)?;
        file.write_all(&token.0).and_then(|()| file.write_all(b"\n")).map_err(failed)?;
        Ok(token)
    }

    /// The secret itself, to hand it to a process that joins the group. Use the standard input of that process, or a file
    /// that only its owner can read. Never put it on a command line or into a log.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// The key that both sides of a connection mix into its handshake.
    pub(super) fn key(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(b"checkpoint-engine: the pre-shared key of its control plane\0");
        hash.update(&self.0);
        hash.finalize().into()
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(secret)")
    }
}

/// 32 random bytes of the operating system.
fn random() -> Result<[u8; 32]> {
    let mut bytes = [0; 32];
    let mut filled = 0;
    while filled < bytes.len() {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::io("asking for randomness", error.into())),
        }
    }
    Ok(bytes)
}
