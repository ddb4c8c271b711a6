//! A checkpoint engine over NIXL.

mod agent;
mod arena;
mod error;
mod ffi;
mod sys;
