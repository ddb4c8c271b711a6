//! Metrics of running processes, and `ckpt-engine top`, which reads them: also from endpoints that
//! mean no good.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::{Duration, Instant};

use checkpoint_engine::backend::telemetry::{METRICS, MetricKind};

/// Ctrl-C ends it also where the tests run in the background of a shell, whose children ignore it.
fn program() -> Command {
    let mut command = Command::new("env");
    command.args(["--default-signal=INT", env!("CARGO_BIN_EXE_ckpt-engine")]);
    command.stdin(Stdio::null());
    command
}

fn top(addresses: &[SocketAddr]) -> Output {
    let addresses = addresses.iter().map(ToString::to_string);
    program().args(["top", "--once"]).args(addresses).output().expect("the program starts")
}

/// A `sync` of two rollouts that is ended when the test is, however that ends.
struct Running {
    child: Child,
    addresses: Vec<SocketAddr>,
}

impl Drop for Running {
    fn drop(&mut self) {
        let interrupt = Command::new("kill").args(["-INT", &self.child.id().to_string()]).status();
        assert!(interrupt.expect("kill runs").success());
        self.child.wait().expect("it ends");
    }
}

/// After a few updates.
fn sync() -> Running {
    let mut child = program()
        .args(["sync", "--synthetic", "tiny-moe", "--rollouts", "2", "--updates", "100000000"])
        .args(["--json", "--trainer-quantize-fp8", "--metrics", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let errors = BufReader::new(child.stderr.take().expect("piped"));
    // Nothing of a model as small as this one is quantised, of which the program warns.
    let lines = errors.lines().map(|line| line.expect("text"));
    let lines = lines.filter(|line| !line.starts_with("warning: "));
    let addresses = lines.take(3).map(|line| {
        let address = line.strip_prefix("metrics at http://").expect("where metrics are");
        address.strip_suffix("/metrics").expect("its path").parse().expect("an address")
    });
    let addresses = addresses.collect();
    let output = BufReader::new(child.stdout.take().expect("piped"));
    let mut lines = output.lines();
    for _ in 0..3 {
        lines.next().expect("an update").expect("text");
    }
    // Someone has to read on, or the sync would wait for it.
    std::thread::spawn(move || lines.for_each(drop));
    Running { child, addresses }
}

fn ask(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(10))).expect("a limit");
    stream.write_all(request).expect("the request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("the answer");
    answer
}

#[test]
fn top_shows_state_version_rate_and_stages_of_every_rank() {
    let sync = sync();
    let output = top(&sync.addresses);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rows: Vec<Vec<&str>> =
        text.lines().skip(1).map(|line| line.split_whitespace().collect()).collect();
    let ranks: Vec<&str> = rows.iter().map(|row| row[0]).collect();
    assert_eq!(ranks, ["0", "1", "2"], "{text}");
    for row in &rows {
        assert!(["staging", "ready", "active"].contains(&row[1]), "{text}");
        assert!(row[2].parse::<u64>().expect("a version") >= 3, "{text}");
        assert!(row[3].parse::<f64>().expect("a rate") > 0.0, "{text}");
        assert!(row[4].parse::<u64>().expect("updates") >= 2, "{text}");
        let stages = if row[0] == "0" { ["collect", "encode"] } else { ["fetch", "verify"] };
        assert!(stages.iter().all(|stage| row.contains(stage)), "{text}");
    }
    // The trainer's endpoint alone knows all ranks' states, and one that is gone does no harm.
    let gone = "127.0.0.1:9".parse().expect("an address");
    let output = top(&[sync.addresses[0], gone]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success());
    assert!(sync.addresses.len() == 3 && text.lines().count() >= 2, "{text}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("127.0.0.1:9"));
}

#[test]
fn all_metrics_that_are_emitted_are_in_the_table_and_all_of_the_table_are_emitted() {
    let sync = sync();
    let mut seen = BTreeSet::new();
    for &address in &sync.addresses {
        let answer = ask(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
        let (head, body) = answer.split_once("\r\n\r\n").expect("HTTP");
        assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
        for line in body.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let (name, labels) = line.split_once('{').expect("labels");
            let labels = labels.split_once('}').expect("a value").0;
            let metric = METRICS.iter().find(|metric| match metric.kind {
                MetricKind::Histogram => name
                    .strip_prefix(metric.name)
                    .is_some_and(|rest| ["_bucket", "_sum", "_count"].contains(&rest)),
                _ => name == metric.name,
            });
            let metric = metric.unwrap_or_else(|| panic!("not in the table: {line}"));
            for label in labels.split(',') {
                let (label, value) = label.split_once('=').expect("a label");
                let value = value.trim_matches('"');
                match metric.labels.iter().find(|(known, _)| *known == label) {
                    Some((_, values)) => {
                        assert!(values.contains(&value), "not in the table: {line}");
                        seen.insert((metric.name, value.to_owned()));
                    }
                    None => assert!(["rank", "le"].contains(&label), "not in the table: {line}"),
                }
            }
            seen.insert((metric.name, String::new()));
        }
    }
    for metric in METRICS {
        assert!(seen.contains(&(metric.name, String::new())), "{} is not emitted", metric.name);
        for value in metric.labels.iter().flat_map(|(_, values)| *values) {
            // Nothing was aborted.
            let is_seen = seen.contains(&(metric.name, (*value).to_owned()));
            assert_eq!(is_seen, *value != "aborted", "{} {value}", metric.name);
        }
    }
}

#[test]
fn an_endpoint_of_metrics_outlives_those_who_misuse_it() {
    let sync = sync();
    let address = sync.addresses[0];
    // More connections than are served at a time, none of which asks anything.
    let silent: Vec<TcpStream> =
        (0..12).map(|_| TcpStream::connect(address).expect("a connection")).collect();
    let mut endless = TcpStream::connect(address).expect("a connection");
    // It is cut off; whether this end notices while writing is the system's choice.
    drop(endless.write_all(&vec![b'x'; 1 << 20]));
    assert!(ask(address, b"POST / HTTP/1.1\r\n\r\n").starts_with("HTTP/1.1 405"));
    assert!(ask(address, b"GET / HTTP/1.1\r\n\r\n").contains("ckpt_engine_version"));
    drop(silent);
}

/// An endpoint that answers every connection in a way of its own.
fn endpoint(answer: impl Fn(TcpStream) + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address");
    std::thread::spawn(move || listener.incoming().flatten().for_each(answer));
    address
}

#[test]
fn top_refuses_what_is_not_metrics_and_does_not_wait_for_ever() {
    let started = Instant::now();
    let silent = endpoint(|stream| {
        std::thread::sleep(Duration::from_secs(30));
        drop(stream);
    });
    let endless = endpoint(|mut stream| {
        let head = b"HTTP/1.1 200 OK\r\n\r\n";
        let mut sent = stream.write_all(head);
        while sent.is_ok() {
            sent = stream.write_all(&[b'x'; 1 << 16]);
        }
    });
    let trickle = endpoint(|mut stream| {
        while stream.write_all(b"H").is_ok() {
            std::thread::sleep(Duration::from_millis(100));
        }
    });
    let bytes = endpoint(|mut stream| {
        drop(stream.write_all(&[0xff, 0, 0x1b, b'[', b'2', b'J']));
    });
    let gone = "127.0.0.1:9".parse().expect("an address");
    for (address, words) in [
        (silent, "within 2 s"),
        (endless, "longer"),
        (trickle, "within 2 s"),
        (bytes, "answer"),
        (gone, "127.0.0.1:9"),
    ] {
        let output = top(&[address]);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert!(errors.contains(words), "{words}: {errors}");
        assert!(errors.contains("nothing answers"), "{errors}");
        assert!(output.stdout.is_empty());
    }
    assert!(started.elapsed() < Duration::from_secs(25));
}

#[test]
fn nothing_of_an_endpoints_text_reaches_the_terminal_but_numbers() {
    let hostile = "HTTP/1.1 200 OK\r\n\r\n\
        ckpt_engine_version{rank=\"1\"} 7\n\
        ckpt_engine_version{rank=\"\x1b[2J\"} 8\n\
        ckpt_engine_state{rank=\"1\"} NaN\n\
        ckpt_engine_bytes_per_second{rank=\"1\"} 1e300\n\
        ckpt_engine_stage_seconds_sum{rank=\"1\",stage=\"\x1b]0;x\"} 1\n\
        ckpt_engine_updates_total{rank=\"1\",outcome=\"committed\"} -1\n\
        {\n}\nckpt_engine_version{ 1\nckpt_engine_version} 2\n";
    let address = endpoint(move |mut stream| {
        let mut request = [0; 64];
        drop(stream.read(&mut request));
        drop(stream.write_all(hostile.as_bytes()));
    });
    let output = top(&[address]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(text.chars().all(|char| char == '\n' || !char.is_control()), "{text:?}");
    let row: Vec<&str> = text.lines().nth(1).expect("a rank").split_whitespace().collect();
    assert_eq!((row[0], row[1], row[2]), ("1", "-", "7"), "{text}");
    assert!(text.lines().all(|line| line.len() < 120), "{text}");
}

/// `top` that looks again and again, and what it prints.
fn watch(address: SocketAddr) -> (Child, BufReader<ChildStdout>) {
    let mut child = program()
        .args(["top", &address.to_string(), "--interval", "0.1"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let output = BufReader::new(child.stdout.take().expect("piped"));
    (child, output)
}

fn interrupt(child: &Child) {
    let interrupt = Command::new("kill").args(["-INT", &child.id().to_string()]).status();
    assert!(interrupt.expect("kill runs").success());
}

#[test]
fn top_ends_with_130_when_it_is_interrupted() {
    let address = endpoint(|mut stream| {
        let mut request = [0; 64];
        drop(stream.read(&mut request));
        drop(stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n"));
    });
    let (mut child, mut output) = watch(address);
    let mut first = String::new();
    output.read_line(&mut first).expect("text");
    assert!(first.contains("rank"), "{first}");
    interrupt(&child);
    // It prints on until it ends.
    let mut rest = String::new();
    output.read_to_string(&mut rest).expect("text");
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
}

#[test]
fn top_goes_on_while_a_process_is_too_busy_to_answer_and_ends_with_it() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = listener.local_addr().expect("its address");
    std::thread::spawn(move || {
        for (look, stream) in listener.incoming().take(3).enumerate() {
            let mut stream = stream.expect("a connection");
            let mut request = [0; 64];
            drop(stream.read(&mut request));
            if look == 1 {
                std::thread::sleep(Duration::from_millis(2500));
            }
            drop(stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n"));
        }
    });
    let (mut child, mut output) = watch(address);
    let mut text = String::new();
    output.read_to_string(&mut text).expect("text");
    assert_eq!(child.wait().expect("it ends").code(), Some(0), "{text}");
    assert_eq!(text.matches("within 2 s").count(), 1, "{text}");
    assert!(text.matches("rank").count() >= 3, "{text}");
}
