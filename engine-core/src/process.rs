//! What the system says of processes of this host.

/// A process, as the system has it at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcessStat {
    /// When it began, in the system's ticks. A number is given to another process later, which began later.
    pub began: u64,
    /// The processor time of all its threads so far, in the system's ticks.
    pub ran: u64,
    /// Whether nothing of it runs any more: it is a zombie, which nobody has waited for yet, and has no other threads. Of a process that was
    /// killed, the first thread may be a zombie while others still wait for a device.
    pub has_ended: bool,
}

impl ProcessStat {
    /// The process of this number. `None` if there is none, and if it cannot be inspected.
    pub fn of(pid: u32) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    fn parse(stat: &str) -> Option<Self> {
        // The name in parentheses may contain any character. After it come the state, as the 12th and 13th field the time in the program and in
        // the system, as the 18th the number of threads, and as the 20th when it began.
        let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
        let is_zombie = matches!(fields.next()?, "Z" | "X");
        let [program, system]: [u64; 2] =
            [fields.nth(10)?.parse().ok()?, fields.next()?.parse().ok()?];
        let threads: u64 = fields.nth(4)?.parse().ok()?;
        let began = fields.nth(1)?.parse().ok()?;
        Some(Self { began, ran: program + system, has_ended: is_zombie && threads <= 1 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_zombie_has_ended_when_no_other_thread_of_it_is_left() {
        let parse = |state: &str, threads: u32| {
            ProcessStat::parse(&format!(
                "42 (a) b) {state} 1 42 42 0 -1 4 0 0 0 0 5 2 0 0 20 0 {threads} 0 1234 0 0 18"
            ))
        };
        for (state, threads, has_ended) in [("S", 1, false), ("Z", 2, false), ("Z", 1, true)] {
            let expected = ProcessStat { began: 1234, ran: 7, has_ended };
            assert_eq!(parse(state, threads), Some(expected), "{state}, {threads} threads");
        }
        assert_eq!(ProcessStat::parse("42 (a"), None);
        let own = ProcessStat::of(std::process::id());
        assert!(own.is_some_and(|own| !own.has_ended));
        assert_eq!(ProcessStat::of(u32::MAX), None);
    }
}
