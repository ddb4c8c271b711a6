//! The error of this crate.

use std::fmt;

use engine_core::{Error, ErrorKind};

use crate::BlockGrid;

/// What can go wrong while deciding on, or carrying out, a quantisation.
///
/// Errors about data name the place: the tensor where the function knows its name (see
/// [`in_tensor`](QuantError::in_tensor)), and the block.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QuantError {
    /// A format whose fields do not fit together, such as a block of 100 rows.
    #[error("invalid FP8 format: {reason}")]
    InvalidFormat {
        /// What is wrong with it.
        reason: String,
    },

    /// Sizes of the arguments that contradict each other.
    #[error("{}sizes disagree: {reason}", Prefix(.tensor))]
    Sizes {
        /// The tensor, where known.
        tensor: Option<String>,
        /// Which sizes, and both of their values.
        reason: String,
    },

    /// A block holds NaN or infinity (after the cast to BF16 if the format has one), or, in mode
    /// `pytorch`, values so small that 448 / absmax is infinite.
    #[error(
        "{}block ({block_row}, {block_col}) of matrix {expert} has no finite FP8 form: \
         it holds NaN or infinity, or its multiplier overflows",
        Prefix(.tensor)
    )]
    NonFinite {
        /// The tensor, where known.
        tensor: Option<String>,
        /// Which matrix of a fused `[experts, rows, cols]` tensor; 0 for a plain matrix.
        expert: usize,
        /// Row of the block in its matrix's grid of blocks.
        block_row: usize,
        /// Column of the block in its matrix's grid of blocks.
        block_col: usize,
    },

    /// Mode `triton-gpu` was asked of a CPU.
    #[error("mode triton-gpu reproduces a GPU's approximate division and runs on CUDA only")]
    CudaOnly,

    /// No codec of this name is built for this architecture, or this processor cannot run it.
    #[error("no FP8 codec named {name} on this machine; available: {available}")]
    NoSuchCodec {
        /// The name asked for.
        name: String,
        /// The names that would work, best first.
        available: String,
    },

    /// An `ignored_layers` or `modules_to_not_convert` entry that is not a regular expression.
    #[error("entry {entry} of the ignored layers is not a regular expression")]
    Pattern {
        /// The entry, with its `re:`.
        entry: String,
        /// Why it does not parse.
        source: regex::Error,
    },

    /// A `quantization_config` that cannot be read, or that contradicts the format.
    #[error("quantization_config: {reason}")]
    Config {
        /// What is wrong with it.
        reason: String,
    },

    /// The receiver's manifest and a parameter contradict each other.
    #[error("{tensor} does not fit the receiver's manifest: {reason}")]
    Manifest {
        /// The parameter.
        tensor: String,
        /// What the sides say.
        reason: String,
    },

    /// Parts that receivers fuse into one layer would be treated differently: one of them is ignored
    /// and others are not, or came in a stream after others had been quantised.
    #[error(
        "{first} ({first_decision}) and {second} ({second_decision}) are parts of one fused \
         layer and must be treated alike; to keep all of it, put {layer} into ignored_layers"
    )]
    FusedPartsDisagree {
        /// The part seen first.
        first: String,
        /// What was decided for it, and why.
        first_decision: String,
        /// The part that differs.
        second: String,
        /// What was decided for that one, and why.
        second_decision: String,
        /// The entry that ignores the whole layer.
        layer: String,
    },

    /// An FP8 weight came without its scale.
    #[error("{tensor} is FP8 but its scale is missing")]
    MissingScale {
        /// The weight.
        tensor: String,
    },

    /// A scale came without its weight.
    #[error("{tensor} is a scale but its weight is missing")]
    MissingWeight {
        /// The scale.
        tensor: String,
    },

    /// Strict mode met a matrix that no rule knows.
    #[error("no rule knows {tensor}, and strict mode does not guess")]
    Unlisted {
        /// The parameter.
        tensor: String,
    },

    /// The same name was given twice.
    #[error("{tensor} occurs twice")]
    Duplicate {
        /// The parameter.
        tensor: String,
    },
}

impl QuantError {
    /// Adds the name of the tensor to an error that was made where names are not known.
    #[must_use]
    pub fn in_tensor(mut self, name: &str) -> Self {
        if let Self::NonFinite { tensor, .. } | Self::Sizes { tensor, .. } = &mut self {
            tensor.get_or_insert_with(|| name.to_owned());
        }
        self
    }

    /// Moves an error of a band that was quantised by itself to its place in the tensor.
    #[must_use]
    pub(crate) fn at_band(mut self, grid: &BlockGrid, band: usize) -> Self {
        if let Self::NonFinite { expert, block_row, .. } = &mut self {
            (*expert, *block_row) =
                (band / grid.bands_per_matrix(), band % grid.bands_per_matrix());
        }
        self
    }

    pub(crate) fn sizes(reason: impl Into<String>) -> Self {
        Self::Sizes { tensor: None, reason: reason.into() }
    }
}

impl From<QuantError> for Error {
    fn from(error: QuantError) -> Self {
        let kind = match &error {
            QuantError::InvalidFormat { .. }
            | QuantError::CudaOnly
            | QuantError::NoSuchCodec { .. }
            | QuantError::Pattern { .. }
            | QuantError::Config { .. } => ErrorKind::Config,
            QuantError::Manifest { .. } => ErrorKind::Mismatch,
            QuantError::Sizes { .. }
            | QuantError::NonFinite { .. }
            | QuantError::FusedPartsDisagree { .. }
            | QuantError::MissingScale { .. }
            | QuantError::MissingWeight { .. }
            | QuantError::Unlisted { .. }
            | QuantError::Duplicate { .. } => ErrorKind::Weight,
        };
        let tensor = match &error {
            QuantError::Sizes { tensor, .. } | QuantError::NonFinite { tensor, .. } => {
                tensor.clone()
            }
            QuantError::Manifest { tensor, .. }
            | QuantError::MissingScale { tensor }
            | QuantError::MissingWeight { tensor }
            | QuantError::Unlisted { tensor }
            | QuantError::Duplicate { tensor }
            | QuantError::FusedPartsDisagree { second: tensor, .. } => Some(tensor.clone()),
            _ => None,
        };
        let mut cause: &dyn std::error::Error = &error;
        let mut message = error.to_string();
        while let Some(source) = cause.source() {
            message = format!("{message}: {source}");
            cause = source;
        }
        let result = Self::new(kind, "quantising to FP8", message);
        match tensor {
            Some(tensor) => result.tensor(tensor),
            None => result,
        }
    }
}

/// `NAME: `, or nothing.
struct Prefix<'a>(&'a Option<String>);

impl fmt::Display for Prefix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(name) => write!(f, "{name}: "),
            None => Ok(()),
        }
    }
}
