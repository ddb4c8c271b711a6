//! The shared secret of a group, and the proofs that a peer knows it.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use hmac::{Hmac, KeyInit, Mac as _};
use rustix::rand::{GetRandomFlags, getrandom};
use sha2::Sha256;

use crate::{Error, ErrorKind, Result};

/// What a peer picked at random for one handshake.
pub(super) type Nonce = [u8; 32];
/// An HMAC-SHA256 over a handshake.
pub(super) type Proof = [u8; 32];

/// The secret that every rank of a group knows.
///
/// It never travels: both sides of a connection prove that they know it. It authenticates the
/// peers; what they say afterwards is neither encrypted nor signed.
#[derive(Clone)]
pub struct Token(Arc<[u8]>);

/// Who proves. A proof made in one direction is worthless in the other.
#[derive(Clone, Copy, Debug)]
pub(super) enum Prover {
    Member,
    Leader,
}

impl Token {
    /// The shortest secret that is accepted, in bytes.
    pub const MIN_BYTES: usize = 16;
    /// The longest secret that is accepted, in bytes.
    pub const MAX_BYTES: usize = 4096;

    /// A secret that the caller brings.
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

    /// Reads the secret from a file; white space at the end of it does not count.
    ///
    /// # Errors
    ///
    /// `Config` when others than its owner can read or write the file, or when its length is not
    /// acceptable; `Io` when it cannot be read.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let operation = format!("reading the token file {}", path.display());
        let failed = |error| Error::io(operation.clone(), error);
        let file = File::open(path).map_err(failed)?;
        // The open file's mode, not the path's: the two may differ by the time it is read.
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

    /// The proof of `prover` for one handshake.
    pub(super) fn prove(&self, prover: Prover, transcript: &[u8]) -> Result<Proof> {
        Ok(self.mac(prover, transcript)?.finalize().into_bytes().into())
    }

    /// Whether `proof` is that of `prover`, compared in constant time.
    pub(super) fn verify(&self, prover: Prover, transcript: &[u8], proof: &Proof) -> Result<bool> {
        Ok(self.mac(prover, transcript)?.verify_slice(proof).is_ok())
    }

    fn mac(&self, prover: Prover, transcript: &[u8]) -> Result<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).map_err(|error| {
            Error::new(ErrorKind::Config, "keying the handshake", error.to_string())
        })?;
        // Both labels have the same length, so that neither can be the other's prefix.
        mac.update(match prover {
            Prover::Member => b"checkpoint-engine control: member",
            Prover::Leader => b"checkpoint-engine control: leader",
        });
        mac.update(transcript);
        Ok(mac)
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(secret)")
    }
}

/// 32 random bytes of the operating system.
pub(super) fn random() -> Result<Nonce> {
    let mut bytes = Nonce::default();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_of_one_side_does_not_serve_the_other() {
        let token = Token::generate().unwrap();
        let proof = token.prove(Prover::Member, b"transcript").unwrap();
        assert!(token.verify(Prover::Member, b"transcript", &proof).unwrap());
        assert!(!token.verify(Prover::Leader, b"transcript", &proof).unwrap());
        assert!(!token.verify(Prover::Member, b"transcripT", &proof).unwrap());
        let other = Token::generate().unwrap();
        assert!(!other.verify(Prover::Member, b"transcript", &proof).unwrap());
    }
}
