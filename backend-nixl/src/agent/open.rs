//! Makes an agent of NIXL: its options, and whether one can be made here.

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
    /// UCX's transports, in the form of `UCX_TLS`; all available ones if it is empty.
    pub(crate) transports: String,
    /// The network interface for UCX's TCP, unless the environment names one; any if it is empty.
    pub(crate) interface: String,
    /// UCX's handling of failed peers: `peer` notices them.
    pub(crate) error_handling: &'static str,
    /// Whether agents always push: the one that has bytes writes them. Otherwise agents read, and push only where UCX cannot read. The same
    /// for all agents of a group.
    pub(crate) writes: bool,
    /// Whether it writes to memory of peers' devices, also if it has none of its own: transports may be emulated there.
    pub(crate) reaches_devices: bool,
    /// Whether NIXL also progresses transfers and answers peers in a thread of its own. An agent of device memory always has one:
    /// transports may be emulated there, so that peers have to be answered.
    pub(crate) own_thread: bool,
}

/// Makes an agent that has registered an arena. Returns it with what peers need to reach it.
pub(crate) fn open(
    options: &AgentOptions,
    name: String,
    arena: &Arena,
    spares: Vec<Memory>,
) -> Result<(RawAgent, Card), NixlError> {
    let (slots, slot_bytes, device) = (arena.slots(), arena.slot_bytes(), arena.device());
    let address = arena.address() as u64;
    let mut memory = arena.memory();
    memory.extend(spares);
    memory.sort_by_key(Memory::address);
    memory.dedup_by_key(|memory| memory.address());
    let (agent, metadata) = open_with(options, &name, memory)?;
    let (host, process, moves) = (this_host(), Process::this(), false);
    let card = Card { name, metadata, address, slots, slot_bytes, device, host, process, moves };
    Ok((agent, card))
}

/// Makes an agent that has registered this memory, and makes this thread one from which UCX reaches all of it. Returns it with its metadata
/// for peers.
pub(crate) fn open_with(
    options: &AgentOptions,
    name: &str,
    memory: Vec<Memory>,
) -> Result<(RawAgent, Vec<u8>), NixlError> {
    room::check()?;
    let api = sys::load(options.library_dir.as_deref())?;
    for memory in &memory {
        memory.enter().map_err(NixlError::Device)?;
    }
    let has_device = memory.iter().any(|memory| memory.device().is_some());
    let on_device = has_device || options.reaches_devices;
    let mut config = Vec::new();
    if !on_device {
        // If a transport cannot read or write by itself (TCP cannot read), UCX would make the other side answer, which ends its process if
        // the connection breaks at that moment. With this setting UCX reports that it cannot, and the peer is asked to write.
        config.push("PROTO_EMULATION_ENABLE=n".into());
    }
    if std::env::var_os("UCX_TCP_CONN_NB").is_none() {
        // Otherwise UCX would wait in connect(2) for a host that does not answer, as long as the kernel retries (two minutes), and block
        // this agent meanwhile.
        config.push("TCP_CONN_NB=y".into());
    }
    if !options.transports.is_empty() {
        config.push(format!("TLS={}", options.transports));
    } else if !on_device && std::env::var_os("UCX_TLS").is_none() {
        // These transports would leave files in /dev/shm if the process is killed as it starts. They are not needed to reach the memory of
        // other processes.
        config.push("TLS=^posix,sysv".into());
    }
    if !options.interface.is_empty() && std::env::var_os("UCX_NET_DEVICES").is_none() {
        config.push(format!("NET_DEVICES={}", options.interface));
    }
    if on_device && std::env::var_os("UCX_CUDA_IPC_ENABLE_GET_ZCOPY").is_none() {
        // Without NVLink, UCX would otherwise read over TCP what it can map and copy.
        config.push("CUDA_IPC_ENABLE_GET_ZCOPY=on".into());
    }
    let config = config.join(",");
    let mut parameters = vec![("ucx_error_handling_mode", options.error_handling)];
    if !config.is_empty() {
        parameters.push((ENGINE_CONFIG, config.as_str()));
    }
    let own_thread = options.own_thread || has_device;
    let agent = RawAgent::new(api, name, &parameters, memory, own_thread)?;
    // The system runs exit handlers in reverse order. NIXL and its plugins register theirs when the first agent is made,
    // so a handler that is registered after that runs before theirs.
    static REGISTERED: Once = Once::new();
    REGISTERED.call_once(|| sys::at_exit(close_all));
    let metadata = agent.metadata()?;
    Ok((agent, metadata))
}

/// Makes an agent and closes it again. Describes what was found.
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
