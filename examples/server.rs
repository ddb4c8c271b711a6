//! An inference server that generates while its weights are updated, and its trainer, as two processes of one host.
//!
//! The trainer quantises to FP8; the server makes numbers of the codes when a version is complete, and switches to them.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

// ANCHOR: names
use checkpoint_engine::prelude::*;
use checkpoint_engine::{CachedVersion, Replica, fp8};
// ANCHOR_END: names

const UPDATES: u64 = 3;
const SIDE: usize = 256;
const NAME: &str = "model.layers.0.mlp.up_proj.weight";

#[tokio::main]
async fn main() -> Result<()> {
    match std::env::args().nth(1) {
        None => trainer().await,
        Some(address) => server(&address).await,
    }
}

// ANCHOR: config
fn config() -> Result<CheckpointEngineConfig> {
    let text = "{backend: ipc, trainer_quantize_fp8: true}";
    checkpoint_engine::config::parse(text, checkpoint_engine::config::Format::Yaml)
}
// ANCHOR_END: config

async fn trainer() -> Result<()> {
    let address = format!("unix:@server-{}", std::process::id());
    let token = Token::generate()?;
    // ANCHOR: lead
    let at = ControlConfig::new(address.parse()?, token.clone());
    let control = ControlPlane::lead(at).await?;
    // ANCHOR_END: lead
    let mut server = start(&address, &token).map_err(|error| Error::io("starting", error))?;
    // ANCHOR: form
    let (mut engine, _) =
        form_group(&registry(), config()?, &control).world_size(2).trainer().await?;
    // ANCHOR_END: form
    let mut layer = Arc::new(vec![0.0_f32; SIDE * SIDE]);
    for step in 1..=UPDATES {
        // The engine has given the numbers back when `send_weights` has returned.
        match Arc::get_mut(&mut layer) {
            Some(numbers) => numbers.fill(step as f32),
            None => layer = Arc::new(vec![step as f32; SIDE * SIDE]),
        }
        // ANCHOR: send
        let weights = [Weight::of(NAME, [SIDE, SIDE], layer.clone())];
        engine.send_weights(ensure_async_iterator(weights), Version(step)).await?;
        // ANCHOR_END: send
        tokio::time::sleep(Duration::from_millis(50)).await; // a step of training
    }
    // ANCHOR: end
    engine.finalize().await?;
    control.close().await?;
    // ANCHOR_END: end
    let status = server.wait().map_err(|error| Error::io("waiting for the server", error))?;
    assert!(status.success(), "the server failed: {status}");
    Ok(())
}

fn start(address: &str, token: &Token) -> std::io::Result<std::process::Child> {
    let program = std::env::current_exe()?;
    let mut child = Command::new(program).arg(address).stdin(Stdio::piped()).spawn()?;
    // The secret travels where no other process can read it.
    if let Some(mut input) = child.stdin.take() {
        input.write_all(token.expose())?;
    }
    Ok(child)
}

async fn server(address: &str) -> Result<()> {
    let mut secret = Vec::new();
    let read = std::io::stdin().read_to_end(&mut secret);
    read.map_err(|error| Error::io("reading the secret", error))?;
    // ANCHOR: replica
    let at = ControlConfig::new(address.parse()?, Token::new(&secret)?);
    let replica = Replica::new(registry(), config()?, at);
    let cache = replica.cache();
    // It ends when the trainer leaves in order.
    let updates = tokio::spawn(replica.run(|heard| match heard {
        Ok(version) => eprintln!("version {version} is here"),
        Err(error) => eprintln!("still the version before: {error}"),
    }));
    // ANCHOR_END: replica
    let mut answered_by = None;
    while !updates.is_finished() {
        // ANCHOR: read
        // Whenever a request comes:
        if let Ok(current) = cache.current() {
            let answer = generate(&current)?;
            assert_eq!(answer, current.version().0 as f32, "of a whole version");
            answered_by = Some(current.version());
        }
        // ANCHOR_END: read
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // ANCHOR: ended
    updates.await.expect("what it calls does not panic")?;
    // ANCHOR_END: ended
    let current = cache.current()?;
    assert_eq!((current.version(), generate(&current)?), (Version(UPDATES), UPDATES as f32));
    eprintln!("the last request was answered by {answered_by:?}");
    Ok(())
}

/// Stands for what an inference engine does with a version.
fn generate(current: &CachedVersion) -> Result<f32> {
    let missing = || Error::new(ErrorKind::Weight, "generating", format!("`{NAME}` is missing"));
    // ANCHOR: numbers
    let codes = current.get(NAME).ok_or_else(missing)?;
    let scales = current.get(&format!("{NAME}_scale_inv")).ok_or_else(missing)?;
    let numbers = fp8::dequantize(codes, scales, fp8::Granularity::default())?;
    // ANCHOR_END: numbers
    Ok(numbers.iter().sum::<f32>() / numbers.len() as f32)
}
