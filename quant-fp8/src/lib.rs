//! FP8 block quantisation.
