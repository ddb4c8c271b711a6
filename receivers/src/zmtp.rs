//! ZeroMQ's wire protocol, as far as a REQ socket needs it to talk to a REP socket: ZMTP 3.0 without security,
//! <https://rfc.zeromq.org/spec/23/>.
//!
//! Each side sends a greeting of 64 bytes and a command READY. Then requests and answers alternate. Both are messages of two frames, of
//! which the first is empty.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The longest frame that is read. An answer is empty or an error message.
const MAX_FRAME_BYTES: u64 = 1 << 20;
/// The most frames that are read for one message.
const MAX_FRAMES: usize = 16;

/// Whether another frame of the same message follows.
const MORE: u8 = 1;
/// Whether the length has eight bytes, and not one.
const LONG: u8 = 2;
/// Whether it is a command, not a part of a message.
const COMMAND: u8 = 4;

/// The greeting: version 3.0, without security.
fn greeting() -> [u8; 64] {
    let mut greeting = [0; 64];
    (greeting[0], greeting[9], greeting[10]) = (0xff, 0x7f, 3);
    greeting[12..16].copy_from_slice(b"NULL");
    greeting
}

fn frame(flags: u8, body: &[u8]) -> Vec<u8> {
    let head = match u8::try_from(body.len()) {
        Ok(len) => vec![flags, len],
        Err(_) => [&[flags | LONG][..], &(body.len() as u64).to_be_bytes()].concat(),
    };
    [&head, body].concat()
}

/// The command that names the type of this socket.
fn ready() -> Vec<u8> {
    let property = |name: &[u8], value: &[u8]| {
        [&[name.len() as u8][..], name, &(value.len() as u32).to_be_bytes(), value].concat()
    };
    let properties = [property(b"Socket-Type", b"REQ"), property(b"Identity", b"")].concat();
    frame(COMMAND, &[&b"\x05READY"[..], &properties].concat())
}

fn odd(message: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, message.into())
}

async fn read_frame(from: &mut (impl AsyncRead + Unpin)) -> io::Result<(u8, Vec<u8>)> {
    let flags = from.read_u8().await?;
    let len = match flags & LONG {
        0 => u64::from(from.read_u8().await?),
        _ => from.read_u64().await?,
    };
    if flags & !(MORE | LONG | COMMAND) != 0 || len > MAX_FRAME_BYTES {
        return Err(odd(format!("a frame of {len} bytes with the flags {flags:#x}")));
    }
    let mut body = vec![0; len as usize];
    from.read_exact(&mut body).await?;
    Ok((flags, body))
}

/// Reads the other side's greeting and its READY.
///
/// # Errors
///
/// `InvalidData` if it is not a REP socket without security; those of the connection.
pub(crate) async fn read_opening(from: &mut (impl AsyncRead + Unpin)) -> io::Result<()> {
    let mut theirs = [0; 64];
    from.read_exact(&mut theirs).await?;
    let mechanism = theirs[12..32].split(|byte| *byte == 0).next().unwrap_or_default();
    if theirs[0] != 0xff || theirs[9] != 0x7f || theirs[10] < 3 || mechanism != b"NULL" {
        return Err(odd("it is not ZeroMQ of version 3 or later without security"));
    }
    let (flags, body) = read_frame(from).await?;
    let Some(mut rest) = body.strip_prefix(b"\x05READY").filter(|_| flags & COMMAND != 0) else {
        return Err(odd("it does not say that it is ready"));
    };
    let mut kind = None;
    while let Some((&len, after)) = rest.split_first() {
        let property = after.split_at_checked(len.into()).and_then(|(name, after)| {
            let (len, after) = after.split_first_chunk()?;
            let (value, after) = after.split_at_checked(u32::from_be_bytes(*len) as usize)?;
            Some((name, value, after))
        });
        let Some((name, value, after)) = property else { return Err(odd("a property is cut off")) };
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            kind = Some(value);
        }
        rest = after;
    }
    match kind {
        Some(b"REP") => Ok(()),
        _ => Err(odd("it does not answer requests: no socket of the kind REP")),
    }
}

/// Reads an answer.
///
/// # Errors
///
/// `InvalidData` if it is not an answer; those of the connection.
pub(crate) async fn read_answer(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Vec<u8>> {
    let mut frames = Vec::new();
    for _ in 0..MAX_FRAMES {
        let (flags, body) = read_frame(from).await?;
        if flags & COMMAND != 0 {
            continue;
        }
        frames.push(body);
        if flags & MORE == 0 {
            break;
        }
    }
    match <[Vec<u8>; 2]>::try_from(frames) {
        Ok([empty, answer]) if empty.is_empty() => Ok(answer),
        _ => Err(odd("an answer that is not two frames, of which the first is empty")),
    }
}

/// A connection to a peer that answers requests.
#[derive(Debug)]
pub(crate) struct Requests<S> {
    stream: S,
    /// Whether a request has no answer yet.
    is_asked: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Requests<S> {
    /// Exchanges greetings.
    ///
    /// # Errors
    ///
    /// Those of [`read_opening`].
    pub(crate) async fn open(mut stream: S) -> io::Result<Self> {
        stream.write_all(&[&greeting()[..], &ready()].concat()).await?;
        read_opening(&mut stream).await?;
        Ok(Self { stream, is_asked: false })
    }

    /// Sends a request, and waits for the answer. If an earlier future was dropped before its answer came, that answer is read first.
    ///
    /// # Errors
    ///
    /// Those of [`read_answer`].
    pub(crate) async fn ask(&mut self, request: &[u8]) -> io::Result<Vec<u8>> {
        self.say(request).await?;
        let answer = read_answer(&mut self.stream).await?;
        self.is_asked = false;
        Ok(answer)
    }

    /// Sends a request without waiting for its answer.
    ///
    /// # Errors
    ///
    /// As [`ask`](Self::ask).
    pub(crate) async fn say(&mut self, request: &[u8]) -> io::Result<()> {
        if self.is_asked {
            read_answer(&mut self.stream).await?;
        }
        self.is_asked = true;
        let message = [frame(MORE, b""), frame(0, request)].concat();
        self.stream.write_all(&message).await?;
        self.stream.flush().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::executor::block_on;
    use proptest::prelude::*;

    /// The opening of the other side.
    fn opening(kind: &[u8]) -> Vec<u8> {
        let len = (kind.len() as u32).to_be_bytes();
        let body = [&b"\x05READY\x0bSocket-Type"[..], &len, kind].concat();
        [&greeting()[..], &frame(COMMAND, &body)].concat()
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(body in proptest::collection::vec(any::<u8>(), 0..700)) {
            let bytes = [frame(MORE, b""), frame(0, &body)].concat();
            prop_assert_eq!(block_on(read_answer(&mut &*bytes)).unwrap(), body);
            for end in 0..bytes.len() {
                prop_assert!(block_on(read_answer(&mut &bytes[..end])).is_err());
            }
        }

        #[test]
        fn any_bytes_are_an_opening_and_an_answer_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let begun = [opening(b"REP"), bytes.clone()].concat();
            let mut rest = &*begun;
            prop_assert!(block_on(read_opening(&mut rest)).is_ok() && rest == bytes);
            drop(block_on(read_answer(&mut &*bytes)));
            drop(block_on(read_opening(&mut &[&greeting()[..], &bytes].concat()[..])));
        }
    }

    #[test]
    fn a_frame_that_nobody_could_hold_is_refused_before_there_is_memory_for_it() {
        let head = [&[LONG][..], &u64::MAX.to_be_bytes()].concat();
        let error = block_on(read_answer(&mut &*head)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn another_kind_of_socket_is_refused() {
        let error = block_on(read_opening(&mut &*opening(b"SUB"))).unwrap_err();
        assert!(error.to_string().contains("REP"), "{error}");
        assert!(block_on(read_opening(&mut &[7; 200][..])).is_err());
    }
}
