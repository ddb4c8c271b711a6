//! The manifests of `examples/clusters`: what they name exists, and what they start works.
//!
//! There is neither a kubelet nor a Slurm controller here. A pod is a network namespace with its volumes and the root of an image, and
//! `srun` and `scontrol` are scripts. The commands, users, mounts and variables are those of the manifests.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use conformance::hosts::Hosts;
use serde_json::Value;
use tempfile::TempDir;

/// A wait beyond it hangs.
const LIMIT: Duration = Duration::from_secs(60);

fn manifest(name: &str) -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/clusters");
    fs::read_to_string(folder.join(name)).unwrap()
}

/// The value at a JSON pointer, which has to be there.
#[track_caller]
fn at<'a>(value: &'a Value, pointer: &str) -> &'a Value {
    value.pointer(pointer).unwrap_or_else(|| panic!("{pointer} is missing in {value}"))
}

#[track_caller]
fn text<'a>(value: &'a Value, pointer: &str) -> &'a str {
    at(value, pointer).as_str().unwrap_or_else(|| panic!("{pointer} is no text in {value}"))
}

fn list<'a>(value: &'a Value, pointer: &str) -> &'a [Value] {
    value.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// What the file has of one kind.
fn of_kind(kind: &str) -> Vec<Value> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(&manifest("kubernetes.yaml")).unwrap();
    documents.into_iter().filter(|document| document["kind"] == kind).collect()
}

/// The one thing that the file has of a kind.
#[track_caller]
fn only(kind: &str) -> Value {
    let [one] = <[Value; 1]>::try_from(of_kind(kind)).unwrap();
    one
}

/// The words of a container's command line.
fn words(container: &Value) -> Vec<String> {
    let words = list(container, "/command").iter().chain(list(container, "/args"));
    words.map(|word| word.as_str().expect("a word is a string").to_owned()).collect()
}

/// The value of an option of a command line.
#[track_caller]
fn option<'a>(words: &'a [String], name: &str) -> &'a str {
    let index = words.iter().position(|word| word == name).expect("the option");
    &words[index + 1]
}

/// The secret that the file's first lines make: its name and its one key.
fn secret() -> (String, String) {
    let manifest = manifest("kubernetes.yaml");
    let (_, words) = manifest.split_once("kubectl create secret generic ").unwrap();
    let mut words = words.split_whitespace();
    let name = words.next().unwrap();
    let key = words.next().unwrap().strip_prefix("--from-file=").unwrap();
    (name.to_owned(), key.strip_suffix("=/dev/stdin").unwrap().to_owned())
}

#[test]
fn what_the_manifests_of_kubernetes_refer_to_exists() {
    let (secret, key) = secret();
    let (trainer, rollouts) = (only("StatefulSet"), only("Deployment"));
    for workload in [&trainer, &rollouts] {
        assert_eq!(
            at(workload, "/spec/selector/matchLabels"),
            at(workload, "/spec/template/metadata/labels")
        );
        let pod = at(workload, "/spec/template/spec");
        let volumes = list(pod, "/volumes");
        let (init, containers) = (list(pod, "/initContainers"), list(pod, "/containers"));
        let mounts = |of: &[Value]| -> Vec<(String, String)> {
            let mounts = of.iter().flat_map(|container| list(container, "/volumeMounts"));
            mounts.map(|m| (text(m, "/name").into(), text(m, "/mountPath").into())).collect()
        };
        let all = [mounts(init), mounts(containers)].concat();
        for (name, _) in &all {
            assert!(volumes.iter().any(|volume| volume["name"] == **name), "no volume {name}");
        }
        for volume in volumes {
            let name = text(volume, "/name");
            assert!(all.iter().any(|(mounted, _)| mounted == name), "nobody mounts {name}");
            if let Some(of) = volume.pointer("/secret/secretName") {
                assert_eq!(of, &*secret, "the secret that the first lines make");
            }
        }
        let [init_container] = init else { panic!("one container makes the token's file") };
        let script = words(init_container).pop().unwrap();
        let (_, copies) = script.split_once("cp ").unwrap();
        let (from, to) = copies.split_once(' ').unwrap();
        let mounted = |of: &[Value], path: &str| {
            let (folder, _) = path.rsplit_once('/').unwrap();
            let of = mounts(of).into_iter().find(|(_, at)| at == folder);
            of.unwrap_or_else(|| panic!("nothing is mounted at {folder}")).0
        };
        let volume = mounted(init, from);
        let volume = volumes.iter().find(|one| one["name"] == *volume).unwrap();
        assert!(volume["secret"].is_object(), "{from} is not of a secret");
        assert!(from.ends_with(&format!("/{key}")), "{from} is not the key {key}");

        let [container] = containers else { panic!("one container") };
        let line = words(container);
        let token = option(&line, "--token-file");
        assert_eq!(token, to, "the file that the first container makes");
        assert_eq!(mounted(init, to), mounted(containers, token), "the volume of the token");
        assert_eq!(line[0], "ckpt-engine");
        let mut program = Command::new(env!("CARGO_BIN_EXE_ckpt-engine"));
        let output = program.args(&line[1..]).arg("--help").output().unwrap();
        assert!(output.status.success(), "{line:?}: {output:?}");
        let ports: Vec<u64> = list(container, "/ports")
            .iter()
            .map(|port| port["containerPort"].as_u64().unwrap())
            .collect();
        let listens =
            if workload == &trainer { &["--metrics", "--rendezvous"][..] } else { &["--metrics"] };
        for name in listens {
            let port =
                option(&line, name).strip_prefix("0.0.0.0:").expect("an address of all interfaces");
            assert!(ports.contains(&port.parse().unwrap()), "{name}: {port} is none of {ports:?}");
        }
    }

    let service = only("Service");
    let name = text(&service, "/metadata/name");
    assert_eq!(text(&trainer, "/spec/serviceName"), name);
    assert_eq!(at(&service, "/spec/selector"), at(&trainer, "/spec/template/metadata/labels"));
    let (leads, joins) = (line_of(&trainer), line_of(&rollouts));
    let (host, port) = option(&joins, "--rendezvous").split_once(':').unwrap();
    assert_eq!(host, format!("{}-0.{name}", text(&trainer, "/metadata/name")));
    assert!(option(&leads, "--rendezvous").ends_with(&format!(":{port}")));
    assert_eq!(option(&leads, "--rollouts"), at(&rollouts, "/spec/replicas").to_string());
}

/// The command line of a workload's one container.
fn line_of(workload: &Value) -> Vec<String> {
    words(at(workload, "/spec/template/spec/containers/0"))
}

/// A program, or a pod, and the lines that it prints. Killed when dropped.
struct Running {
    child: Child,
    lines: Receiver<String>,
    said: Vec<String>,
}

impl Running {
    fn start(mut command: Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (sender, lines) = channel();
        let (output, errors) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        for pipe in [Box::new(output) as Box<dyn Read + Send>, Box::new(errors)] {
            let sender = sender.clone();
            std::thread::spawn(move || {
                let lines = BufReader::new(pipe).lines().map_while(Result::ok);
                lines.map_while(|line| sender.send(line).ok()).for_each(drop);
            });
        }
        Self { child, lines, said: Vec::new() }
    }

    /// Waits for a line with all of these words.
    #[track_caller]
    fn says(&mut self, words: &[&str]) -> String {
        let end = Instant::now() + LIMIT;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                panic!("no line has {words:?}: {:#?}", self.said)
            };
            self.said.push(line.clone());
            if words.iter().all(|word| line.contains(word)) {
                return line;
            }
        }
    }

    /// Waits for its end, and returns whether it was a success.
    fn ends(mut self) -> (bool, String) {
        while let Ok(line) = self.lines.recv_timeout(LIMIT) {
            self.said.push(line);
        }
        (self.child.wait().unwrap().success(), self.said.join("\n"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // What it started goes first: a container's first process has another user, and so outlives what made its namespaces.
        let id = self.child.id();
        let children = fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
        for child in children.unwrap_or_default().split_whitespace() {
            drop(Command::new("kill").args(["-KILL", child]).status());
        }
        // It may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Where NIXL is, which an image has to have.
fn nixl() -> PathBuf {
    std::env::var_os("CKPT_ENGINE_NIXL_DIR")
        .expect("CKPT_ENGINE_NIXL_DIR says where NIXL is")
        .into()
}

/// Mounts what a container has and goes on as its command: an image that is this machine's system and the program, and volumes.
///
/// Its arguments: the folder for the root; the program; NIXL; user:group; the group of volumes; a file of hosts; how many volumes follow,
/// each as a folder and where it is mounted; the command.
const CONTAINER: &str = r#"
root=$1 program=$2 nixl=$3 user=$4 group=$5 hosts=$6 volumes=$7
shift 7
mount -t tmpfs tmpfs "$root"
for folder in bin sbin lib lib64 usr; do
    if [ -L "/$folder" ]; then
        cp -P "/$folder" "$root/$folder"
    elif [ -d "/$folder" ]; then
        mkdir "$root/$folder"
        mount --rbind "/$folder" "$root/$folder"
    fi
done
mkdir -m 1777 "$root/tmp"
mkdir -p "$root/proc" "$root/sys" "$root/dev" "$root/etc" "$root/image/nixl"
mount -t proc proc "$root/proc"
mount --rbind /sys "$root/sys"
mount --rbind /dev "$root/dev"
cp "$hosts" "$root/etc/hosts"
echo 'hosts: files' > "$root/etc/nsswitch.conf"
cp "$program" "$root/image/ckpt-engine"
mount --bind "$nixl" "$root/image/nixl"
while [ "$volumes" -gt 0 ]; do
    mkdir -p "$root$2"
    mount --bind "$1" "$root$2"
    shift 2
    volumes=$((volumes - 1))
done
exec chroot --userspec="+${user%:*}:+${user#*:}" --groups="$group" "$root" \
    /usr/bin/env -i PATH=/image:/usr/bin:/bin CKPT_ENGINE_NIXL_DIR=/image/nixl "$@"
"#;

/// A cluster without its controller: each pod on a host of its own.
struct Cluster {
    hosts: Hosts,
    /// In memory, as the volumes of the manifests are.
    folder: TempDir,
}

impl Cluster {
    fn new(hosts: usize) -> Self {
        let this = Self { hosts: Hosts::new(hosts), folder: TempDir::new_in("/dev/shm").unwrap() };
        let trainer = option(&line_of(&only("Deployment")), "--rendezvous").to_owned();
        let (trainer, _) = trainer.split_once(':').unwrap();
        // The service's name leads to the one pod.
        let hosts = format!("127.0.0.1 localhost\n{} {trainer}\n", this.hosts.address(0));
        fs::write(this.folder.path().join("hosts"), hosts).unwrap();
        this
    }

    /// A pod of a workload: its first containers have ended, its container runs.
    fn start(&self, workload: &Value, host: usize) -> Running {
        let spec = at(workload, "/spec/template/spec");
        let pod = tempfile::Builder::new().tempdir_in(self.folder.path()).unwrap().keep();
        fs::set_permissions(&pod, Permissions::from_mode(0o755)).unwrap();
        let number = |of: &str| at(spec, &format!("/securityContext/{of}")).as_u64().unwrap();
        let group = number("fsGroup") as u32;
        for volume in list(spec, "/volumes") {
            let path = pod.join(text(volume, "/name"));
            fs::create_dir(&path).unwrap();
            // As the kubelet makes them: of root and the pod's group.
            chown(&path, None, Some(group)).unwrap();
            if volume["secret"].is_object() {
                let file = path.join(secret().1);
                fs::write(&file, "a secret of the cluster that is long enough").unwrap();
                chown(&file, None, Some(group)).unwrap();
                fs::set_permissions(&file, Permissions::from_mode(0o440)).unwrap();
                fs::set_permissions(&path, Permissions::from_mode(0o3755)).unwrap();
            } else {
                fs::set_permissions(&path, Permissions::from_mode(0o2777)).unwrap();
            }
        }
        fs::create_dir(pod.join("root")).unwrap();
        let container = |container: &Value| {
            let mounts = list(container, "/volumeMounts");
            let mut command = self.hosts.command(host);
            command.args(["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-euc"]);
            command.args([CONTAINER, "container"]).arg(pod.join("root"));
            command.arg(env!("CARGO_BIN_EXE_ckpt-engine")).arg(nixl());
            command.arg(format!("{}:{}", number("runAsUser"), number("runAsGroup")));
            command.arg(group.to_string()).arg(self.folder.path().join("hosts"));
            command.arg(mounts.len().to_string());
            for mount in mounts {
                command.arg(pod.join(text(mount, "/name"))).arg(text(mount, "/mountPath"));
            }
            command.args(words(container));
            command
        };
        for first in list(spec, "/initContainers") {
            let output = container(first).output().unwrap();
            assert!(output.status.success(), "{output:?}");
        }
        let [last] = list(spec, "/containers") else { panic!("one container") };
        Running::start(container(last))
    }

    /// What a pod serves to Prometheus, asked from another.
    fn metrics(&self, host: usize, port: &str) -> String {
        let script =
            r#"exec 3<>"/dev/tcp/$1/$2" && printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3 && cat <&3"#;
        let mut command = self.hosts.command(host + 1);
        command.args(["timeout", "20", "bash", "-c", script, "bash"]);
        let output = command.arg(self.hosts.address(host).to_string()).arg(port).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

#[test]
#[ignore = "makes network namespaces, which takes root and iproute2, and needs NIXL"]
fn pods_of_the_manifests_update_their_rollouts_are_scaled_and_come_back() {
    let (trainer, rollouts) = (only("StatefulSet"), only("Deployment"));
    let cluster = Cluster::new(4);
    let mut leads = cluster.start(&trainer, 0);
    let one = cluster.start(&rollouts, 1);
    let two = cluster.start(&rollouts, 2);
    leads.says(&["version ", "rollouts: 1 active, 2 active"]);
    let metrics =
        cluster.metrics(0, option(&line_of(&trainer), "--metrics").split(':').nth(1).unwrap());
    assert!(metrics.contains("ckpt_engine_version{"), "{metrics}");

    // Scaled to three.
    let three = cluster.start(&rollouts, 3);
    leads.says(&["version ", "rollouts: 1 active, 2 active, 3 active"]);

    // A pod is gone, and another takes its place.
    drop(one);
    leads.says(&["version ", "rollouts: 2 active, 3 active"]);
    let one = cluster.start(&rollouts, 1);
    leads.says(&["version ", "rollouts: 1 active, 2 active, 3 active"]);

    // The trainer is another one under the same name: rollouts end, and are started again.
    drop(leads);
    for rollout in [one, two, three] {
        let (success, said) = rollout.ends();
        assert!(!success && said.contains("its process died (rank 0"), "{said}");
    }
    let mut leads = cluster.start(&trainer, 0);
    let _rollouts = [cluster.start(&rollouts, 1), cluster.start(&rollouts, 2)];
    leads.says(&["version ", "rollouts: 1 active, 2 active"]);
}

/// Runs the script of the job as Slurm would, each task where `on` says, and checks what its ranks say.
fn job(backend: &str, nodes: &str, on: impl Fn(usize) -> String) {
    let script = manifest("slurm.sbatch");
    let tasks = script.lines().find_map(|line| line.strip_prefix("#SBATCH --ntasks=")).unwrap();
    let folder = TempDir::new().unwrap();
    let tool = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    };
    let words = r#""$*" == "show hostnames $SLURM_JOB_NODELIST""#;
    tool("scontrol", &format!("#!/bin/bash\n[[ {words} ]] && printf '%s\\n' {nodes}\n"));
    let mut srun = "#!/bin/bash\n[[ $1 == --kill-on-bad-exit=0 ]] && shift || exit 2\n".to_owned();
    for task in 0..tasks.parse().unwrap() {
        srun += &format!("SLURM_PROCID={task} {} \"$@\" & pids+=($!)\n", on(task));
    }
    srun += "code=0\nfor pid in \"${pids[@]}\"; do wait \"$pid\" || code=1; done\nexit $code\n";
    tool("srun", &srun);
    // Of the number of the job follows the port, which nobody else has on this machine.
    let begin = std::process::id() % 10_000;
    let is_free = |port: u32| TcpListener::bind(("127.0.0.1", port as u16)).is_ok();
    let number = (begin..).find(|number| is_free(20_000 + number)).unwrap();
    let path = std::env::var("PATH").unwrap();
    let mut sbatch = Command::new("bash");
    sbatch.args(["-c", &script]);
    sbatch.env("PATH", format!("{}:{path}", folder.path().display()));
    sbatch.env("BACKEND", backend).env("PROGRAM", env!("CARGO_BIN_EXE_ckpt-engine"));
    sbatch.env("SLURM_SUBMIT_DIR", folder.path()).env("SLURM_JOB_NODELIST", "node[0-2]");
    sbatch.env("SLURM_JOB_ID", number.to_string()).env("SLURM_NTASKS", tasks);
    let (success, said) = Running::start(sbatch).ends();
    assert!(success, "{said}");
    // All ranks write to one output, in any order.
    let of_the_trainer = "every byte verified; rollouts: 1 active, 2 active";
    for version in ["version 1: ", "version 2: ", "version 3: "] {
        let mut lines = said.lines().filter(|line| line.starts_with(version));
        assert!(lines.any(|line| line.contains(of_the_trainer)), "{version}: {said}");
    }
    // The secret is gone with the job.
    let left = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
    assert!(left.into_iter().all(|name| name == "srun" || name == "scontrol"), "{said}");
}

#[test]
fn a_job_of_slurm_on_one_node_updates_its_rollouts() {
    job("ipc", "127.0.0.1", |_| String::new());
}

#[test]
#[ignore = "makes network namespaces, which takes root and iproute2, and needs NIXL"]
fn a_job_of_slurm_on_three_nodes_updates_its_rollouts() {
    let hosts = Hosts::new(3);
    let nodes: Vec<String> = (0..3).map(|node| hosts.address(node).to_string()).collect();
    nixl();
    job("nixl", &nodes.join(" "), |task| {
        let command = hosts.command(task);
        let words = [command.get_program()].into_iter().chain(command.get_args());
        words.map(|word| word.to_str().unwrap()).collect::<Vec<_>>().join(" ")
    });
}
