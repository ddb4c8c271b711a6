//! The types of a tensor's elements.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The type of a tensor's elements: all those that the safetensors format knows.
///
/// `Display` and serde use the format's own names (`BF16`, `F8_E4M3`, …).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(non_camel_case_types, reason = "the names are those of the safetensors format")]
#[non_exhaustive]
pub enum DType {
    /// Boolean, one byte.
    BOOL,
    /// MX 4-bit float, two elements a byte.
    F4,
    /// MX 6-bit float E2M3, four elements in three bytes.
    F6_E2M3,
    /// MX 6-bit float E3M2, four elements in three bytes.
    F6_E3M2,
    /// Unsigned byte.
    U8,
    /// Signed byte.
    I8,
    /// 8-bit float, five exponent bits.
    F8_E5M2,
    /// 8-bit float, four exponent bits, no infinity (`e4m3fn`).
    F8_E4M3,
    /// 8-bit power-of-two scale (`e8m0fnu`).
    F8_E8M0,
    /// 8-bit float E4M3 without negative zero (`e4m3fnuz`).
    F8_E4M3FNUZ,
    /// 8-bit float E5M2 without negative zero (`e5m2fnuz`).
    F8_E5M2FNUZ,
    /// Signed 16-bit integer.
    I16,
    /// Unsigned 16-bit integer.
    U16,
    /// IEEE half precision.
    F16,
    /// Brain float: the upper half of an `F32`.
    BF16,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer.
    U32,
    /// IEEE single precision.
    F32,
    /// Complex of two `F32`.
    C64,
    /// IEEE double precision.
    F64,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 64-bit integer.
    U64,
}

impl DType {
    /// Every type, in the order of the enumeration.
    pub const ALL: [Self; 22] = [
        Self::BOOL,
        Self::F4,
        Self::F6_E2M3,
        Self::F6_E3M2,
        Self::U8,
        Self::I8,
        Self::F8_E5M2,
        Self::F8_E4M3,
        Self::F8_E8M0,
        Self::F8_E4M3FNUZ,
        Self::F8_E5M2FNUZ,
        Self::I16,
        Self::U16,
        Self::F16,
        Self::BF16,
        Self::I32,
        Self::U32,
        Self::F32,
        Self::C64,
        Self::F64,
        Self::I64,
        Self::U64,
    ];

    /// The size of one element in bits.
    pub const fn bits(self) -> u64 {
        match self {
            Self::F4 => 4,
            Self::F6_E2M3 | Self::F6_E3M2 => 6,
            Self::BOOL
            | Self::U8
            | Self::I8
            | Self::F8_E5M2
            | Self::F8_E4M3
            | Self::F8_E8M0
            | Self::F8_E4M3FNUZ
            | Self::F8_E5M2FNUZ => 8,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 16,
            Self::I32 | Self::U32 | Self::F32 => 32,
            Self::C64 | Self::F64 | Self::I64 | Self::U64 => 64,
        }
    }

    /// The size of one element in bytes, unless elements share bytes.
    pub const fn bytes(self) -> Option<u64> {
        if self.bits().is_multiple_of(8) { Some(self.bits() / 8) } else { None }
    }

    /// The format's name of the type.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BOOL => "BOOL",
            Self::F4 => "F4",
            Self::F6_E2M3 => "F6_E2M3",
            Self::F6_E3M2 => "F6_E3M2",
            Self::U8 => "U8",
            Self::I8 => "I8",
            Self::F8_E5M2 => "F8_E5M2",
            Self::F8_E4M3 => "F8_E4M3",
            Self::F8_E8M0 => "F8_E8M0",
            Self::F8_E4M3FNUZ => "F8_E4M3FNUZ",
            Self::F8_E5M2FNUZ => "F8_E5M2FNUZ",
            Self::I16 => "I16",
            Self::U16 => "U16",
            Self::F16 => "F16",
            Self::BF16 => "BF16",
            Self::I32 => "I32",
            Self::U32 => "U32",
            Self::F32 => "F32",
            Self::C64 => "C64",
            Self::F64 => "F64",
            Self::I64 => "I64",
            Self::U64 => "U64",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

macro_rules! same_names {
    ($($name:ident)*) => {
        impl From<DType> for safetensors::Dtype {
            fn from(dtype: DType) -> Self {
                match dtype { $(DType::$name => Self::$name,)* }
            }
        }

        impl TryFrom<safetensors::Dtype> for DType {
            type Error = crate::Error;

            /// # Errors
            ///
            /// `Weight` for a type that a newer safetensors library knows and this crate does not.
            fn try_from(dtype: safetensors::Dtype) -> Result<Self, crate::Error> {
                match dtype {
                    $(safetensors::Dtype::$name => Ok(Self::$name),)*
                    other => Err(crate::Error::new(
                        crate::ErrorKind::Weight,
                        "reading a tensor's type",
                        format!("the type {other:?} is not known"),
                    )),
                }
            }
        }
    };
}

same_names! {
    BOOL F4 F6_E2M3 F6_E3M2 U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ
    I16 U16 F16 BF16 I32 U32 F32 C64 F64 I64 U64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_type_has_the_size_and_the_name_that_safetensors_gives_it() {
        for dtype in DType::ALL {
            let theirs = safetensors::Dtype::from(dtype);
            assert_eq!(theirs.bitsize() as u64, dtype.bits(), "{dtype}");
            assert_eq!(format!("{theirs:?}"), dtype.name());
            assert_eq!(serde_json::to_value(dtype).unwrap(), dtype.name());
            assert_eq!(DType::try_from(theirs).unwrap(), dtype);
        }
    }
}
