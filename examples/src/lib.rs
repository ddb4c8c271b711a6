//! Runnable examples of the `checkpoint-engine` crate, smallest first: `cargo run -p examples --example
//! in_process`.
