//! The shared-memory engine behaves as every engine has to, with digests and without.

fn suite() -> conformance::Suite {
    conformance::Suite::new(backend_ipc::BACKEND).with_control_plane()
}

mod with_digests {
    conformance::suite!(super::suite());
}

mod without_digests {
    conformance::suite!(super::suite().with_config(|config| config.digests = false));
}
