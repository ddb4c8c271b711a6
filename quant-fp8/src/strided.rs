//! Where the elements of a part of a tensor are in memory, as numbers: what kernels of devices are given of it.

use crate::Fp8Format;

/// Where the elements of some matrices are: how many bytes from a beginning, and how far matrices and rows are apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Strides {
    /// Where the first element is.
    pub at: u64,
    /// From one matrix to the next.
    pub matrix: u64,
    /// From one row to the next. Elements of a row are neighbours.
    pub row: u64,
}

impl Strides {
    /// Rows of a single matrix.
    pub fn rows(at: u64, row: u64) -> Self {
        Self { at, matrix: 0, row }
    }

    /// Where the bytes end, of so many matrices and rows of so many bytes; none if that does not fit 64 bits.
    pub fn end(&self, matrices: u64, rows: u64, row_bytes: u64) -> Option<u64> {
        let last = |count: u64, stride: u64| count.checked_sub(1)?.checked_mul(stride);
        let from = self.at.checked_add(last(matrices, self.matrix)?)?;
        from.checked_add(last(rows, self.row)?)?.checked_add(row_bytes)
    }
}

/// A part of a tensor on its way from one memory to another: matrices of rows of elements.
#[derive(Clone, Debug, PartialEq)]
pub struct StridedPart {
    /// In the bytes of the weight.
    pub from: Strides,
    /// In the memory that it is written to.
    pub to: Strides,
    /// Matrices, rows of one, elements of a row; none is 0.
    pub extent: [u64; 3],
    /// Bytes of an element where it comes from; unless it is quantised, where it goes as well.
    pub element: u64,
    /// How it is quantised, if it is.
    pub blocks: Option<StridedBlocks>,
}

/// The blocks of a part that is quantised. The first ones may begin outside of it.
#[derive(Clone, Debug, PartialEq)]
pub struct StridedBlocks {
    /// The format.
    pub format: Fp8Format,
    /// Rows and columns of a block.
    pub sides: [u64; 2],
    /// How many rows, and how many columns, the first blocks have in the part.
    pub first: [u64; 2],
    /// The block that has the first element: matrix, row and column of blocks in the tensor.
    pub block: [u64; 3],
    /// Where the scales go that are of the part's blocks; the first is that of the block with the first element.
    pub scales: Strides,
    /// Whether the scales of the first row of blocks, and of their first column, come with another part.
    pub skips: [bool; 2],
}

impl StridedBlocks {
    /// How many rows and columns of blocks a part with so many rows and columns has.
    pub fn counts(&self, rows: u64, cols: u64) -> [u64; 2] {
        let count = |len: u64, first: u64, side: u64| 1 + len.saturating_sub(first).div_ceil(side);
        [count(rows, self.first[0], self.sides[0]), count(cols, self.first[1], self.sides[1])]
    }
}
