//! The naive engine behaves as every engine has to.

conformance::suite!(conformance::Suite::new(engine_core::naive::BACKEND), without buckets);
