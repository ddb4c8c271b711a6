//! Checkpoint engine between processes of one host.
