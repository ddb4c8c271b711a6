//! The shared secret of a group, and the proof of knowing it.

use std::fmt;
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::{Error, ErrorKind, Result};

/// The secret that all ranks of a group share. It never travels.
#[derive(Clone, PartialEq, Eq)]
pub struct Token(Arc<[u8]>);

/// The shortest secret, in bytes.
const MIN_BYTES: usize = 16;

/// The longest token file, in bytes.
const MAX_FILE_BYTES: u64 = 4096;

impl Token {
    /// A new random secret.
    ///
    /// # Errors
    ///
    /// `Io` if the system has no randomness to give.
    pub fn generate() -> Result<Self> {
        let digits: String = nonce()?.iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self(digits.into_bytes().into()))
    }

    /// Reads the secret from a file: all of it, without surrounding white space.
    ///
    /// # Errors
    ///
    /// `Config` if others than the owner may read the file, or if it is too short; `Io` if it cannot
    /// be read.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let operation = format!("reading the token file {}", path.display());
        let refuse = |message: String| Error::new(ErrorKind::Config, operation.clone(), message);
        let file = std::fs::File::open(path).map_err(|error| Error::io(operation.clone(), error))?;
        let mode = file.metadata().map_err(|error| Error::io(operation.clone(), error))?.mode();
        if mode & 0o077 != 0 {
            return Err(refuse(format!(
                "others can access it (mode {:03o}): run chmod 600 {}",
                mode & 0o777,
                path.display()
            )));
        }
        let mut text = Vec::new();
        let read = file.take(MAX_FILE_BYTES).read_to_end(&mut text);
        read.map_err(|error| Error::io(operation.clone(), error))?;
        let secret = text.trim_ascii();
        if secret.len() < MIN_BYTES {
            return Err(refuse(format!("a token has at least {MIN_BYTES} bytes")));
        }
        Ok(Self(secret.into()))
    }

    /// Writes a new random secret to a new file that only its owner can read.
    ///
    /// # Errors
    ///
    /// `Io` if the file exists or cannot be written.
    pub fn create(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let token = Self::generate()?;
        std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .and_then(|mut file| file.write_all(&token.0))
            .map_err(|error| Error::io(format!("writing the token file {}", path.display()), error))?;
        Ok(token)
    }

    /// The proof of knowing the secret: an HMAC-SHA256 over the side that proves, what the joining
    /// rank said of itself (its nonce included), and the leader's nonce.
    fn mac(&self, side: Side, hello: &[u8], nonce: &Nonce) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).ok()?;
        mac.update(match side {
            Side::Leader => b"checkpoint-engine control leader",
            Side::Member => b"checkpoint-engine control member",
        });
        mac.update(nonce);
        mac.update(hello);
        Some(mac)
    }

    pub(super) fn prove(&self, side: Side, hello: &[u8], nonce: &Nonce) -> Proof {
        let mut proof = [0; 32];
        if let Some(mac) = self.mac(side, hello, nonce) {
            proof.copy_from_slice(&mac.finalize().into_bytes());
        }
        proof
    }

    /// Whether the other side proved that it knows the secret; takes the same time for any proof.
    pub(super) fn accepts(&self, side: Side, hello: &[u8], nonce: &Nonce, proof: &Proof) -> bool {
        self.mac(side, hello, nonce).is_some_and(|mac| mac.verify_slice(proof).is_ok())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(..)")
    }
}

/// Which side proves: a proof of one cannot be reflected as that of the other.
#[derive(Clone, Copy)]
pub(super) enum Side {
    Leader,
    Member,
}

pub(super) type Nonce = [u8; 32];
pub(super) type Proof = [u8; 32];

pub(super) fn nonce() -> Result<Nonce> {
    let mut nonce = [0; 32];
    let mut filled = 0;
    while filled < nonce.len() {
        let flags = rustix::rand::GetRandomFlags::empty();
        filled += rustix::rand::getrandom(&mut nonce[filled..], flags)
            .map_err(|errno| Error::io("getting random bytes", errno.into()))?;
    }
    Ok(nonce)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_created_token_file_can_be_read_by_its_owner_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let token = Token::create(&path).unwrap();
        assert!(Token::read(&path).unwrap() == token);
        assert!(Token::create(&path).is_err(), "an existing token is not replaced");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
        let error = Token::read(&path).unwrap_err();
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }

    #[test]
    fn a_short_token_is_refused_and_none_is_printed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        std::fs::write(&path, "short\n").unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(Token::read(&path).unwrap_err().kind(), ErrorKind::Config);
        assert_eq!(format!("{:?}", Token::generate().unwrap()), "Token(..)");
    }

    #[test]
    fn a_proof_holds_for_its_side_its_hello_and_its_nonce_alone() {
        let token = Token::generate().unwrap();
        let nonce = nonce().unwrap();
        let proof = token.prove(Side::Leader, b"hello", &nonce);
        assert!(token.accepts(Side::Leader, b"hello", &nonce, &proof));
        assert!(!token.accepts(Side::Member, b"hello", &nonce, &proof));
        assert!(!token.accepts(Side::Leader, b"hellp", &nonce, &proof));
        assert!(!token.accepts(Side::Leader, b"hello", &[0; 32], &proof));
        assert!(!Token::generate().unwrap().accepts(Side::Leader, b"hello", &nonce, &proof));
    }
}
