//! The checkpoint engine's contract.
