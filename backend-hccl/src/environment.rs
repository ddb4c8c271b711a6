//! What of the environment HCCL and its users trip over, in words. Pure.

use std::time::Duration;

/// The least and the most that `HCCL_CONNECT_TIMEOUT` takes, in seconds.
const CONNECT: (u64, u64) = (120, 7200);
/// The least that makes sense for `HCCL_EXEC_TIMEOUT`: hardware counts in steps of it.
const EXEC: u64 = 68;

/// HCCL's own timeouts for a deadline, in seconds: as short as they may be.
///
/// They end the calls that take no limit: joining a communicator, and what is under way where a stream
/// cannot be aborted. The first to enter an update join before the trainer does, which waits for the last one:
/// they are to hear from it who that was, and not from HCCL that somebody was missing.
pub(crate) fn timeouts(deadline: Duration) -> [(&'static str, u64); 2] {
    let seconds = deadline.as_secs_f64().ceil() as u64;
    [
        ("HCCL_CONNECT_TIMEOUT", seconds.saturating_mul(3).clamp(CONNECT.0, CONNECT.1)),
        ("HCCL_EXEC_TIMEOUT", seconds.saturating_add(1).clamp(EXEC, 17_340)),
    ]
}

/// The NPU that a device number stands for, with the numbers that `ASCEND_RT_VISIBLE_DEVICES` gives them.
pub(crate) fn visible(device: i32, list: Option<&str>) -> i32 {
    let Some(list) = list.filter(|list| !list.trim().is_empty()) else { return device };
    let number = usize::try_from(device).ok().and_then(|device| list.split(',').nth(device));
    number.and_then(|number| number.trim().parse().ok()).unwrap_or(device)
}

/// What is likely to go wrong with an environment, and what to set.
pub(crate) fn warnings(get: impl Fn(&str) -> Option<String>, deadline: Duration) -> Vec<String> {
    let get = |name: &str| get(name).filter(|value| !value.trim().is_empty());
    let mut found = Vec::new();
    if get("HCCL_IF_IP").is_none() && get("HCCL_SOCKET_IFNAME").is_none() {
        found.push(
            "neither HCCL_IF_IP nor HCCL_SOCKET_IFNAME is set: HCCL takes the first network \
             interface that it finds, which has to be one that all hosts reach"
                .to_owned(),
        );
    }
    match get("HCCL_WHITELIST_DISABLE").as_deref() {
        Some("1") => {}
        Some(_) if get("HCCL_WHITELIST_FILE").is_some() => {}
        Some(_) => found.push(
            "HCCL_WHITELIST_DISABLE is not 1, and HCCL_WHITELIST_FILE names no list: HCCL refuses \
             all peers"
                .to_owned(),
        ),
        None => found.push(
            "HCCL_WHITELIST_DISABLE is not set, and its default differs between versions: set it to \
             1, or to 0 with HCCL_WHITELIST_FILE"
                .to_owned(),
        ),
    }
    let auto = |name: &str| get(name).is_some_and(|value| value.eq_ignore_ascii_case("auto"));
    let (host, npu) = ("HCCL_HOST_SOCKET_PORT_RANGE", "HCCL_NPU_SOCKET_PORT_RANGE");
    if auto(host) != auto(npu) {
        found.push(format!(
            "of {host} and {npu} only one is `auto`: several processes on one NPU need both"
        ));
    }
    if let Some(text) = get("HCCL_CONNECT_TIMEOUT") {
        match text.trim().parse::<u64>() {
            Ok(seconds) if (CONNECT.0..=CONNECT.1).contains(&seconds) => {}
            _ => found.push(format!(
                "HCCL_CONNECT_TIMEOUT is `{text}`; HCCL takes {} to {} seconds",
                CONNECT.0, CONNECT.1
            )),
        }
    }
    if let Some(seconds) = get("HCCL_EXEC_TIMEOUT").and_then(|text| text.trim().parse::<u64>().ok())
        && seconds > 0
        && seconds < deadline.as_secs()
    {
        found.push(format!(
            "HCCL_EXEC_TIMEOUT is {seconds} s, and timeout_seconds {} s: broadcasts fail before \
             their deadline",
            deadline.as_secs()
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Vec<String> {
        let get = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        warnings(get, Duration::from_secs(60))
    }

    #[test]
    fn an_environment_that_says_everything_is_not_warned_about() {
        let set = [("HCCL_IF_IP", "10.0.0.1"), ("HCCL_WHITELIST_DISABLE", "1")];
        assert_eq!(of(&set), [""; 0]);
        let set = [
            ("HCCL_SOCKET_IFNAME", "eth0"),
            ("HCCL_WHITELIST_DISABLE", "0"),
            ("HCCL_WHITELIST_FILE", "/etc/list"),
            ("HCCL_HOST_SOCKET_PORT_RANGE", "auto"),
            ("HCCL_NPU_SOCKET_PORT_RANGE", "auto"),
            ("HCCL_CONNECT_TIMEOUT", "240"),
            ("HCCL_EXEC_TIMEOUT", "68"),
        ];
        assert_eq!(of(&set), [""; 0]);
    }

    #[test]
    fn every_pitfall_is_named_with_its_variable() {
        let bare = of(&[]).join("\n");
        assert!(bare.contains("HCCL_IF_IP") && bare.contains("HCCL_WHITELIST_DISABLE"), "{bare}");
        let base = [("HCCL_IF_IP", "10.0.0.1"), ("HCCL_WHITELIST_DISABLE", "1")];
        for (name, value) in [
            ("HCCL_HOST_SOCKET_PORT_RANGE", "auto"),
            ("HCCL_NPU_SOCKET_PORT_RANGE", "auto"),
            ("HCCL_CONNECT_TIMEOUT", "60"),
            ("HCCL_CONNECT_TIMEOUT", "soon"),
            ("HCCL_EXEC_TIMEOUT", "59"),
        ] {
            let found = of(&[base[0], base[1], (name, value)]);
            assert!(found.len() == 1 && found[0].contains(name), "{name}={value}: {found:?}");
        }
        let closed = of(&[base[0], ("HCCL_WHITELIST_DISABLE", "0")]);
        assert!(closed[0].contains("refuses all peers"), "{closed:?}");
    }

    #[test]
    fn a_device_is_the_npu_that_stands_at_its_place_in_the_list() {
        assert_eq!(visible(3, None), 3);
        assert_eq!(visible(3, Some("")), 3);
        assert_eq!([0, 1].map(|device| visible(device, Some("5, 2"))), [5, 2]);
        assert_eq!([0, 1, 2].map(|device| visible(device, Some("x"))), [0, 1, 2]);
    }

    #[test]
    fn timeouts_follow_the_deadline_within_what_the_library_takes() {
        let of = |seconds| timeouts(Duration::from_secs(seconds)).map(|(_, value)| value);
        assert_eq!(of(2), [120, 68]);
        assert_eq!(of(600), [1800, 601]);
        assert_eq!(of(1_000_000), [7200, 17_340]);
    }
}
