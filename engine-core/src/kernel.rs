//! What an encoding brings for memory that is not the host's.

use crate::Storage;

/// A program for a kind of memory: the same for all weights of an encoding, compiled once.
///
/// What it is written in, and what it has to define, the crate of that kind of memory says.
#[derive(Debug, PartialEq, Eq, Hash)]
pub struct Program {
    name: &'static str,
    source: &'static str,
}

impl Program {
    /// A program of a name, for logs and errors, and its source.
    ///
    /// # Safety
    ///
    /// Whatever bytes of the output it is asked for, it reads nothing but the [source](Kernel::source) and the
    /// [parameters](Kernel::parameters) of the kernels that it is in, and writes nothing but what it is asked for.
    #[allow(unsafe_code, reason = "devices run it on addresses")]
    pub const unsafe fn new(name: &'static str, source: &'static str) -> Self {
        Self { name, source }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Its text.
    pub fn source(&self) -> &'static str {
        self.source
    }
}

/// The work of one weight: a program and what it works on.
#[derive(Clone, Debug)]
pub struct Kernel<'a> {
    /// All weights of a bucket that have the same one are encoded by one launch.
    pub program: &'static Program,
    /// What it reads. Where this is in other memory than the bucket, the CPU encodes the weight.
    pub source: &'a Storage,
    /// What else it is told: types, sides, factors.
    pub parameters: Vec<u64>,
}
