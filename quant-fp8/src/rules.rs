//! Which parameters are quantised.
