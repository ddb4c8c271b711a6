//! The process that has started this one, and what it tells of failures itself.

use std::time::Duration;

use checkpoint_engine::Error;

/// The leader's process, if it has started this one: it says once why updates failed, and before what follows from that.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Parent(Option<u32>);

impl Parent {
    pub(crate) fn new(is_child: bool) -> Self {
        Self(is_child.then(std::os::unix::process::parent_id))
    }

    /// Whether it says what an update failed with, which all ranks hear. What happened here alone names no rank.
    pub(crate) fn tells(self, error: &Error) -> bool {
        self.0.is_some() && error.report().rank.is_some()
    }

    /// Whether it is there to say why it left the group.
    pub(crate) async fn is_there(self) -> bool {
        // The connection of a process that dies ends a moment before it has no children any more.
        tokio::time::sleep(Duration::from_millis(100)).await;
        self.0.is_some_and(|parent| std::os::unix::process::parent_id() == parent)
    }
}
