//! What a quantised weight looks like, as data.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::QuantError;

/// The largest finite value of e4m3fn.
pub(crate) const FP8_MAX: f32 = 448.0;

/// How a block's scale `s` and multiplier `m` follow from `am`, the largest magnitude in the block.
///
/// In every mode a code is `e4m3fn(clamp(x · m, ±448))`, rounded to nearest even, and dequantises
/// as `code · s`. All arithmetic is single precision, correctly rounded, so that every codec gives
/// the same bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Mode {
    /// `s = max(am, 1e-10) / 448`, `m = 1 / s`: verl's and slime's Triton kernels with IEEE
    /// division. An all-zero block has `s = 2.232143e-13`.
    #[default]
    Triton,
    /// `m = 448 / am` (1 if `am` is zero or infinite), `s = 1 / m`: verl's PyTorch fallback,
    /// NeMo-RL, and TransformerEngine with F32 scales. An all-zero block has `s = 1`.
    Pytorch,
    /// `s = max(am, 1e-4) / 448` rounded up to a power of two and kept as F32, `m = 1 / s`:
    /// DeepGEMM's `per_block_cast_to_fp8` with E8M0 scales. Only for receivers that ask for it.
    Ue8m0,
    /// Byte-exact to verl's Triton kernel on a GPU, whose `/` is approximate. CUDA only: the CPU
    /// codecs answer [`QuantError::CudaOnly`].
    TritonGpu,
}

/// A block's scale, and the multiplier by which its elements are quantised.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockScale {
    /// The factor that dequantises a code. It is what is stored.
    pub scale: f32,
    /// What an element is multiplied with before it is rounded. About `1 / scale`, but which of
    /// the two is rounded from which depends on the mode.
    pub multiplier: f32,
}

impl Mode {
    /// The scale and multiplier of a block whose largest magnitude is `absmax`.
    ///
    /// # Errors
    ///
    /// [`QuantError::CudaOnly`] for [`Mode::TritonGpu`].
    pub fn block_scale(self, absmax: f32) -> Result<BlockScale, QuantError> {
        let from_scale = |scale: f32| BlockScale { scale, multiplier: 1.0 / scale };
        match self {
            Self::Triton => Ok(from_scale(absmax.max(1e-10) / FP8_MAX)),
            Self::Pytorch => {
                let degenerate = absmax == 0.0 || absmax == f32::INFINITY;
                let multiplier = if degenerate { 1.0 } else { FP8_MAX / absmax };
                Ok(BlockScale { scale: 1.0 / multiplier, multiplier })
            }
            Self::Ue8m0 => Ok(from_scale(power_of_two_at_least(absmax.max(1e-4) / FP8_MAX))),
            Self::TritonGpu => Err(QuantError::CudaOnly),
        }
    }
}

/// The smallest power of two that is not below `x`, for positive normal `x`: the exponent plus one
/// if any bit of the mantissa is set. Infinity stays infinity.
fn power_of_two_at_least(x: f32) -> f32 {
    const MANTISSA: u32 = (1 << 23) - 1;
    f32::from_bits((x.to_bits() + MANTISSA) & !MANTISSA)
}

/// Which elements share one scale.
///
/// Written as `128x128`, `per-row` or `per-tensor`, in configuration files and on command lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(with = "String"))]
pub enum Granularity {
    /// Blocks of `rows` × `cols`; the blocks at the right and bottom edge may be partial. Scales
    /// are `[⌈R/rows⌉, ⌈C/cols⌉]`.
    Block {
        /// Rows of a block, a multiple of 32.
        rows: usize,
        /// Columns of a block, a multiple of 32.
        cols: usize,
    },
    /// One scale per row (output channel). Scales are `[R, 1]`.
    PerRow,
    /// One scale per matrix. Scales are `[1]`.
    PerTensor,
}

impl Granularity {
    /// Checks the size of blocks.
    ///
    /// # Errors
    ///
    /// [`QuantError::InvalidFormat`] if a side is zero or not a multiple of 32.
    pub fn validate(self) -> Result<(), QuantError> {
        match self {
            Self::Block { rows, cols }
                if rows == 0
                    || cols == 0
                    || !rows.is_multiple_of(32)
                    || !cols.is_multiple_of(32) =>
            {
                Err(QuantError::InvalidFormat {
                    reason: format!("block {rows}x{cols}: both sides must be multiples of 32"),
                })
            }
            _ => Ok(()),
        }
    }

    /// Lays blocks over a tensor of shape `[rows, cols]` or `[experts, rows, cols]`.
    ///
    /// # Errors
    ///
    /// [`QuantError::Sizes`] for other ranks and for element counts that overflow.
    pub fn grid(self, shape: &[usize]) -> Result<BlockGrid, QuantError> {
        self.validate()?;
        let (experts, rows, cols) = match *shape {
            [rows, cols] => (1, rows, cols),
            [experts, rows, cols] => (experts, rows, cols),
            _ => {
                return Err(QuantError::sizes(format!(
                    "shape {shape:?} is neither a matrix nor a stack of matrices"
                )));
            }
        };
        if experts.checked_mul(rows).and_then(|n| n.checked_mul(cols)).is_none() {
            return Err(QuantError::sizes(format!("shape {shape:?} has too many elements")));
        }
        // An empty matrix has no blocks; a side of 1 keeps the divisions below defined.
        let (block_rows, block_cols) = match self {
            Self::Block { rows, cols } => (rows, cols),
            Self::PerRow => (1, cols.max(1)),
            Self::PerTensor => (rows.max(1), cols.max(1)),
        };
        Ok(BlockGrid {
            granularity: self,
            stacked: shape.len() == 3,
            experts,
            rows,
            cols,
            block_rows,
            block_cols,
        })
    }

    /// The shape of the scales of a tensor of shape `[rows, cols]` or `[experts, rows, cols]`.
    ///
    /// # Errors
    ///
    /// As [`grid`](Self::grid).
    pub fn scale_shape(self, shape: &[usize]) -> Result<Vec<usize>, QuantError> {
        Ok(self.grid(shape)?.scale_shape())
    }
}

impl Default for Granularity {
    /// 128×128, what DeepSeek-V3 and Qwen3-FP8 checkpoints have.
    fn default() -> Self {
        Self::Block { rows: 128, cols: 128 }
    }
}

impl fmt::Display for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Block { rows, cols } => write!(f, "{rows}x{cols}"),
            Self::PerRow => f.write_str("per-row"),
            Self::PerTensor => f.write_str("per-tensor"),
        }
    }
}

impl From<Granularity> for String {
    fn from(granularity: Granularity) -> Self {
        granularity.to_string()
    }
}

impl TryFrom<String> for Granularity {
    type Error = QuantError;

    fn try_from(text: String) -> Result<Self, QuantError> {
        text.parse()
    }
}

impl FromStr for Granularity {
    type Err = QuantError;

    fn from_str(text: &str) -> Result<Self, QuantError> {
        let granularity = match text {
            "per-row" => Self::PerRow,
            "per-tensor" => Self::PerTensor,
            block => block
                .split_once('x')
                .and_then(|(rows, cols)| {
                    Some(Self::Block { rows: rows.parse().ok()?, cols: cols.parse().ok()? })
                })
                .ok_or_else(|| QuantError::InvalidFormat {
                    reason: format!("{text} is none of ROWSxCOLS, per-row and per-tensor"),
                })?,
        };
        granularity.validate()?;
        Ok(granularity)
    }
}

/// Blocks laid over a matrix, or over each matrix of a stack: no block straddles two experts.
///
/// A row of blocks is a *band*. Its elements are contiguous in the row-major tensor and so are its
/// scales, which makes bands the unit of work: [`split`](Self::split) cuts a range of elements
/// where bands meet, and the pieces can be quantised by different threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockGrid {
    granularity: Granularity,
    stacked: bool,
    pub(crate) experts: usize,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) block_rows: usize,
    pub(crate) block_cols: usize,
}

impl BlockGrid {
    /// Elements of the tensor.
    pub fn elements(&self) -> usize {
        self.experts * self.rows * self.cols
    }

    /// Rows and columns of a block. Those at the edges of a matrix may have fewer.
    pub fn block(&self) -> [usize; 2] {
        [self.block_rows, self.block_cols]
    }

    /// Bands of all matrices together.
    pub fn bands(&self) -> usize {
        self.experts * self.bands_per_matrix()
    }

    /// Bands of one matrix.
    pub fn bands_per_matrix(&self) -> usize {
        self.rows.div_ceil(self.block_rows)
    }

    /// Scales of one band.
    pub fn scales_per_band(&self) -> usize {
        self.cols.div_ceil(self.block_cols)
    }

    /// Scales of the whole tensor.
    pub fn scales(&self) -> usize {
        self.bands() * self.scales_per_band()
    }

    /// The shape that the scales have on the wire and in checkpoints.
    pub fn scale_shape(&self) -> Vec<usize> {
        let matrix = match self.granularity {
            Granularity::PerTensor => vec![],
            _ => vec![self.bands_per_matrix(), self.scales_per_band()],
        };
        match (self.stacked, matrix.is_empty()) {
            (true, _) => [vec![self.experts], matrix].concat(),
            (false, true) => vec![1],
            (false, false) => matrix,
        }
    }

    /// The same blocks over rows of so many columns.
    pub(crate) fn over(&self, cols: usize) -> Self {
        Self { cols, ..*self }
    }

    /// The matrix of a band, and which band of it.
    pub(crate) fn place_of_band(&self, band: usize) -> (usize, usize) {
        (band / self.bands_per_matrix(), band % self.bands_per_matrix())
    }

    /// The elements of a band.
    pub fn band_elements(&self, band: usize) -> Range<usize> {
        let (matrix, band) = (band / self.bands_per_matrix(), band % self.bands_per_matrix());
        let first_row = band * self.block_rows;
        let end_row = (first_row + self.block_rows).min(self.rows);
        let start = matrix * self.rows;
        (start + first_row) * self.cols..(start + end_row) * self.cols
    }

    /// The bands that a range of elements touches.
    pub fn bands_of(&self, elements: &Range<usize>) -> Range<usize> {
        if elements.is_empty() {
            return 0..0;
        }
        self.band_of(elements.start)..self.band_of(elements.end - 1) + 1
    }

    /// The scales of the bands that a range of elements touches, as indices into all scales.
    pub fn scales_of(&self, elements: &Range<usize>) -> Range<usize> {
        let bands = self.bands_of(elements);
        bands.start * self.scales_per_band()..bands.end * self.scales_per_band()
    }

    /// Cuts a range of elements where bands meet, into pieces of about `piece` elements or of one
    /// band, whichever is more.
    pub fn split(&self, elements: Range<usize>, piece: usize) -> Vec<Range<usize>> {
        let mut pieces = Vec::new();
        let mut start = elements.start;
        for band in self.bands_of(&elements) {
            let end = self.band_elements(band).end.min(elements.end);
            if end - start >= piece || end == elements.end {
                pieces.push(start..end);
                start = end;
            }
        }
        pieces
    }

    fn band_of(&self, element: usize) -> usize {
        let row = element / self.cols;
        row / self.rows * self.bands_per_matrix() + row % self.rows / self.block_rows
    }
}

/// What the source is rounded to before anything else happens to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum Precast {
    /// BF16, to nearest even: what verl does, and what the rollout would compute with unquantised.
    /// Changes nothing for BF16 sources.
    #[default]
    Bf16,
    /// Nothing: quantise F32 and F16 sources as they are.
    None,
}

/// The type of the elements of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SourceType {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
}

impl SourceType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// What happens when a block holds NaN or infinity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum NonFinite {
    /// [`QuantError::NonFinite`], which names the block.
    #[default]
    Error,
    /// The formula of the mode is applied, as in verl: NaN does not take part in the
    /// maximum of `triton` and `ue8m0` (a GPU's `max` drops it) and makes the scale of `pytorch`
    /// NaN (`torch.amax` keeps it). A product that is NaN gives 0x7f with the sign of its element.
    Reproduce,
}

/// The name of a weight's scale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum ScaleName {
    /// `<weight>_scale_inv`: block FP8 checkpoints, vLLM and SGLang.
    #[default]
    WeightScaleInv,
    /// `<weight>_scale`: compressed-tensors checkpoints.
    WeightScale,
}

impl ScaleName {
    /// What is appended to the name of the weight.
    pub const fn suffix(self) -> &'static str {
        match self {
            Self::WeightScaleInv => "_scale_inv",
            Self::WeightScale => "_scale",
        }
    }

    /// The name of the scale of `weight`: `a.weight` gives `a.weight_scale_inv`, and fused experts
    /// `a.down_proj` give `a.down_proj_scale_inv`.
    pub fn of(self, weight: &str) -> String {
        format!("{weight}{}", self.suffix())
    }
}

/// Everything that decides the bytes of a quantised weight and the name and shape of its scale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Fp8Format {
    /// How scales are computed.
    pub mode: Mode,
    /// Which elements share a scale.
    pub granularity: Granularity,
    /// What the source is rounded to first.
    pub precast: Precast,
    /// What happens at NaN and infinity.
    pub non_finite: NonFinite,
    /// How scales are named.
    pub scale_name: ScaleName,
}

impl Fp8Format {
    /// Checks that the fields make sense together. Deserialised granularities have been checked
    /// already; ones made in code have not.
    ///
    /// # Errors
    ///
    /// [`QuantError::InvalidFormat`].
    pub fn validate(&self) -> Result<(), QuantError> {
        self.granularity.validate()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_of_a_matrix_are_two_dimensional_even_when_one_block_covers_it() {
        let shape = |s: &[usize]| Granularity::default().scale_shape(s).unwrap();
        assert_eq!(shape(&[1, 1]), [1, 1]);
        assert_eq!(shape(&[256, 64]), [2, 1]);
        assert_eq!(shape(&[129, 128]), [2, 1]);
        assert_eq!(shape(&[4, 130, 384]), [4, 2, 3]);
        assert_eq!(shape(&[1, 130, 384]), [1, 2, 3]);
    }

    #[test]
    fn per_row_and_per_tensor_scales_have_the_shapes_that_vllm_loads() {
        assert_eq!(Granularity::PerRow.scale_shape(&[5, 7]).unwrap(), [5, 1]);
        assert_eq!(Granularity::PerRow.scale_shape(&[3, 5, 7]).unwrap(), [3, 5, 1]);
        assert_eq!(Granularity::PerTensor.scale_shape(&[5, 7]).unwrap(), [1]);
        assert_eq!(Granularity::PerTensor.scale_shape(&[3, 5, 7]).unwrap(), [3]);
    }

    #[test]
    fn a_vector_has_no_scale_shape() {
        assert!(matches!(
            Granularity::default().scale_shape(&[128]),
            Err(QuantError::Sizes { .. })
        ));
    }

    #[test]
    fn blocks_must_be_multiples_of_32() {
        for text in ["0x128", "128x0", "100x128", "128x33", "128", "x", "128x128x128", "per-col"] {
            assert!(text.parse::<Granularity>().is_err(), "{text}");
        }
        assert_eq!("32x64".parse::<Granularity>().unwrap().to_string(), "32x64");
        assert!(Granularity::Block { rows: 1, cols: 128 }.grid(&[4, 4]).is_err());
    }

    #[test]
    fn a_format_reads_from_configuration_and_defaults_to_triton_blocks_of_128() {
        let format: Fp8Format = serde_json::from_str("{}").unwrap();
        assert_eq!(format, Fp8Format::default());
        let text = serde_json::to_value(format).unwrap();
        assert_eq!(
            text,
            serde_json::json!({"mode": "triton", "granularity": "128x128", "precast": "bf16",
                "non-finite": "error", "scale-name": "weight_scale_inv"})
        );
        let format: Fp8Format =
            serde_json::from_str(r#"{"mode": "triton-gpu", "granularity": "per-row"}"#).unwrap();
        assert_eq!((format.mode, format.granularity), (Mode::TritonGpu, Granularity::PerRow));
        assert!(serde_json::from_str::<Fp8Format>(r#"{"granularity": "7x7"}"#).is_err());
        assert!(serde_json::from_str::<Fp8Format>(r#"{"modus": "triton"}"#).is_err());
    }

    #[test]
    fn pieces_cover_a_range_and_meet_where_bands_do() {
        let grid = Granularity::default().grid(&[3, 300, 7]).unwrap();
        for elements in [0..6300, 5..6299, 899..901, 2100..2101, 10..10] {
            for piece in [1, 1000, 100_000] {
                let pieces = grid.split(elements.clone(), piece);
                let mut at = elements.start;
                for p in &pieces {
                    assert_eq!(p.start, at);
                    assert!(!p.is_empty());
                    at = p.end;
                    let last = grid.band_elements(grid.band_of(p.end - 1));
                    assert!(p.end == elements.end || p.end == last.end);
                }
                assert_eq!(at, elements.end);
            }
        }
    }

    #[test]
    fn no_band_straddles_two_experts() {
        let grid = Granularity::default().grid(&[2, 130, 4]).unwrap();
        let bands: Vec<_> = (0..grid.bands()).map(|b| grid.band_elements(b)).collect();
        assert_eq!(bands, [0..512, 512..520, 520..1032, 1032..1040]);
        assert_eq!(grid.bands_of(&(519..521)), 1..3);
        assert_eq!(grid.scales_of(&(519..521)), 1..3);
    }

    #[test]
    fn zero_blocks_have_the_scale_of_their_mode() {
        let scale = |mode: Mode| mode.block_scale(0.0).unwrap().scale;
        assert_eq!(scale(Mode::Triton), 1e-10 / 448.0);
        assert_eq!(scale(Mode::Pytorch), 1.0);
        assert_eq!(scale(Mode::Ue8m0), 2f32.powi(-22));
        assert!(matches!(Mode::TritonGpu.block_scale(0.0), Err(QuantError::CudaOnly)));
    }

    #[test]
    fn ue8m0_scales_are_rounded_up_to_powers_of_two() {
        assert_eq!(Mode::Ue8m0.block_scale(448.0).unwrap().scale, 1.0);
        assert_eq!(Mode::Ue8m0.block_scale(448.0f32.next_up()).unwrap().scale, 2.0);
    }
}
