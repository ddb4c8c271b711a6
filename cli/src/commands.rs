//! The commands, a file each: their options, and what they do.

pub(crate) mod bench;
pub(crate) mod convert;
pub(crate) mod doctor;
pub(crate) mod plan;
pub(crate) mod relay;
pub(crate) mod rollout;
pub(crate) mod scale;
pub(crate) mod sync;
pub(crate) mod top;
pub(crate) mod trainer;
mod update_line;
pub(crate) mod verify;
pub(crate) mod versions;
