//! The naive engine behaves as every engine has to.

conformance::suite!(conformance::Suite::new(backend_naive::BACKEND), within a process);
