//! The engine that all collective backends share behaves as every engine has to: with one sender and with
//! several, with relays, with groups that are formed anew each time, and when its library fails.

use conformance::Suite;
use conformance::collective::BACKEND;
use engine_core::CheckpointEngineConfig;
use serde_json::{Value, json};

fn with(options: Value) -> impl FnOnce(&mut CheckpointEngineConfig) {
    move |config| {
        if let Value::Object(options) = options {
            config.engine_kwargs.insert("in-process".into(), options);
        }
    }
}

fn suite(options: Value) -> Suite {
    Suite::new(BACKEND).with_control_plane().with_config(with(options))
}

mod one_sender {
    conformance::suite!(super::suite(super::json!({})));
}

mod without_digests {
    conformance::suite!(
        super::suite(super::json!({})).with_config(|config| config.digests = false)
    );
}

mod two_senders {
    conformance::suite!(super::suite(super::json!({"senders": 2})).with_trainers(2));
}

mod three_senders_and_a_relay {
    conformance::suite!(super::suite(super::json!({"senders": 3})).with_trainers(4));
}

mod a_relay_and_no_group_that_shrinks {
    conformance::suite!(super::suite(super::json!({"shrinks": false})).with_trainers(2));
}

mod a_trainer_without_a_part {
    conformance::suite!(super::suite(super::json!({"relays": false})).with_trainers(2));
}

mod groups_formed_anew_for_every_update {
    conformance::suite!(super::suite(super::json!({"rebuild_group": true})));
}
