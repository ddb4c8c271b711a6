//! The keys that servers ask for.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine_core::{Error, ErrorKind, Result};
use hyper::Method;
use hyper::header::HeaderValue;

/// The longest key.
const MAX_BYTES: u64 = 4096;

/// The key that a server asks for. It is never shown: not by `Debug`, nor in an error.
///
/// # Examples
///
/// ```
/// use receivers::ApiKey;
///
/// let key: ApiKey = "s3cret".parse()?;
/// assert_eq!(format!("{key:?}"), "ApiKey(…)");
/// assert!("two words".parse::<ApiKey>().is_err());
/// # Ok::<(), engine_core::Error>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct ApiKey(Arc<str>);

impl fmt::Debug for ApiKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApiKey(…)")
    }
}

impl std::str::FromStr for ApiKey {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let is_key = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
        is_key.then(|| Self(text.into())).ok_or_else(|| {
            let message = "a key is a word of visible ASCII characters";
            Error::new(ErrorKind::Config, "reading a key", message)
        })
    }
}

impl ApiKey {
    /// Reads the key in a file, with or without white space around it.
    ///
    /// # Errors
    ///
    /// `Config`, with the file's name, if the file cannot be read or has no key.
    pub fn read(file: &Path) -> Result<Self> {
        let refuse = |problem: String| {
            let message = format!("{}: {problem}", file.display());
            Error::new(ErrorKind::Config, "reading a key", message)
        };
        let len = std::fs::metadata(file).map_err(|error| refuse(error.to_string()))?.len();
        if len > MAX_BYTES {
            return Err(refuse(format!("{len} bytes are no key")));
        }
        let text = std::fs::read_to_string(file).map_err(|error| refuse(error.to_string()))?;
        text.trim().parse().map_err(|error: Error| refuse(error.report().message.clone()))
    }

    /// The value of the `Authorization` header.
    pub(crate) fn header(&self) -> Option<HeaderValue> {
        let mut value = HeaderValue::try_from(format!("Bearer {}", self.0)).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

/// The keys of a server: one for all requests, and one for requests that change it, if that is another.
#[derive(Clone, Debug, Default)]
pub(crate) struct Keys {
    pub(crate) usual: Option<ApiKey>,
    pub(crate) admin: Option<ApiKey>,
}

impl Keys {
    /// Reads the keys in files.
    ///
    /// # Errors
    ///
    /// As [`ApiKey::read`].
    pub(crate) fn read(usual: Option<PathBuf>, admin: Option<PathBuf>) -> Result<Self> {
        let read = |file: Option<PathBuf>| file.map(|file| ApiKey::read(&file)).transpose();
        Ok(Self { usual: read(usual)?, admin: read(admin)? })
    }

    /// The key for a request.
    pub(crate) fn of(&self, method: &Method) -> Option<&ApiKey> {
        let admin = self.admin.as_ref().filter(|_| method != Method::GET);
        admin.or(self.usual.as_ref())
    }

    /// Removes the keys from a server's words, in case it repeats them.
    pub(crate) fn hide(&self, mut words: String) -> String {
        for key in [&self.usual, &self.admin].into_iter().flatten() {
            words = words.replace(&*key.0, "…");
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_key_is_an_error_that_names_it_and_not_what_it_has() {
        let folder = std::env::temp_dir().join(format!("ckpt-keys-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let file = folder.join("key");
        std::fs::write(&file, " s3cret\n").unwrap();
        assert_eq!(ApiKey::read(&file).unwrap(), "s3cret".parse().unwrap());
        for wrong in ["", "\n", "a s3cret", "s3crét"] {
            std::fs::write(&file, wrong).unwrap();
            let error = ApiKey::read(&file).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            let words = error.to_string();
            assert!(words.contains("key: a key is") && !words.contains("s3cr"), "{words}");
        }
        std::fs::write(&file, vec![b'x'; MAX_BYTES as usize + 1]).unwrap();
        assert!(ApiKey::read(&file).unwrap_err().to_string().contains("4097 bytes"));
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(ApiKey::read(&file).unwrap_err().to_string().contains("key: "));
    }
}
