//! What is there, and whether it works: the first thing to run on a machine with NPUs.
//!
//! Whatever a library could bring down with it, or hang in, happens in child processes, which end when
//! their time is over.

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use collective::{Communicator, Shape, Thread, Wait};
use engine_core::{Error, ErrorKind, Result, digest};
use serde::Serialize;

use crate::comm::{self, HcclCommunicator, Plan};
use crate::error::HcclError;
use crate::ffi::{self, Device, IpcKey};
use crate::{environment, sys};

/// How long the child processes of one check may take.
const LIMIT: Duration = Duration::from_secs(300);
/// The deadline of every wait within them.
const DEADLINE: Duration = Duration::from_secs(30);
/// What is broadcast and shared.
const BYTES: usize = 2 << 20;
/// How often groups are formed anew.
const REBUILDS: u32 = 50;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Verdict {
    /// It works.
    Pass,
    /// It does not.
    Fail,
    /// It cannot be found out here.
    Skip,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pass => "pass",
            Self::Fail => "FAIL",
            Self::Skip => "skip",
        })
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// How it ended.
    pub verdict: Verdict,
    /// What was found, in words.
    pub details: String,
}

/// Everything that was found.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Examination {
    /// Whether the libraries are a simulator's: then nothing here says anything of hardware.
    pub simulated: bool,
    /// The checks, in their order.
    pub checks: Vec<Check>,
}

impl Examination {
    /// Whether nothing has failed.
    pub fn passed(&self) -> bool {
        self.checks.iter().all(|check| check.verdict != Verdict::Fail)
    }

    fn add(&mut self, name: &'static str, verdict: Verdict, details: impl Into<String>) {
        self.checks.push(Check { name, verdict, details: details.into() });
    }
}

/// Looks at the libraries, and tries them: a broadcast between two processes, many groups one after the
/// other, memory shared between processes. `child` gives the command of a process that calls
/// [`child`] with a text. Blocks, for minutes if something hangs.
pub fn examine(library_dir: Option<&Path>, child: &dyn Fn(&str) -> Command) -> Examination {
    let mut found = Examination { simulated: false, checks: Vec::new() };
    let api = match comm::load(library_dir, DEADLINE) {
        Ok(api) => api,
        Err(error) => {
            found.add("libraries", Verdict::Fail, error.to_string());
            return found;
        }
    };
    found.simulated = comm::is_simulated(api);
    let paths: Vec<String> =
        api.found.paths.iter().map(|path| path.display().to_string()).collect();
    found.add("libraries", Verdict::Pass, paths.join(", "));
    let soc = ffi::soc_name(api).unwrap_or_else(|| "unknown".into());
    found.add("version", Verdict::Pass, format!("{}, chip {soc}", comm::describe(api)));
    let absent = &api.found.absent;
    let all = sys::FUNCTIONS.iter().filter(|(name, _)| !name.starts_with("HcclSim"));
    let (names, optional): (Vec<_>, Vec<_>) = all.copied().partition(|(_, optional)| !optional);
    let lacking: Vec<&str> =
        absent.iter().copied().filter(|name| !name.starts_with("HcclSim")).collect();
    let (needed, had) = (names.len(), optional.len() - lacking.len());
    let lacks = if lacking.is_empty() {
        String::new()
    } else {
        format!("; it lacks {}", lacking.join(", "))
    };
    let words = format!("all {needed} that are needed, {had} of {} others{lacks}", optional.len());
    found.add("functions", Verdict::Pass, words);
    match ffi::config_capability(api) {
        Some(bits) => found.add("config capability", Verdict::Pass, bits.to_string()),
        None => found.add("config capability", Verdict::Skip, "the libraries do not say it"),
    }
    let warnings = environment::warnings(|name| std::env::var(name).ok(), DEADLINE);
    match warnings.is_empty() {
        true => found.add("environment", Verdict::Pass, "nothing to warn of"),
        false => found.add("environment", Verdict::Skip, warnings.join("; ")),
    }
    let count = match ffi::device_count(api) {
        Ok(count) => count,
        Err(error) => {
            found.add("NPUs", Verdict::Fail, error.to_string());
            return found;
        }
    };
    let verdict = if count == 0 { Verdict::Fail } else { Verdict::Pass };
    found.add("NPUs", verdict, count.to_string());
    for (name, rounds) in [("broadcast", 1), ("rebuilds", REBUILDS)] {
        if count < 2 {
            found.add(name, Verdict::Skip, "it takes two NPUs");
            continue;
        }
        let commands = [child(&format!("pair 0 {rounds}")), child(&format!("pair 1 {rounds}"))];
        judge(&mut found, name, pair(commands, rounds));
    }
    let can_share = ["aclrtIpcMemGetExportKey", "aclrtIpcMemImportByKey", "aclrtIpcMemClose"];
    if can_share.iter().any(|name| absent.contains(name)) {
        let words =
            "the libraries lack the functions for it: processes cannot share an NPU's memory";
        found.add("sharing memory", Verdict::Skip, words);
    } else if count > 0 {
        let commands = [child("export"), child("import")];
        judge(&mut found, "sharing memory", share(commands));
    }
    found
}

fn judge(found: &mut Examination, name: &'static str, result: Result<String>) {
    match result {
        Ok(words) => found.add(name, Verdict::Pass, words),
        Err(error) => found.add(name, Verdict::Fail, error.to_string()),
    }
}

fn failed(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Backend, "trying HCCL", message)
}

/// Two ranks in processes of their own, with one group after the other.
fn pair(commands: [Command; 2], rounds: u32) -> Result<String> {
    let begun = Instant::now();
    let mut ranks = Processes::start(commands)?;
    let mut free = [Vec::new(), Vec::new()];
    for round in 0..rounds {
        let root = ranks.hear(0, "root")?;
        ranks.say(1, &root)?;
        let expected = format!("{:016x}", sum(&pattern(round)));
        for (rank, free) in free.iter_mut().enumerate() {
            let digest = ranks.hear(rank, "digest")?;
            if digest != expected {
                let words = format!(
                    "rank {rank} has digest {digest} in round {round}, {expected} was sent"
                );
                return Err(failed(words));
            }
            free.push(ranks.hear(rank, "free")?.parse::<u64>().unwrap_or(0));
        }
    }
    for free in &free {
        // After the first round everything is there that stays.
        if let (Some(&first), Some(&last)) = (free.first(), free.last())
            && last < first
        {
            return Err(failed(format!("{} bytes of an NPU were not given back", first - last)));
        }
    }
    ranks.end()?;
    let seconds = begun.elapsed().as_secs_f64();
    Ok(format!(
        "{BYTES} bytes between 2 processes in {rounds} groups, digests equal, nothing leaked ({seconds:.1} s)"
    ))
}

/// A process that shares its memory, and another one that reads it.
fn share(commands: [Command; 2]) -> Result<String> {
    let mut both = Processes::start(commands)?;
    let key = both.hear(0, "key")?;
    both.say(1, &key)?;
    let (digest, expected) = (both.hear(1, "digest")?, format!("{:016x}", sum(&pattern(0))));
    if digest != expected {
        return Err(failed(format!("the other process reads digest {digest}, not {expected}")));
    }
    both.hear(1, "closed")?;
    both.say(0, "closed")?;
    both.end()?;
    Ok(format!("{BYTES} bytes read by another process of the NPU, digest equal"))
}

/// Two child processes that are talked to in lines. Killed when dropped.
struct Processes {
    children: Vec<(Child, Option<ChildStdin>)>,
    said: Receiver<(usize, String)>,
    early: Vec<(usize, String)>,
    until: Instant,
}

impl Processes {
    fn start(commands: [Command; 2]) -> Result<Self> {
        let (sender, said) = channel();
        let mut this =
            Self { children: Vec::new(), said, early: Vec::new(), until: Instant::now() + LIMIT };
        for (index, mut command) in commands.into_iter().enumerate() {
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
            let started = command.spawn();
            let mut child = started.map_err(|error| Error::io("starting a process", error))?;
            let (input, output) = (child.stdin.take(), child.stdout.take());
            this.children.push((child, input));
            let sender: Sender<_> = sender.clone();
            let read = move || {
                let lines = output.into_iter().flat_map(|output| BufReader::new(output).lines());
                for line in lines.map_while(std::io::Result::ok) {
                    if sender.send((index, line)).is_err() {
                        return;
                    }
                }
            };
            std::thread::spawn(read);
        }
        Ok(this)
    }

    fn say(&mut self, index: usize, line: &str) -> Result<()> {
        let io = |error| Error::io("talking to a process", error);
        match self.children.get_mut(index).and_then(|(_, input)| input.as_mut()) {
            Some(input) => writeln!(input, "{line}").and_then(|()| input.flush()).map_err(io),
            None => Err(failed("a process without input")),
        }
    }

    /// What a child says of a thing.
    fn hear(&mut self, index: usize, what: &str) -> Result<String> {
        loop {
            let early = self.early.iter().position(|(from, _)| *from == index);
            let (from, line) = match early {
                Some(at) => self.early.remove(at),
                None => {
                    let left = self.until.saturating_duration_since(Instant::now());
                    self.said.recv_timeout(left).map_err(|error| match error {
                        RecvTimeoutError::Timeout => {
                            let words = format!("process {index} says nothing of its {what}");
                            Error::new(ErrorKind::Timeout, "trying HCCL", words)
                        }
                        RecvTimeoutError::Disconnected => failed("both processes have ended"),
                    })?
                }
            };
            let (word, rest) = line.split_once(' ').unwrap_or((&line, ""));
            match word {
                "error" => return Err(failed(format!("process {from}: {rest}"))),
                word if from == index && word == what => return Ok(rest.to_owned()),
                _ if from != index => self.early.push((from, line)),
                // Libraries may write to standard output as well.
                _ => {}
            }
        }
    }

    /// Waits for both to end well.
    fn end(mut self) -> Result<()> {
        for index in 0..self.children.len() {
            self.hear(index, "done")?;
        }
        Ok(())
    }
}

impl Drop for Processes {
    fn drop(&mut self) {
        for (child, input) in &mut self.children {
            drop(input.take());
            // It may have ended by itself; after its last word it has a moment to.
            let until = Instant::now() + Duration::from_secs(2);
            while Instant::now() < until && matches!(child.try_wait(), Ok(None)) {
                std::thread::sleep(Duration::from_millis(10));
            }
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// What a child process of [`examine`] does, which gives it the text `task`. It talks to its parent on
/// standard input and output.
///
/// # Errors
///
/// What failed; the parent is told.
pub fn child(library_dir: Option<&Path>, task: &str) -> Result<()> {
    let parts: Vec<&str> = task.split(' ').collect();
    let result = match parts[..] {
        ["pair", rank, rounds] => match (rank.parse(), rounds.parse()) {
            (Ok(rank), Ok(rounds)) => pair_child(library_dir, rank, rounds),
            _ => Err(failed(format!("`{task}` is no task"))),
        },
        ["export"] => export_child(library_dir),
        ["import"] => import_child(library_dir),
        _ => Err(failed(format!("`{task}` is no task"))),
    };
    match &result {
        Ok(()) => say("done"),
        Err(error) => say(&format!("error {error}").replace('\n', " ")),
    }?;
    result
}

fn pair_child(library_dir: Option<&Path>, rank: u32, rounds: u32) -> Result<()> {
    let plan = Plan {
        library_dir: library_dir.map(Into::into),
        device: Some(rank),
        rank,
        shape: Shape { slots: 1, slot_bytes: BYTES as u64 },
        deadline: DEADLINE,
        shares: false,
    };
    let open = move || Ok(HcclCommunicator::open(&plan)?);
    let thread = now(Thread::start("ckpt-hccl", open))?;
    for round in 0..rounds {
        let root = match rank {
            0 => {
                let root = thread.run_blocking(DEADLINE, |own, _| own.new_group())?;
                say(&format!("root {}", to_hex(&root)))?;
                root.to_vec()
            }
            _ => from_hex(&heard()?)?,
        };
        let work = move |own: &mut HcclCommunicator, wait: &Wait<'_>| {
            own.join(0, &root, 2, rank, wait)?;
            let bytes = if rank == 0 { pattern(round) } else { vec![0; BYTES] };
            own.memory()?.write(0, &bytes)?;
            own.broadcast(0, 0, BYTES as u64, wait)?;
            while own.ended(0)? == 0 {
                wait.check("broadcasting")?;
                std::thread::sleep(Duration::from_millis(1));
            }
            let mut here = vec![0; BYTES];
            own.memory()?.read(0, &mut here)?;
            own.leave();
            let free = own.device().memory_info().map_or(0, |(free, _)| free);
            Ok((sum(&here), free))
        };
        let (digest, free) = thread.run_blocking(DEADLINE, work)?;
        say(&format!("digest {digest:016x}"))?;
        say(&format!("free {free}"))?;
    }
    now(async {
        thread.close().await;
        Ok(())
    })
}

fn export_child(library_dir: Option<&Path>) -> Result<()> {
    let device = Device::set(comm::load(library_dir, DEADLINE)?, 0)?;
    let memory = device.allocate(BYTES)?;
    memory.write(0, &pattern(0))?;
    let key = memory.export()?;
    say(&format!("key {}", to_hex(key.as_bytes())))?;
    heard()?;
    Ok(memory.withdraw()?)
}

fn import_child(library_dir: Option<&Path>) -> Result<()> {
    let device = Device::set(comm::load(library_dir, DEADLINE)?, 0)?;
    let key = IpcKey::new(&from_hex(&heard()?)?)?;
    let memory = device.import(&key, BYTES)?;
    let mut bytes = vec![0; BYTES];
    memory.read(0, &mut bytes)?;
    say(&format!("digest {:016x}", sum(&bytes)))?;
    drop(memory);
    say("closed")
}

/// Runs a future that waits for a thread.
fn now<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.map_err(|error| Error::io("starting a runtime", error))?.block_on(work)
}

fn say(line: &str) -> Result<()> {
    let mut output = std::io::stdout().lock();
    let said = writeln!(output, "{line}").and_then(|()| output.flush());
    said.map_err(|error| Error::io("talking to the parent", error))
}

fn heard() -> Result<String> {
    let mut line = String::new();
    let read = std::io::stdin().lock().read_line(&mut line);
    match read.map_err(|error| Error::io("listening to the parent", error))? {
        0 => Err(Error::new(ErrorKind::PeerLost, "listening to the parent", "it is gone")),
        _ => Ok(line.trim_end().to_owned()),
    }
}

/// Bytes that are different in every round.
fn pattern(round: u32) -> Vec<u8> {
    let seed = u64::from(round).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..BYTES as u64)
        .map(|at| ((seed ^ at).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 56) as u8)
        .collect()
}

fn sum(bytes: &[u8]) -> u64 {
    digest::finish(digest::sum(0, bytes), bytes.len() as u64)
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Result<Vec<u8>> {
    let byte = |pair: &[u8]| {
        let text = std::str::from_utf8(pair).ok().filter(|text| text.len() == 2)?;
        // A sign would be read as a part of the number.
        text.bytes()
            .all(|byte| byte.is_ascii_hexdigit())
            .then(|| u8::from_str_radix(text, 16).ok())?
    };
    let bytes: Option<Vec<u8>> = text.as_bytes().chunks(2).map(byte).collect();
    bytes
        .ok_or_else(|| Error::new(ErrorKind::Protocol, "listening to the parent", "no hexadecimal"))
}

/// What is there, in words.
pub(crate) fn probe() -> Result<String, HcclError> {
    let api = comm::load(None, DEADLINE)?;
    let count = ffi::device_count(api)?;
    if count == 0 {
        return Err(HcclError::NoDevice { device: 0, count });
    }
    let soc = ffi::soc_name(api).unwrap_or_else(|| "of unknown kind".into());
    let path = api.found.paths.first().map(|path| path.display().to_string()).unwrap_or_default();
    Ok(format!("{} at {path}, {count} NPUs ({soc})", comm::describe(api)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hexadecimal_survives_its_way_and_anything_else_is_refused() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&bytes)).unwrap(), bytes);
        for text in ["0", "0g", "+1", "ä0"] {
            assert!(from_hex(text).is_err(), "{text}");
        }
    }
}
