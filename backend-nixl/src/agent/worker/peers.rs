//! The peers that the agent knows how to reach, and the connections to them.

use tracing::warn;

use super::{Active, Work, Worker};
use crate::agent::notice::Notice;
use crate::error::NixlError;

/// The number of agents whose metadata is loaded at a time.
const PEERS: usize = 4096;

/// A peer that the agent knows how to reach.
pub(super) struct Loaded {
    pub(super) metadata: Vec<u8>,
    /// The value of this agent's count when it was loaded.
    pub(super) era: u64,
    /// The value of the peer's count in its last question, if it has asked one.
    pub(super) asks: Option<u64>,
    /// The value of the count when it was last used.
    pub(super) used: u64,
}

impl Worker {
    /// Loads a peer's metadata, unless it is loaded. Returns the count at which that was done.
    pub(super) fn load(&mut self, name: &str, metadata: &[u8]) -> Result<u64, NixlError> {
        self.count += 1;
        let used = self.count;
        if let Some(loaded) = self.loaded.get_mut(name).filter(|loaded| loaded.metadata == metadata)
        {
            loaded.used = used;
            return Ok(loaded.era);
        }
        self.make_room();
        // A peer whose metadata has changed has registered more memory.
        let named = self.agent.load_peer(metadata)?;
        if named != name {
            self.agent.forget_peer(&named)?;
            return Err(NixlError::Unknown);
        }
        let new = Loaded { metadata: Vec::new(), era: used, asks: None, used };
        let loaded = self.loaded.entry(named).or_insert(new);
        loaded.metadata = metadata.to_vec();
        loaded.used = used;
        Ok(loaded.era)
    }

    /// Forgets the peer that was used longest ago, if there are too many: processes that end do not say so.
    fn make_room(&mut self) {
        if self.loaded.len() < PEERS {
            return;
        }
        let idle = self.loaded.iter().filter(|(name, _)| {
            !self.is_under_way_with(name)
                && !self.active.iter().any(|transfer| transfer.peer.name == **name)
        });
        if let Some(name) = idle.min_by_key(|(_, loaded)| loaded.used).map(|(name, _)| name.clone())
        {
            self.disconnect(&name);
        }
    }

    /// Whether the library works on a transfer with a peer. It must not forget the peer before the end of the transfer: that would drop
    /// what it knows of the peer's memory.
    pub(super) fn is_under_way_with(&self, peer: &str) -> bool {
        let read =
            |active: &Active| matches!(active.work, Work::Read(_)) && active.peer.name == peer;
        self.active.iter().any(read) || self.serving.iter().any(|serving| serving.peer == peer)
    }

    pub(super) fn say(&self, peer: &str, notice: &Notice) -> Result<(), NixlError> {
        self.agent.notify(peer, &postcard::to_stdvec(notice).map_err(NixlError::Card)?)
    }

    /// Closes the connections to a peer, once no transfer uses them any more.
    pub(super) fn disconnect(&mut self, peer: &str) {
        if self.is_under_way_with(peer) {
            self.closing.insert(peer.to_owned());
            return;
        }
        self.closing.remove(peer);
        if self.loaded.remove(peer).is_some()
            && let Err(error) = self.agent.forget_peer(peer)
        {
            warn!(peer, %error, "a peer that failed could not be forgotten");
        }
    }

    /// Closes connections that wait to be closed.
    pub(super) fn close_connections(&mut self) {
        if self.closing.is_empty() {
            return;
        }
        let over = self.closing.iter().filter(|peer| !self.is_under_way_with(peer));
        for peer in over.cloned().collect::<Vec<_>>() {
            self.disconnect(&peer);
        }
    }
}
