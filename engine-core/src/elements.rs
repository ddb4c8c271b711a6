//! Weights that a program has as numbers.

use std::sync::Arc;

use bytes::Bytes;

use crate::{DType, Error, ErrorKind, Result, TensorMeta, Weight};

/// A number that tensors are made of.
pub trait Element: bytemuck::NoUninit + Send + Sync {
    /// The type of tensors of it.
    const DTYPE: DType;
}

macro_rules! elements {
    ($($number:ty: $dtype:ident),* $(,)?) => {
        $(impl Element for $number {
            const DTYPE: DType = DType::$dtype;
        })*
    };
}

elements! {
    f32: F32, f64: F64, half::f16: F16, half::bf16: BF16,
    i8: I8, i16: I16, i32: I32, i64: I64, u8: U8, u16: U16, u32: U32, u64: U64,
}

/// Numbers that a weight can be made of without a copy: whatever owns them or shares them.
pub trait Numbers: Send + Sync + 'static {
    /// The type of one.
    type Element: Element;

    /// All of them.
    fn numbers(&self) -> &[Self::Element];
}

macro_rules! numbers {
    ($($owner:ty),* $(,)?) => {
        $(impl<T: Element> Numbers for $owner {
            type Element = T;

            fn numbers(&self) -> &[T] {
                self
            }
        })*
    };
}

numbers! { Vec<T>, Box<[T]>, Arc<[T]>, Arc<Vec<T>>, &'static [T] }

/// What owns numbers, as what owns their bytes.
struct Owner<N>(N);

impl<N: Numbers> AsRef<[u8]> for Owner<N> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(self.0.numbers())
    }
}

impl Weight {
    /// A contiguous tensor of numbers that the program holds. They are shared, not copied, and give the tensor its
    /// type.
    ///
    /// When [`send_weights`](crate::TrainerEngine::send_weights) has returned, with an error or without, the engine
    /// no longer shares them, so that [`Arc::get_mut`] works. After its future was dropped, that takes until the work
    /// on the current bucket has ended.
    ///
    /// # Errors
    ///
    /// `Weight` if the number of elements is not that of the shape, or if the description is invalid.
    ///
    /// # Examples
    ///
    /// ```
    /// use std::sync::Arc;
    /// use engine_core::Weight;
    ///
    /// let n = 64;
    /// let layer = Arc::new(vec![0.5_f32; n * n]);
    /// let weight = Weight::of("layers.0.weight", [n, n], layer.clone())?;
    /// assert_eq!(weight.byte_len(), 4 * 64 * 64);
    /// # Ok::<(), engine_core::Error>(())
    /// ```
    pub fn of<N: Numbers>(
        name: impl Into<Arc<str>>,
        shape: impl AsRef<[usize]>,
        numbers: N,
    ) -> Result<Self> {
        let name = name.into();
        let shape: Vec<u64> = shape.as_ref().iter().map(|&side| side as u64).collect();
        let meta = TensorMeta::new(name, N::Element::DTYPE, shape);
        let (given, needed) = (numbers.numbers().len(), meta.elements()?);
        if given as u64 != needed {
            let message =
                format!("{given} numbers were given for {:?}, which needs {needed}", meta.shape);
            let error = Error::new(ErrorKind::Weight, "checking a weight", message);
            return Err(error.tensor(&*meta.name));
        }
        Self::from_meta(meta, Bytes::from_owner(Owner(numbers)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_a_program_are_a_weight_of_their_type_and_shared() {
        let numbers = Arc::new(vec![half::bf16::from_f32(1.0), half::bf16::from_f32(-2.0)]);
        let weight = Weight::of("w", [2, 1], numbers.clone()).unwrap();
        assert_eq!((weight.meta().dtype, &*weight.meta().shape), (DType::BF16, &[2, 1][..]));
        assert_eq!(&*weight.to_bytes().unwrap(), [0x80, 0x3f, 0x00, 0xc0]);
        let address = weight.to_bytes().unwrap().as_ptr() as usize;
        assert_eq!(address, numbers.as_ptr() as usize, "they were copied");
    }

    #[test]
    fn another_number_of_numbers_than_the_shape_says_is_an_error_that_names_the_weight() {
        let error = Weight::of("w", [2, 2], vec![1.0_f32; 3]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Weight);
        assert!(error.to_string().contains("3 numbers were given for [2, 2], which needs 4"));
        assert_eq!(error.report().tensor.as_deref(), Some("w"));
    }
}
