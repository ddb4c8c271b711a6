//! A program that was built without devices.

use crate::bench::quant::{QuantLine, QuantOptions};
use checkpoint_engine::{DeviceChoice, Error, ErrorKind, Install, Result, Weight};

fn refuse(device: &DeviceChoice) -> Error {
    let message = format!("`{device}`: this program was built without it: --features cuda");
    Error::new(ErrorKind::Config, "opening a device", message)
}

pub(super) fn count(device: &DeviceChoice) -> Result<u32> {
    Err(refuse(device))
}

pub(super) fn destination(device: &DeviceChoice, _: u64) -> Result<Box<dyn Install>> {
    Err(refuse(device))
}

pub(super) fn copy_gb_per_s(device: &DeviceChoice, _: u64) -> Result<f64> {
    Err(refuse(device))
}

pub(super) fn quantize_rate(options: &QuantOptions) -> Result<QuantLine> {
    Err(refuse(&options.device))
}

pub(super) fn describe() -> Vec<String> {
    vec!["cuda: this program was built without it: --features cuda".into()]
}

/// A model on a device, of which there is none.
#[derive(Debug)]
pub enum DeviceModel {}

impl DeviceModel {
    pub(crate) fn new(device: &DeviceChoice, _: super::HostWeights<'_>) -> Result<Self> {
        Err(refuse(device))
    }

    pub(crate) fn refill(&mut self, _: super::HostWeights<'_>) -> Result<()> {
        match *self {}
    }

    pub(crate) fn weights(&self) -> Vec<Result<Weight>> {
        match *self {}
    }
}
