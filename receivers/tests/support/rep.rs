//! Workers that speak the protocol of Moonshot's checkpoint-engine, each with a socket of ZeroMQ's kind REP of its own.
//!
//! They wait for the trainer's next word without an end, as there.

use futures::future::join_all;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::collectives::rebuilt;
use super::server::{Shared, Wrong};
use super::unpickle::{Said, unpickle};

/// What buckets are counted by, to be wrong at one of them.
pub(crate) const BUCKET: &str = "a bucket";

/// What lies where in the buckets: a name, a type, a shape, and where it begins.
pub(super) type Item = (String, String, Vec<u64>, u64);

async fn read_frame(stream: &mut UnixStream) -> std::io::Result<(u8, Vec<u8>)> {
    let flags = stream.read_u8().await?;
    let len = match flags & 2 {
        0 => u64::from(stream.read_u8().await?),
        _ => stream.read_u64().await?,
    };
    let mut body = vec![0; len as usize];
    stream.read_exact(&mut body).await?;
    Ok((flags, body))
}

/// A request, of two frames.
async fn hear(stream: &mut UnixStream) -> std::io::Result<Said> {
    let (flags, empty) = read_frame(stream).await?;
    assert!(flags == 1 && empty.is_empty(), "a request begins with an empty frame");
    let (flags, body) = read_frame(stream).await?;
    assert_eq!(flags & !2, 0, "and ends with its body");
    Ok(unpickle(&body).expect("a pickle"))
}

async fn answer(stream: &mut UnixStream, words: &str) -> std::io::Result<()> {
    let head = match u8::try_from(words.len()) {
        Ok(len) => vec![0, len],
        Err(_) => [&[2_u8][..], &(words.len() as u64).to_be_bytes()].concat(),
    };
    stream.write_all(&[&[1, 0][..], &head, words.as_bytes()].concat()).await
}

async fn connect(address: &str) -> std::io::Result<UnixStream> {
    let name = address.strip_prefix("ipc://@").expect("an address that is no file");
    let mut stream = UnixStream::connect(format!("\0{name}")).await?;
    let mut greeting = [0; 64];
    (greeting[0], greeting[9], greeting[10], greeting[11]) = (0xff, 0x7f, 3, 1);
    greeting[12..16].copy_from_slice(b"NULL");
    // As the library writes: in pieces.
    for piece in greeting.chunks(11) {
        stream.write_all(piece).await?;
        stream.flush().await?;
    }
    stream.write_all(b"\x04\x26\x05READY\x0bSocket-Type\0\0\0\x03REP\x08Identity\0\0\0\0").await?;
    let mut theirs = [0; 64];
    stream.read_exact(&mut theirs).await?;
    assert_eq!(theirs[..11], [0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0x7f, 3]);
    let (flags, ready) = read_frame(&mut stream).await?;
    assert!(flags == 4 && ready.starts_with(b"\x05READY\x0bSocket-Type\0\0\0\x03REQ"));
    Ok(stream)
}

/// Has all workers take part in an update, as long as it lasts. `load` is told of every bucket by each of them, with the bytes of
/// all buckets. Ends when all have ended, as a server's answer does; one that is not told the address of its GPU fails with
/// what it `lacks`.
pub(super) async fn update(
    shared: &Shared,
    addresses: &Value,
    lacks: impl Fn(&str) -> String,
    load: impl Fn(Vec<Item>, &[u8]) -> Result<(), String>,
) -> Result<(), String> {
    let (lacks, load) = (&lacks, &load);
    let worker = |gpu: &'static str| async move {
        let address = addresses.get(format!("GPU-{gpu}")).and_then(Value::as_str);
        take_part(shared, address.ok_or_else(|| lacks(gpu))?, gpu, load).await
    };
    let ended = join_all(shared.started.workers_gpus().iter().map(|gpu| worker(gpu))).await;
    ended.into_iter().collect()
}

async fn take_part(
    shared: &Shared,
    address: &str,
    gpu: &str,
    load: impl Fn(Vec<Item>, &[u8]) -> Result<(), String>,
) -> Result<(), String> {
    let broken = |error: std::io::Error| error.to_string();
    let mut stream = connect(address).await.map_err(broken)?;
    let Said::Items(handle) = hear(&mut stream).await.map_err(broken)? else {
        return Err("a handle is a tuple".into());
    };
    let [Said::Global(rebuild), Said::Items(place)] = &handle[..] else {
        return Err(format!("another handle: {handle:?}"));
    };
    assert_eq!(rebuild, "torch.multiprocessing.reductions.rebuild_cuda_tensor");
    if let Err(words) = rebuilt(place, gpu) {
        answer(&mut stream, &format!("Traceback\n  of\nRuntimeError: {words}\n"))
            .await
            .map_err(broken)?;
        drop(hear(&mut stream).await);
        return Err(words);
    }
    answer(&mut stream, "").await.map_err(broken)?;
    let mut is_released = false;
    loop {
        match hear(&mut stream).await {
            // The library connects again, and nobody is there: it waits.
            Err(_) => return std::future::pending().await,
            Ok(Said::None) if is_released => {
                // By another way than the server's own answer, and so before or after it.
                tokio::spawn(async move {
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    answer(&mut stream, "").await
                });
                return Ok(());
            }
            Ok(Said::None) => {
                is_released = true;
                answer(&mut stream, "").await.map_err(broken)?;
            }
            Ok(_) if is_released => {
                return Err("Should not receive any payload after released".into());
            }
            Ok(Said::Call(class, words)) => {
                assert_eq!(class, "builtins.RuntimeError");
                return Err(words[0].text().expect("words").to_owned());
            }
            Ok(said) => {
                match shared.wrong_at(BUCKET) {
                    Some(Wrong::Silent) => return std::future::pending().await,
                    Some(Wrong::Dies) => {
                        shared.die();
                        return std::future::pending().await;
                    }
                    Some(Wrong::Refuses(words)) => {
                        answer(&mut stream, &format!("Traceback\nRuntimeError: {words}\n"))
                            .await
                            .map_err(broken)?;
                        continue;
                    }
                    _ => {}
                }
                let words = match bucket(&said).and_then(|items| load(items, &rebuilt(place, gpu)?))
                {
                    Ok(()) => String::new(),
                    Err(words) => {
                        format!("Traceback (most recent call last):\n  …\nRuntimeError: {words}\n")
                    }
                };
                answer(&mut stream, &words).await.map_err(broken)?;
            }
        }
    }
}

fn bucket(said: &Said) -> Result<Vec<Item>, String> {
    let item = |said: &Said| {
        let name = said.get("name").and_then(Said::text)?.to_owned();
        let dtype = said.get("dtype").and_then(Said::text)?.strip_prefix("torch.")?.to_owned();
        let shape = said.get("shape").and_then(Said::items)?.iter().filter_map(Said::int).collect();
        Some((name, dtype, shape, said.get("offset").and_then(Said::int)?))
    };
    let items = said.items().ok_or("Unexpected payload type")?;
    items.iter().map(|said| item(said).ok_or_else(|| format!("{said:?}"))).collect()
}
