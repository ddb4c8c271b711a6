//! The `ckpt-engine` program.

fn main() {}
