//! Moves a model's weights from a trainer to its inference engines.
