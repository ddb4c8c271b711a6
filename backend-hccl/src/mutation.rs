//! Mistakes made on purpose, to see that the tests notice them.
//!
//! Only the feature `mutations` compiles them in, and the environment variable
//! `CKPT_ENGINE_HCCL_MUTATION` chooses one. Without the feature every question is answered by a constant.

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mutation {
    /// Neither a broadcast nor a rollout that reads in place waits for the copy that brings a bucket's bytes to
    /// the device.
    DroppedSynchronise,
    /// A received bucket is read by whatever thread asks for it.
    #[cfg(feature = "mutations")]
    CallFromExecutor,
    /// The barrier says that its elements are UINT8.
    WrongEnum,
    /// A group that is left keeps its communicator.
    LeakedCommunicator,
    /// A broadcast is given the address of the pinned staging memory.
    #[cfg(feature = "mutations")]
    HostPointer,
    /// The state of an event is read as if it were a stream's.
    EventAsStream,
}

#[cfg(feature = "mutations")]
impl Mutation {
    const ALL: [(&'static str, Self); 6] = [
        ("dropped-synchronise", Self::DroppedSynchronise),
        ("call-from-executor", Self::CallFromExecutor),
        ("wrong-enum", Self::WrongEnum),
        ("leaked-communicator", Self::LeakedCommunicator),
        ("host-pointer", Self::HostPointer),
        ("event-as-stream", Self::EventAsStream),
    ];

    /// Whether it is made.
    pub(crate) fn is_on(self) -> bool {
        use std::sync::OnceLock;
        static CHOSEN: OnceLock<Option<Mutation>> = OnceLock::new();
        let chosen = CHOSEN.get_or_init(|| {
            let name = std::env::var("CKPT_ENGINE_HCCL_MUTATION").ok()?;
            let known = Self::ALL.iter().find(|(known, _)| *known == name);
            Some(known.unwrap_or_else(|| panic!("there is no mutation `{name}`")).1)
        });
        *chosen == Some(self)
    }
}

#[cfg(not(feature = "mutations"))]
impl Mutation {
    /// Whether it is made: never.
    pub(crate) const fn is_on(self) -> bool {
        false
    }
}
