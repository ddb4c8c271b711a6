//! The digest's inner loop, compiled for the vector unit that is there.
#![allow(unsafe_code, reason = "calling code compiled for a CPU feature, after asking for it")]

use crate::digest;

/// See [`digest::nh_rows`].
pub(crate) fn nh_rows(row: u32, rows: &[[u8; 64]]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("avx2") {
        // SAFETY: the CPU has AVX2, which is all that the callee requires.
        return unsafe { nh_rows_avx2(row, rows) };
    }
    digest::nh_rows(row, rows)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn nh_rows_avx2(row: u32, rows: &[[u8; 64]]) -> u64 {
    digest::nh_rows(row, rows)
}
