//! NIXL's objects: one function per call, status in, `Result` out.
#![allow(unsafe_code, reason = "calling NIXL's C interface")]

use std::ffi::{CStr, CString, c_char, c_void};
use std::ptr::null_mut;

use crate::arena::{Arena, Memory};
use crate::error::NixlError;
use crate::sys::{self, AgentConfig, Api, Handle, Status};

/// An agent with its UCX backend and the registered memory of one arena.
///
/// Not `Send`: NIXL does not lock, so one thread has it from beginning to end.
#[derive(Debug)]
pub(crate) struct RawAgent {
    api: &'static Api,
    agent: Handle,
    backend: Handle,
    options: Handle,
    /// Where messages of peers are taken from.
    notices: Handle,
    /// What is registered. The memory stays as long as NIXL knows it.
    registered: Vec<(Handle, Memory)>,
}

/// Which way a transfer goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// From the peer to here.
    Read,
    /// From here to the peer.
    Write,
}

/// A transfer that was started.
#[derive(Debug)]
pub(crate) struct RawTransfer {
    request: Handle,
}

fn check(call: &'static str, status: Status) -> Result<(), NixlError> {
    if status == sys::SUCCESS { Ok(()) } else { Err(NixlError::Call { call, status }) }
}

/// The kind of memory of a device's number, or of the host.
fn kind(device: Option<u32>) -> std::ffi::c_int {
    if device.is_some() { sys::VRAM } else { sys::DRAM }
}

/// A name for the library; one with a zero in it ends there.
fn c_string(text: &str) -> CString {
    let bytes: Vec<u8> = text.bytes().take_while(|&byte| byte != 0).collect();
    CString::new(bytes).unwrap_or_default()
}

impl RawAgent {
    /// An agent with a UCX backend of these parameters, which has registered the arena. If the library is
    /// not to look after it in a thread of its own, things go on while calls look for messages or for the
    /// end of a transfer.
    pub(crate) fn new(
        api: &'static Api,
        name: &str,
        parameters: &[(&str, &str)],
        arena: &Arena,
        own_thread: bool,
    ) -> Result<Self, NixlError> {
        let config = AgentConfig {
            enable_prog_thread: own_thread,
            enable_listen_thread: false,
            listen_port: 0,
            thread_sync: 0,
            num_workers: 1,
            // What there is to do wakes the library's thread; without a pause it would look all the time.
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
        // From here on, dropping it frees what was made.
        let mut this = Self {
            api,
            agent,
            backend: null_mut(),
            options: null_mut(),
            notices: null_mut(),
            registered: Vec::new(),
        };
        this.create_backend(parameters)?;
        // SAFETY: the call writes the new object to where the pointer points.
        check("create_notif_map", unsafe { (api.create_notif_map)(&raw mut this.notices) })?;
        this.register(arena.memory().clone())?;
        Ok(this)
    }

    fn create_backend(&mut self, parameters: &[(&str, &str)]) -> Result<(), NixlError> {
        let api = self.api;
        let params = Object::new("create_params", api.destroy_params, |object| {
            // SAFETY: the call writes the new object to where the pointer points.
            unsafe { (api.create_params)(object) }
        })?;
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
            let transports = parameters.iter().find(|(key, _)| *key == ENGINE_CONFIG);
            let transports = transports.map_or("all", |(_, value)| value).to_owned();
            return Err(NixlError::Transports { transports, status });
        }
        // SAFETY: the call writes the new object to where the pointer points.
        check("create_opt_args", unsafe { (api.create_opt_args)(&raw mut self.options) })?;
        // SAFETY: both objects are alive.
        let status = unsafe { (api.opt_args_add_backend)(self.options, self.backend) };
        check("opt_args_add_backend", status)
    }

    /// Lets peers reach memory that belongs to the arena.
    pub(crate) fn register(&mut self, memory: Memory) -> Result<(), NixlError> {
        let api = self.api;
        let list = Object::new("create_reg_dlist", api.destroy_reg_dlist, |object| {
            // SAFETY: the call writes the new object to where the pointer points.
            unsafe { (api.create_reg_dlist)(kind(memory.device()), object) }
        })?;
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

    /// What a peer needs to reach this agent and its memory.
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

    /// Learns to reach a peer; the peer's name.
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

    /// Forgets a peer, if NIXL has not by itself: its connections are closed, without waiting for it.
    pub(crate) fn forget_peer(&self, name: &str) -> Result<(), NixlError> {
        let name = c_string(name);
        // SAFETY: the agent is alive, the string is copied.
        match unsafe { (self.api.invalidate_remote_md)(self.agent, name.as_ptr()) } {
            sys::NOT_FOUND => Ok(()),
            status => check("invalidate_remote_md", status),
        }
    }

    /// Starts to copy between memory of a peer and of the arena, each on the device of that number
    /// or the host's.
    ///
    /// # Contract
    ///
    /// `local` lies within the arena. If it is written to, nobody else accesses it until the transfer
    /// is released.
    pub(crate) fn start(
        &self,
        way: Way,
        peer: &str,
        (local, local_device): ((usize, usize), Option<u32>),
        (remote, remote_device): ((usize, usize), Option<u32>),
    ) -> Result<RawTransfer, NixlError> {
        let here = self.list(local, local_device)?;
        let there = self.list(remote, remote_device)?;
        let way = match way {
            Way::Read => sys::READ,
            Way::Write => sys::WRITE,
        };
        let peer = c_string(peer);
        let mut request = null_mut();
        // SAFETY: all objects are alive; lists and string are copied; the call writes the request.
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
        let mut transfer = RawTransfer { request };
        // SAFETY: agent and request are alive; the caller keeps the local memory.
        let status = unsafe { (self.api.post_xfer_req)(self.agent, request, null_mut()) };
        if status < sys::SUCCESS {
            if !self.release(&mut transfer) {
                tracing::error!("a transfer that did not start cannot be released");
            }
            return Err(NixlError::Transfer { status });
        }
        Ok(transfer)
    }

    fn list(
        &self,
        (address, len): (usize, usize),
        device: Option<u32>,
    ) -> Result<Object, NixlError> {
        let api = self.api;
        let list = Object::new("create_xfer_dlist", api.destroy_xfer_dlist, |object| {
            // SAFETY: the call writes the new object to where the pointer points.
            unsafe { (api.create_xfer_dlist)(kind(device), object) }
        })?;
        let number = u64::from(device.unwrap_or(0));
        // SAFETY: the list is alive.
        let status = unsafe { (api.xfer_dlist_add_desc)(list.handle, address, len, number) };
        check("xfer_dlist_add_desc", status)?;
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

    /// What peers have sent since the last call: who, and the bytes.
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
    pub(crate) fn is_done(&self, transfer: &RawTransfer) -> Result<bool, NixlError> {
        // SAFETY: agent and request are alive.
        match unsafe { (self.api.get_xfer_status)(self.agent, transfer.request) } {
            sys::SUCCESS => Ok(true),
            sys::IN_PROGRESS => Ok(false),
            status => Err(NixlError::Transfer { status }),
        }
    }

    /// Ends a transfer, if need be before it is done; false if the library still works on it.
    pub(crate) fn release(&self, transfer: &mut RawTransfer) -> bool {
        if transfer.request.is_null() {
            return true;
        }
        // SAFETY: agent and request are alive.
        let status = unsafe { (self.api.release_xfer_req)(self.agent, transfer.request) };
        if status != sys::SUCCESS {
            return false;
        }
        // SAFETY: released, it is only a shell, which nobody has besides.
        let status = unsafe { (self.api.destroy_xfer_req)(transfer.request) };
        transfer.request = null_mut();
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
            // SAFETY: the handle is a name for what belongs to the agent, and nobody else has it.
            told("destroy_backend", unsafe { (api.destroy_backend)(self.backend) });
        }
        // SAFETY: nobody else has the agent; its transfers were released.
        told("destroy_agent", unsafe { (api.destroy_agent)(self.agent) });
        tracing::trace!(pieces = self.registered.len(), "the agent is closed");
    }
}

/// The UCX plugin's parameter that takes UCX's own options.
pub(crate) const ENGINE_CONFIG: &str = "engine_config";

/// A small object of the library, destroyed when dropped.
struct Object {
    handle: Handle,
    destroy: unsafe extern "C" fn(Handle) -> Status,
}

impl Object {
    fn new(
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
