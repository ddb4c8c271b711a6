//! What environment variables say. This is the one place that lists them.
//!
//! Of HCCL's own variables the simulator knows these, with their usual meanings:
//!
//! | variable | default | |
//! |---|---|---|
//! | `HCCL_CONNECT_TIMEOUT` | 120 | seconds, 120 to 7200, that joining a communicator and the first operation of a kind may wait |
//! | `HCCL_EXEC_TIMEOUT` | 1836 | seconds that an operation may wait on a stream; 0 is for ever |
//! | `HCCL_BUFFSIZE` | 200 | megabytes; a communicator takes twice as many of its device |
//! | `HCCL_IF_IP` | 127.0.0.1 | the address that listeners use |
//! | `HCCL_HOST_SOCKET_PORT_RANGE` | 60000-60031 | the ports of a root's listener: `auto`, or `FIRST-LAST` |
//! | `HCCL_NPU_SOCKET_PORT_RANGE` | | has to be `auto` as well, where processes of one named machine share a chip |
//! | `ASCEND_RT_VISIBLE_DEVICES` | all | the chips that devices 0, 1, … are |
//!
//! Its own ones are these. Another one that begins with `HCCL_SIM_`, or a value that is not
//! understood, ends the process.
//!
//! | variable | default | |
//! |---|---|---|
//! | `HCCL_SIM_CHIP` | A2 | `A2`, `A3` or `950`: which data types there are |
//! | `HCCL_SIM_DEVICES` | 8 | chips of a machine |
//! | `HCCL_SIM_DEVICE_MB` | 65536 | memory of a chip that a process may take, in megabytes |
//! | `HCCL_SIM_LINKS` | 32 | links to other ranks that a process may have at a time |
//! | `HCCL_SIM_TIME_SCALE` | 1 | HCCL's two timeouts are multiplied by it |
//! | `HCCL_SIM_LAZY` | 0 | with 1, nothing on a stream runs before someone synchronises or queries |
//! | `HCCL_SIM_SEED` | 1 | of the delays |
//! | `HCCL_SIM_DELAY_US` | 300 | the longest delay before anything on a stream, in microseconds |
//! | `HCCL_SIM_MACHINE` | | the name of the machine. Ranks with another name are on another machine; where there is a name, its chips' ports are taken by one process at a time |
//! | `HCCL_SIM_KILL_AT` | | this process ends by SIGKILL in the middle of that operation, counted from 1 |
//! | `HCCL_SIM_HANG_AT` | | that operation of this process never ends by itself |
//! | `HCCL_SIM_ASYNC_ERROR_AT` | | that operation of this process fails with 507056, and its communicator has the asynchronous error 21 from then on |
//! | `HCCL_SIM_OOM_AT` | | that `aclrtMalloc` of this process finds no memory |
//! | `HCCL_SIM_COMM_OOM_AT` | | that communicator of this process finds no memory |
//! | `HCCL_SIM_LOST_AT` | | that communicator of this process never reaches the others, nor they it |

use std::net::{IpAddr, Ipv4Addr};
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use crate::instance::fail;

/// What kind of chips the machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chip {
    A2,
    A3,
    Ascend950,
}

impl FromStr for Chip {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "A2" => Ok(Self::A2),
            "A3" => Ok(Self::A3),
            "950" => Ok(Self::Ascend950),
            _ => Err(()),
        }
    }
}

/// The ports of a root's listener.
#[derive(Clone, Debug)]
pub(crate) enum Ports {
    Auto,
    Range(RangeInclusive<u16>),
}

#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) chip: Chip,
    /// Of the machine.
    pub(crate) chips: i32,
    /// The chip behind each device number.
    pub(crate) devices: Vec<i32>,
    pub(crate) device_bytes: u64,
    pub(crate) links: u64,
    pub(crate) connect_timeout: Duration,
    /// Without one, for ever.
    pub(crate) exec_timeout: Option<Duration>,
    pub(crate) buffer_bytes: u64,
    pub(crate) address: IpAddr,
    pub(crate) ports: Ports,
    /// Whether processes may share a chip.
    pub(crate) shared_ports: bool,
    pub(crate) lazy: bool,
    pub(crate) seed: u64,
    pub(crate) delay_us: u64,
    pub(crate) machine: String,
    pub(crate) kill_at: Option<u64>,
    pub(crate) hang_at: Option<u64>,
    pub(crate) async_error_at: Option<u64>,
    pub(crate) oom_at: Option<u64>,
    pub(crate) comm_oom_at: Option<u64>,
    pub(crate) lost_at: Option<u64>,
}

const OWN: [&str; 15] = [
    "CHIP",
    "DEVICES",
    "DEVICE_MB",
    "LINKS",
    "TIME_SCALE",
    "LAZY",
    "SEED",
    "DELAY_US",
    "MACHINE",
    "KILL_AT",
    "HANG_AT",
    "ASYNC_ERROR_AT",
    "OOM_AT",
    "COMM_OOM_AT",
    "LOST_AT",
];

impl Settings {
    pub(crate) fn read() -> Self {
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if name.strip_prefix("HCCL_SIM_").is_some_and(|own| !OWN.contains(&own)) {
                fail(&format!("{name} is not a setting of the simulator"));
            }
        }
        let scale: f64 = parsed("HCCL_SIM_TIME_SCALE", 1.0);
        if !(scale > 0.0 && scale <= 1e6) {
            fail("HCCL_SIM_TIME_SCALE has to be a positive number");
        }
        let connect: u64 = parsed("HCCL_CONNECT_TIMEOUT", 120);
        if !(120..=7200).contains(&connect) {
            fail("HCCL_CONNECT_TIMEOUT has to be between 120 and 7200");
        }
        let exec: u64 = parsed("HCCL_EXEC_TIMEOUT", 1836);
        let scaled = |seconds: u64| Duration::from_secs_f64(seconds as f64 * scale);
        let buffer: u64 = parsed("HCCL_BUFFSIZE", 200);
        if buffer == 0 {
            fail("HCCL_BUFFSIZE has to be at least 1");
        }
        let chips = parsed("HCCL_SIM_DEVICES", 8);
        Self {
            chip: parsed("HCCL_SIM_CHIP", Chip::A2),
            chips,
            devices: devices(chips),
            device_bytes: parsed::<u64>("HCCL_SIM_DEVICE_MB", 65536) << 20,
            links: parsed("HCCL_SIM_LINKS", 32),
            connect_timeout: scaled(connect),
            exec_timeout: (exec > 0).then(|| scaled(exec)),
            buffer_bytes: buffer << 20,
            address: parsed("HCCL_IF_IP", IpAddr::V4(Ipv4Addr::LOCALHOST)),
            ports: ports(),
            shared_ports: ["HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE"]
                .iter()
                .all(|name| text(name).is_some_and(|value| value == "auto")),
            lazy: parsed::<u8>("HCCL_SIM_LAZY", 0) != 0,
            seed: parsed("HCCL_SIM_SEED", 1),
            delay_us: parsed("HCCL_SIM_DELAY_US", 300),
            machine: text("HCCL_SIM_MACHINE").unwrap_or_default(),
            kill_at: optional("HCCL_SIM_KILL_AT"),
            hang_at: optional("HCCL_SIM_HANG_AT"),
            async_error_at: optional("HCCL_SIM_ASYNC_ERROR_AT"),
            oom_at: optional("HCCL_SIM_OOM_AT"),
            comm_oom_at: optional("HCCL_SIM_COMM_OOM_AT"),
            lost_at: optional("HCCL_SIM_LOST_AT"),
        }
    }
}

fn text(name: &str) -> Option<String> {
    std::env::var_os(name)
        .map(|value| value.into_string().unwrap_or_else(|_| fail(&format!("{name} is not text"))))
}

fn optional<T: FromStr>(name: &str) -> Option<T> {
    let text = text(name).filter(|text| !text.is_empty())?;
    let value = text.trim().parse();
    Some(value.unwrap_or_else(|_| fail(&format!("{name}={text} is not understood"))))
}

fn parsed<T: FromStr>(name: &str, default: T) -> T {
    optional(name).unwrap_or(default)
}

fn ports() -> Ports {
    const NAME: &str = "HCCL_HOST_SOCKET_PORT_RANGE";
    match text(NAME).filter(|text| !text.is_empty()) {
        None => Ports::Range(60000..=60031),
        Some(text) if text == "auto" => Ports::Auto,
        Some(text) => {
            let range = text.split_once('-').and_then(|(first, last)| {
                Some(Ports::Range(first.trim().parse().ok()?..=last.trim().parse().ok()?))
            });
            range.unwrap_or_else(|| fail(&format!("{NAME}={text} is not understood")))
        }
    }
}

/// As the runtime does, what comes after a number that is not a chip's does not count.
fn devices(chips: i32) -> Vec<i32> {
    match text("ASCEND_RT_VISIBLE_DEVICES").filter(|text| !text.is_empty()) {
        None => (0..chips).collect(),
        Some(visible) => visible
            .split(',')
            .map_while(|number| number.trim().parse().ok())
            .take_while(|number| (0..chips).contains(number))
            .collect(),
    }
}
