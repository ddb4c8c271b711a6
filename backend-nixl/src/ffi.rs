//! NIXL's objects: one function per call, status in, `Result` out.
#![allow(unsafe_code, reason = "calling NIXL's C interface")]

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::arena::{Memory, Place, Slot};
use crate::error::NixlError;
use crate::lending::Parcel;
use crate::sys::{self, AgentConfig, Api, Handle, Status};

/// An agent with its UCX backend and the registered memory of one arena.
///
/// Not `Send`: NIXL does not lock, so one thread owns it from beginning to end.
#[derive(Debug)]
pub(crate) struct RawAgent {
    api: &'static Api,
    agent: Handle,
    /// Unique among all agents that this process has or had.
    number: u64,
    backend: Handle,
    options: Handle,
    /// The map from which messages of peers are taken.
    notices: Handle,
    /// The registered memory. It stays as long as NIXL knows it.
    registered: Vec<(Handle, Memory)>,
}

/// A transfer that was started, and the memory of this process that the library accesses for it.
///
/// [`RawAgent::end`] returns the memory when the library no longer uses it, and not before: UCX cannot cancel a transfer. If this is
/// dropped before, the memory is never used again.
#[derive(Debug)]
pub(crate) struct RawTransfer<M> {
    request: Handle,
    /// The number of the agent that it belongs to.
    agent: u64,
    memory: Option<M>,
}

impl<M> RawTransfer<M> {
    /// The memory that it accesses.
    pub(crate) fn memory(&self) -> Option<&M> {
        self.memory.as_ref()
    }
}

impl<M> Drop for RawTransfer<M> {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            tracing::error!("a transfer was dropped before its end; its memory is kept for ever");
            std::mem::forget(memory);
        }
    }
}

/// Where a peer has bytes, or wants them: address and length, and the device's number unless it is host memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Remote {
    pub(crate) range: (usize, usize),
    pub(crate) device: Option<u32>,
}

/// The parts of memory at one end of a transfer: addresses and lengths, and the device's number unless it is host memory.
struct Side<'a> {
    parts: &'a [(usize, usize)],
    device: Option<u32>,
}

/// Why a transfer could not be started.
#[derive(Debug)]
pub(crate) struct NotStarted<M> {
    pub(crate) error: NixlError,
    /// The memory of the transfer.
    pub(crate) memory: M,
    /// Whether certainly no byte was moved.
    pub(crate) unmoved: bool,
}

fn check(call: &'static str, status: Status) -> Result<(), NixlError> {
    if status == sys::SUCCESS { Ok(()) } else { Err(NixlError::Call { call, status }) }
}

/// The kind of memory: of the device with this number, or of the host.
fn kind(device: Option<u32>) -> std::ffi::c_int {
    if device.is_some() { sys::VRAM } else { sys::DRAM }
}

/// A name for the library. It ends at the first zero byte.
fn c_string(text: &str) -> CString {
    let bytes: Vec<u8> = text.bytes().take_while(|&byte| byte != 0).collect();
    CString::new(bytes).unwrap_or_default()
}

impl RawAgent {
    /// Makes an agent with a UCX backend of these parameters, which has registered this memory. Without a thread of the library's own,
    /// transfers progress only during calls that look for messages or for the end of a transfer.
    pub(crate) fn new(
        api: &'static Api,
        name: &str,
        parameters: &[(&str, &str)],
        memory: Vec<Memory>,
        own_thread: bool,
    ) -> Result<Self, NixlError> {
        let config = AgentConfig {
            enable_prog_thread: own_thread,
            enable_listen_thread: false,
            listen_port: 0,
            thread_sync: 0,
            num_workers: 1,
            // Work wakes the library's thread. Without a pause it would poll all the time.
            pthr_delay_us: 10_000,
            lthr_delay_us: 100_000,
            capture_telemetry: false,
        };
        let name = c_string(name);
        let mut agent = null_mut();
        // SAFETY: all three point to what the call reads and writes, for as long as it takes.
        let status = unsafe {
            (api.create_configured_agent)(name.as_ptr(), &raw const config, &raw mut agent)
        };
        check("create_agent", status)?;
        static COUNT: AtomicU64 = AtomicU64::new(0);
        // From here on, dropping `this` frees what was made.
        let mut this = Self {
            api,
            agent,
            number: COUNT.fetch_add(1, Ordering::Relaxed),
            backend: null_mut(),
            options: null_mut(),
            notices: null_mut(),
            registered: Vec::new(),
        };
        this.create_backend(parameters)?;
        // SAFETY: the call writes the new object to where the pointer points.
        check("create_notif_map", unsafe { (api.create_notif_map)(&raw mut this.notices) })?;
        memory.into_iter().try_for_each(|memory| this.register(memory))?;
        Ok(this)
    }

    fn create_backend(&mut self, parameters: &[(&str, &str)]) -> Result<(), NixlError> {
        let api = self.api;
        let create = |object| {
            // SAFETY: the call writes the new object to where the pointer points.
            unsafe { (api.create_params)(object) }
        };
        // SAFETY: the function destroys what the other one creates.
        let params = unsafe { Object::new("create_params", api.destroy_params, create) }?;
        for (key, value) in parameters {
            let (key, value) = (c_string(key), c_string(value));
            // SAFETY: the object is alive; both strings are copied.
            let status = unsafe { (api.params_add)(params.handle, key.as_ptr(), value.as_ptr()) };
            check("params_add", status)?;
        }
        // SAFETY: agent and parameters are alive; the call writes the backend's handle.
        let status = unsafe {
            (api.create_backend)(self.agent, c"UCX".as_ptr(), params.handle, &raw mut self.backend)
        };
        if status != sys::SUCCESS {
            return Err(NixlError::Transports { settings: settings(parameters), status });
        }
        // SAFETY: the call writes the new object to where the pointer points.
        check("create_opt_args", unsafe { (api.create_opt_args)(&raw mut self.options) })?;
        // SAFETY: both objects are alive.
        let status = unsafe { (api.opt_args_add_backend)(self.options, self.backend) };
        check("opt_args_add_backend", status)
    }

    /// Registers memory, so that peers can reach it.
    pub(crate) fn register(&mut self, memory: Memory) -> Result<(), NixlError> {
        let api = self.api;
        let create = |object| {
            // SAFETY: the call writes the new object to where the pointer points.
            unsafe { (api.create_reg_dlist)(kind(memory.device()), object) }
        };
        // SAFETY: the function destroys what the other one creates.
        let list = unsafe { Object::new("create_reg_dlist", api.destroy_reg_dlist, create) }?;
        let (address, len) = (memory.address(), memory.len());
        let device = u64::from(memory.device().unwrap_or(0));
        // SAFETY: the list is alive; without metadata the pointer is not read.
        let status = unsafe {
            (api.reg_dlist_add_desc)(list.handle, address, len, device, std::ptr::null(), 0)
        };
        check("reg_dlist_add_desc", status)?;
        // SAFETY: all are alive, and the memory stays as long as `self` has it.
        let status = unsafe { (api.register_mem)(self.agent, list.handle, self.options) };
        check("register_mem", status)?;
        self.registered.push((list.into_handle(), memory));
        Ok(())
    }

    /// The metadata by which a peer reaches this agent and its memory.
    pub(crate) fn metadata(&self) -> Result<Vec<u8>, NixlError> {
        let (mut data, mut len): (*mut c_void, usize) = (null_mut(), 0);
        // SAFETY: the agent is alive; the call writes a pointer and a length.
        let status = unsafe { (self.api.get_local_md)(self.agent, &raw mut data, &raw mut len) };
        check("get_local_md", status)?;
        // SAFETY: on success the library hands over that many bytes.
        let bytes = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), len) }.to_vec();
        // SAFETY: they come from `malloc`, and nobody else has them.
        unsafe { sys::free(data) };
        Ok(bytes)
    }

    /// Loads a peer's metadata, to reach it. Returns the peer's name.
    pub(crate) fn load_peer(&self, metadata: &[u8]) -> Result<String, NixlError> {
        let mut name: *mut c_char = null_mut();
        let (data, len) = (metadata.as_ptr().cast(), metadata.len());
        // SAFETY: the agent is alive, the bytes are copied; the call writes a pointer.
        let status = unsafe { (self.api.load_remote_md)(self.agent, data, len, &raw mut name) };
        if status == sys::BACKEND_ERROR {
            return Err(NixlError::Unreachable);
        }
        check("load_remote_md", status)?;
        // SAFETY: on success it is a string.
        let text = unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned();
        // SAFETY: it comes from `malloc`, and nobody else has it.
        unsafe { sys::free(name.cast()) };
        Ok(text)
    }

    /// Forgets a peer, unless NIXL has done so itself. Its connections are closed, without waiting for it.
    pub(crate) fn forget_peer(&self, name: &str) -> Result<(), NixlError> {
        let name = c_string(name);
        // SAFETY: the agent is alive, the string is copied.
        match unsafe { (self.api.invalidate_remote_md)(self.agent, name.as_ptr()) } {
            sys::NOT_FOUND => Ok(()),
            status => check("invalidate_remote_md", status),
        }
    }

    /// Starts to read bytes of a peer into a slot. Nobody accesses the slot until the transfer has ended.
    pub(crate) fn read(
        &self,
        peer: &str,
        from: Remote,
        to: Slot,
    ) -> Result<RawTransfer<Slot>, NotStarted<Slot>> {
        match to.place() {
            // SAFETY: the place is the slot's, and the slot, which holds the right to access it, goes into the transfer.
            Ok(place) => unsafe { self.start_one(sys::READ, peer, &place, from, to) },
            Err(error) => Err(NotStarted { error, memory: to, unmoved: true }),
        }
    }

    /// Starts to write bytes to where a peer wants them. If the bytes change meanwhile, either state may be written.
    pub(crate) fn write(
        &self,
        peer: &str,
        from: Place,
        to: Remote,
    ) -> Result<RawTransfer<Place>, NotStarted<Place>> {
        let place = from.clone();
        // SAFETY: a place keeps its memory alive, and the transfer writes nothing to it.
        unsafe { self.start_one(sys::WRITE, peer, &place, to, from) }
    }

    /// Starts to write bytes to where they belong in a peer's memory, on its device of this number or of its host.
    pub(crate) fn write_parcel(
        &self,
        peer: &str,
        parcel: Parcel,
        device: Option<u32>,
    ) -> Result<RawTransfer<Parcel>, NotStarted<Parcel>> {
        let (here, there) = parcel.sides();
        let here = Side { parts: &here, device: parcel.device() };
        // SAFETY: these are bytes that the parcel has, and the transfer writes nothing to them.
        unsafe { self.start(sys::WRITE, peer, here, Side { parts: &there, device }, parcel) }
    }

    /// Starts a transfer of one part.
    ///
    /// # Safety
    ///
    /// As for [`start`](Self::start).
    unsafe fn start_one<M>(
        &self,
        way: std::ffi::c_int,
        peer: &str,
        local: &Place,
        remote: Remote,
        memory: M,
    ) -> Result<RawTransfer<M>, NotStarted<M>> {
        let (here, there) = ([(local.address, local.len)], [remote.range]);
        let here = Side { parts: &here, device: local.memory.device() };
        // SAFETY: as the caller guarantees.
        unsafe {
            self.start(way, peer, here, Side { parts: &there, device: remote.device }, memory)
        }
    }

    /// Starts a transfer.
    ///
    /// # Safety
    ///
    /// As long as `memory` is not dropped, the local bytes exist. If the transfer writes to them, only the holder of `memory` accesses
    /// them.
    unsafe fn start<M>(
        &self,
        way: std::ffi::c_int,
        peer: &str,
        local: Side<'_>,
        remote: Side<'_>,
        memory: M,
    ) -> Result<RawTransfer<M>, NotStarted<M>> {
        let created = self.create(way, peer, local, remote);
        let request = match created {
            Ok(request) => request,
            Err(error) => return Err(NotStarted { error, memory, unmoved: true }),
        };
        // SAFETY: agent and request are alive. `memory` goes into the transfer, which gives it back when it has ended.
        let status = unsafe { (self.api.post_xfer_req)(self.agent, request, null_mut()) };
        if status < sys::SUCCESS {
            // SAFETY: the request is this agent's, and nobody else has it.
            if !unsafe { self.release(request) } {
                tracing::error!("a transfer that did not start cannot be released");
            }
            // Some of several parts may have been moved.
            return Err(NotStarted {
                error: NixlError::Transfer { status },
                memory,
                unmoved: false,
            });
        }
        Ok(RawTransfer { request, agent: self.number, memory: Some(memory) })
    }

    fn create(
        &self,
        way: std::ffi::c_int,
        peer: &str,
        local: Side<'_>,
        remote: Side<'_>,
    ) -> Result<Handle, NixlError> {
        let (here, there) = (self.list(local)?, self.list(remote)?);
        let peer = c_string(peer);
        let mut request = null_mut();
        // SAFETY: all objects are alive; lists and string are copied, and memory that is not registered, here or
        // at the peer, is refused; the call writes the request.
        let status = unsafe {
            (self.api.create_xfer_req)(
                self.agent,
                way,
                here.handle,
                there.handle,
                peer.as_ptr(),
                &raw mut request,
                self.options,
            )
        };
        check("create_xfer_req", status)?;
        Ok(request)
    }

    fn list(&self, Side { parts, device }: Side<'_>) -> Result<Object, NixlError> {
        let api = self.api;
        let create = |object| {
            // SAFETY: the call writes the new object to where the pointer points.
            unsafe { (api.create_xfer_dlist)(kind(device), object) }
        };
        // SAFETY: the function destroys what the other one creates.
        let list = unsafe { Object::new("create_xfer_dlist", api.destroy_xfer_dlist, create) }?;
        let number = u64::from(device.unwrap_or(0));
        for &(address, len) in parts {
            // SAFETY: the list is alive.
            let status = unsafe { (api.xfer_dlist_add_desc)(list.handle, address, len, number) };
            check("xfer_dlist_add_desc", status)?;
        }
        Ok(list)
    }

    /// Sends a peer a few bytes.
    pub(crate) fn notify(&self, peer: &str, bytes: &[u8]) -> Result<(), NixlError> {
        let (peer, data) = (c_string(peer), bytes.as_ptr().cast());
        // SAFETY: agent and options are alive; string and bytes are copied.
        let status = unsafe {
            (self.api.gen_notif)(self.agent, peer.as_ptr(), data, bytes.len(), self.options)
        };
        if status < sys::SUCCESS { Err(NixlError::Transfer { status }) } else { Ok(()) }
    }

    /// The messages of peers since the last call, with the peers' names.
    pub(crate) fn notices(&mut self) -> Result<Vec<(String, Vec<u8>)>, NixlError> {
        let (api, map) = (self.api, self.notices);
        // SAFETY: all three are alive.
        check("get_notifs", unsafe { (api.get_notifs)(self.agent, map, self.options) })?;
        let mut peers = 0;
        // SAFETY: the map is alive; the call writes a number.
        check("notif_map_size", unsafe { (api.notif_map_size)(map, &raw mut peers) })?;
        let mut all = Vec::new();
        for peer in 0..peers {
            let mut name = std::ptr::null();
            // SAFETY: the map is alive; the call writes a pointer.
            let status = unsafe { (api.notif_map_get_agent_at)(map, peer, &raw mut name) };
            check("notif_map_get_agent_at", status)?;
            let mut count = 0;
            // SAFETY: the name is the map's own; the call writes a number.
            let status = unsafe { (api.notif_map_get_notifs_size)(map, name, &raw mut count) };
            check("notif_map_get_notifs_size", status)?;
            // SAFETY: on success it is a string, which the map keeps until it is cleared.
            let text = unsafe { CStr::from_ptr(name) }.to_string_lossy();
            for at in 0..count {
                let (mut data, mut len) = (std::ptr::null(), 0);
                // SAFETY: the name is the map's own; the call writes a pointer and a length.
                let status = unsafe {
                    (api.notif_map_get_notif)(map, name, at, &raw mut data, &raw mut len)
                };
                check("notif_map_get_notif", status)?;
                if len == 0 {
                    continue;
                }
                // SAFETY: on success that many bytes are there until the map is cleared.
                let bytes = unsafe { std::slice::from_raw_parts(data.cast::<u8>(), len) };
                all.push((text.clone().into_owned(), bytes.to_vec()));
            }
        }
        if peers > 0 {
            // SAFETY: the map is alive, and nothing refers to what is in it any more.
            check("notif_map_clear", unsafe { (api.notif_map_clear)(map) })?;
        }
        Ok(all)
    }

    /// Whether a transfer has ended.
    ///
    /// # Errors
    ///
    /// `Transfer` if it has failed, which is an end as well; `Unknown` if it belongs to another agent.
    pub(crate) fn is_done<M>(&self, transfer: &RawTransfer<M>) -> Result<bool, NixlError> {
        if transfer.agent != self.number {
            return Err(NixlError::Unknown);
        }
        // SAFETY: agent and request are alive, and belong together.
        match unsafe { (self.api.get_xfer_status)(self.agent, transfer.request) } {
            sys::SUCCESS => Ok(true),
            sys::IN_PROGRESS => Ok(false),
            status => Err(NixlError::Transfer { status }),
        }
    }

    /// Frees a transfer that has ended, successfully or not, and returns its memory: UCX no longer accesses it.
    ///
    /// # Errors
    ///
    /// The transfer, if the library still works on it. That cannot be stopped.
    pub(crate) fn end<M>(&self, mut transfer: RawTransfer<M>) -> Result<M, RawTransfer<M>> {
        match self.is_done(&transfer) {
            Ok(false) | Err(NixlError::Unknown) => return Err(transfer),
            Ok(true) | Err(_) => {}
        }
        // SAFETY: the request is this agent's. A transfer without its memory is never used again.
        if !unsafe { self.release(transfer.request) } {
            return Err(transfer);
        }
        transfer.memory.take().ok_or(transfer)
    }

    /// Closes the agent, and ends the transfers under way with it. Returns the memory of `kept`; that of the others is dropped.
    ///
    /// With its connections, nothing that peers may still send arrives any more.
    pub(crate) fn close<M>(
        self,
        kept: Vec<RawTransfer<M>>,
        others: Vec<RawTransfer<Place>>,
    ) -> Vec<M> {
        let (kept, others) = (self.release_all(kept), self.release_all(others));
        // UCX may access the memory until here.
        drop(self);
        drop(others);
        kept
    }

    /// Ends transfers of an agent that is about to be closed, and returns their memory.
    fn release_all<M>(&self, transfers: Vec<RawTransfer<M>>) -> Vec<M> {
        let mut memory = Vec::new();
        for mut transfer in transfers {
            // SAFETY: the request is this agent's, and the transfer ends here.
            if transfer.agent == self.number && unsafe { self.release(transfer.request) } {
                memory.extend(transfer.memory.take());
            }
        }
        memory
    }

    /// Frees a request. Returns false if the library refuses. If the transfer is under way, the library goes on with it.
    ///
    /// # Safety
    ///
    /// The request is one of this agent's, and is not used again after success.
    unsafe fn release(&self, request: Handle) -> bool {
        // SAFETY: the agent is alive, and the caller guarantees that the request is.
        let status = unsafe { (self.api.release_xfer_req)(self.agent, request) };
        if status != sys::SUCCESS {
            return false;
        }
        // SAFETY: a released request is an empty object, which the caller does not use again.
        let status = unsafe { (self.api.destroy_xfer_req)(request) };
        if status != sys::SUCCESS {
            tracing::debug!(status, "a transfer's shell was not freed");
        }
        true
    }
}

impl Drop for RawAgent {
    fn drop(&mut self) {
        let api = self.api;
        let told = |call, status| {
            if let Err(error) = check(call, status) {
                tracing::warn!(%error, "while closing the agent");
            }
        };
        for (list, _) in &self.registered {
            // SAFETY: agent, list and options are alive.
            told("deregister_mem", unsafe {
                (api.deregister_mem)(self.agent, *list, self.options)
            });
            // SAFETY: nobody else has the list.
            told("destroy_reg_dlist", unsafe { (api.destroy_reg_dlist)(*list) });
        }
        if !self.notices.is_null() {
            // SAFETY: nobody else has the object.
            told("destroy_notif_map", unsafe { (api.destroy_notif_map)(self.notices) });
        }
        if !self.options.is_null() {
            // SAFETY: nobody else has the object.
            told("destroy_opt_args", unsafe { (api.destroy_opt_args)(self.options) });
        }
        if !self.backend.is_null() {
            // SAFETY: the handle identifies an object of the agent, and nobody else has it.
            told("destroy_backend", unsafe { (api.destroy_backend)(self.backend) });
        }
        // SAFETY: nobody else has the agent; its transfers were released.
        told("destroy_agent", unsafe { (api.destroy_agent)(self.agent) });
        tracing::trace!(pieces = self.registered.len(), "the agent is closed");
    }
}

/// The UCX plugin's parameter that takes UCX's own options.
pub(crate) const ENGINE_CONFIG: &str = "engine_config";

/// The settings that limit UCX's choice of transports and interfaces, for messages.
fn settings(parameters: &[(&str, &str)]) -> String {
    let of_engine = parameters.iter().find(|(key, _)| *key == ENGINE_CONFIG);
    let of_engine = of_engine.map(|(_, value)| (*value).to_owned());
    let of_environment = ["UCX_TLS", "UCX_NET_DEVICES"].into_iter().filter_map(|name| {
        let value = std::env::var_os(name)?;
        Some(format!("{name}={}", value.display()))
    });
    let all: Vec<String> = of_engine.into_iter().chain(of_environment).collect();
    if all.is_empty() { "its own choice".into() } else { all.join(", ") }
}

/// A small object of the library, destroyed when dropped.
struct Object {
    handle: Handle,
    destroy: unsafe extern "C" fn(Handle) -> Status,
}

impl Object {
    /// # Safety
    ///
    /// `create` writes an object to its argument, or fails. `destroy` is the library's function for objects of that kind.
    unsafe fn new(
        call: &'static str,
        destroy: unsafe extern "C" fn(Handle) -> Status,
        create: impl FnOnce(*mut Handle) -> Status,
    ) -> Result<Self, NixlError> {
        let mut handle = null_mut();
        check(call, create(&raw mut handle))?;
        Ok(Self { handle, destroy })
    }

    fn into_handle(self) -> Handle {
        std::mem::ManuallyDrop::new(self).handle
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        // SAFETY: the function is the one for this kind of object, which nobody else has.
        let status = unsafe { (self.destroy)(self.handle) };
        if status != sys::SUCCESS {
            tracing::debug!(status, "an object of NIXL was not freed");
        }
    }
}
