//! Servers that run already, as the program is told of them. What is sent to them needs GPUs, and is tested without any in
//! the crate `receivers`.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Command, Output};

fn run(args: &[&str]) -> Output {
    let program = Command::new(env!("CARGO_BIN_EXE_ckpt-engine")).args(args).output();
    program.expect("the program starts")
}

/// A server of vLLM that was started without development mode: it knows its health and its version.
fn server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", listener.local_addr().expect("an address"));
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut reader = BufReader::new(stream);
            let mut first = String::new();
            drop(reader.read_line(&mut first));
            let mut line = String::from("-");
            while !line.trim().is_empty() {
                line.clear();
                drop(reader.read_line(&mut line));
            }
            let (status, body) = match first.split(' ').nth(1) {
                Some("/health") => ("200 OK", ""),
                Some("/version") => ("200 OK", r#"{"version":"0.33.0"}"#),
                _ => ("404 Not Found", r#"{"error":{"message":"Not Found"}}"#),
            };
            let len = body.len();
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: {len}\r\n\r\n{body}");
            drop(reader.get_mut().write_all(answer.as_bytes()));
        }
    });
    url
}

#[test]
fn the_doctor_says_what_a_server_lacks_and_fails() {
    let url = server();
    let output = run(&["doctor", "--server", &url]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(!output.status.success(), "{said}");
    assert!(said.contains("ok version: vLLM 0.33.0"), "{said}");
    assert!(said.contains("VLLM_SERVER_DEV_MODE=1"), "{said}");
    let output = run(&["doctor", "--server", &url, "--json"]);
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(said["servers"][&url][0]["passed"], true);
    assert_eq!(said["servers"][&url][1]["passed"], false);
}

#[test]
fn servers_that_cannot_be_are_errors_in_words() {
    for (args, words) in [
        (&["doctor", "--server", "https://10.0.0.7"][..], "https is not spoken here"),
        (&["doctor", "--server", "10.0.0.7:8000"], "http://HOST:PORT is wanted"),
        (&["sync", "--synthetic", "tiny-moe", "--server", "http://a"], "--backend"),
        (
            &["sync", "--synthetic", "tiny-moe", "--backend", "ipc", "--server", "http://a"],
            "ipc has rollouts of its own",
        ),
        (&["sync", "--synthetic", "tiny-moe", "--backend", "vllm"], "vllm sends to servers"),
        (&["sync", "--synthetic", "tiny-moe", "--backend", "sglang"], "give --server URL"),
        (
            &[
                "sync",
                "--synthetic",
                "tiny-moe",
                "--backend",
                "vllm",
                "--server",
                "http://a",
                "--verify",
            ],
            "--verify",
        ),
    ] {
        let output = run(args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains(words), "{args:?}: {said}");
    }
}
