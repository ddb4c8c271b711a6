//! What is there, and whether it works.
use crate::comm;
use crate::error::HcclError;
use crate::ffi;
use std::path::Path;

pub(crate) fn probe(library_dir: Option<&Path>) -> Result<String, HcclError> {
    let api = comm::load(library_dir, std::time::Duration::from_secs(60))?;
    Ok(format!("{} {}", comm::describe(api), ffi::device_count(api)?))
}
