//! Making an agent of NIXL: its options, and whether one can be made here.

use std::path::PathBuf;
use std::sync::{Arc, Once};

use super::Card;
use super::exit::close_all;
use super::reach::this_host;
use crate::arena::{Arena, Memory};
use crate::error::NixlError;
use crate::ffi::{ENGINE_CONFIG, RawAgent};
use crate::lent::Process;
use crate::{room, sys};

/// How an agent reaches others.
#[derive(Clone, Debug, Default)]
pub(crate) struct AgentOptions {
    /// The folder of NIXL's library, if it is not to be searched for.
    pub(crate) library_dir: Option<PathBuf>,
    /// UCX's transports, in UCX's words; all that are there if it is empty.
    pub(crate) transports: String,
    /// The network interface that UCX's TCP is to use, unless the environment says which; any if it is empty.
    pub(crate) interface: String,
    /// UCX's way with failures of peers: `peer` notices them.
    pub(crate) error_handling: &'static str,
    /// Whether agents that have bytes write them in any case, and not only where those that want them
    /// cannot read them. The same for all agents of a group.
    pub(crate) writes: bool,
    /// Whether NIXL looks after transfers and peers in a thread of its own as well. An agent of memory of a
    /// device always has one: transports may be emulated there, so that peers have to be answered.
    pub(crate) own_thread: bool,
}

/// An agent that has registered an arena, and what peers need to reach it.
pub(crate) fn open(
    options: &AgentOptions,
    name: String,
    arena: &Arena,
    spares: Vec<Memory>,
) -> Result<(RawAgent, Card), NixlError> {
    room::check()?;
    let api = sys::load(options.library_dir.as_deref())?;
    let mut config = Vec::new();
    if arena.device().is_none() {
        // Where a transport cannot read or write by itself (TCP cannot read), UCX would have the other side
        // answer, and that ends its process if the connection breaks at that moment. Without this it says
        // that it cannot, and the peer is asked to write.
        config.push("PROTO_EMULATION_ENABLE=n".into());
    }
    if std::env::var_os("UCX_TCP_CONN_NB").is_none() {
        // UCX would wait within connect(2) for a host that does not answer, for as long as the kernel repeats its
        // question (two minutes), and nothing else of this agent would go on meanwhile.
        config.push("TCP_CONN_NB=y".into());
    }
    if !options.transports.is_empty() {
        config.push(format!("TLS={}", options.transports));
    } else if arena.device().is_none() && std::env::var_os("UCX_TLS").is_none() {
        // A process that is killed as it begins would leave their files in /dev/shm. Bytes of other processes' memory
        // do not travel by them.
        config.push("TLS=^posix,sysv".into());
    }
    if !options.interface.is_empty() && std::env::var_os("UCX_NET_DEVICES").is_none() {
        config.push(format!("NET_DEVICES={}", options.interface));
    }
    if arena.device().is_some() && std::env::var_os("UCX_CUDA_IPC_ENABLE_GET_ZCOPY").is_none() {
        // Where it sees no NVLink, UCX would read over TCP what it can map and copy.
        config.push("CUDA_IPC_ENABLE_GET_ZCOPY=on".into());
    }
    let config = config.join(",");
    let mut parameters = vec![("ucx_error_handling_mode", options.error_handling)];
    if !config.is_empty() {
        parameters.push((ENGINE_CONFIG, config.as_str()));
    }
    arena.enter().map_err(NixlError::Device)?;
    let (slots, slot_bytes, device) = (arena.slots(), arena.slot_bytes(), arena.device());
    let address = arena.address() as u64;
    let own_thread = options.own_thread || device.is_some();
    let mut memory = arena.memory();
    memory.extend(spares);
    memory.sort_by_key(Memory::address);
    memory.dedup_by_key(|memory| memory.address());
    let agent = RawAgent::new(api, &name, &parameters, memory, own_thread)?;
    // Not before an agent was made: then NIXL and its plugins have registered their own ends.
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| sys::at_exit(close_all));
    let metadata = agent.metadata()?;
    let (host, process, moves) = (this_host(), Process::this(), false);
    let card = Card { name, metadata, address, slots, slot_bytes, device, host, process, moves };
    Ok((agent, card))
}

/// What is there, in words, after an agent was made and closed again.
pub(crate) fn probe() -> Result<String, NixlError> {
    let options = AgentOptions { error_handling: "peer", ..Default::default() };
    let arena = Arc::new(Arena::of_host(1, 4096).map_err(NixlError::Device)?);
    let name = format!("probe-{}", std::process::id());
    let (_agent, card) = open(&options, name, &arena, Vec::new())?;
    let found = &sys::load(None)?.found;
    let version = |version: &Option<String>| version.clone().unwrap_or("of unknown version".into());
    Ok(format!(
        "NIXL {} at {}, UCX {}, InfiniBand devices: {}, plugins: {}, {} bytes of metadata",
        version(&found.nixl),
        found.path.display(),
        version(&found.ucx),
        in_words(&sys::infiniband_devices()),
        in_words(&found.plugins),
        card.metadata.len(),
    ))
}

fn in_words(names: &[String]) -> String {
    if names.is_empty() { "none".into() } else { names.join(" ") }
}
