//! The agents that an agent knows how to reach: one of each rank.

use std::collections::HashMap;

use engine_core::Rank;

use crate::error::NixlError;
use crate::ffi::RawAgent;

#[derive(Debug, Default)]
pub(super) struct Peers(HashMap<Rank, (String, Vec<u8>)>);

impl Peers {
    /// Loads the metadata of a rank's agent, unless it is loaded. A former agent of that rank is forgotten: nothing may be under way with it.
    pub(super) fn know(
        &mut self,
        agent: &RawAgent,
        rank: Rank,
        name: &str,
        metadata: &[u8],
    ) -> Result<(), NixlError> {
        match self.0.get(&rank) {
            Some((known, loaded)) if known == name && loaded == metadata => return Ok(()),
            Some((known, _)) => {
                agent.forget_peer(known)?;
                self.0.remove(&rank);
            }
            None => {}
        }
        let named = agent.load_peer(metadata)?;
        if named != name {
            agent.forget_peer(&named)?;
            return Err(NixlError::Unknown);
        }
        self.0.insert(rank, (named, metadata.to_vec()));
        Ok(())
    }
}
