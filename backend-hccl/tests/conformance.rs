//! The engine behaves as every engine has to, over the simulated libraries: in all their profiles, with
//! streams that run at once and with such that run nothing before someone looks, quantised and not.
//!
//! The libraries read their settings from the environment once, so that every case is a process of its
//! own: this program again, running one test.

use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use conformance::{CASES, Suite};
use engine_core::{DeviceChoice, Role, Weight};
use futures::StreamExt;
use futures::executor::block_on;
use hccl_sim::Profile;
use quant_fp8::rules::{Receiver, Rules, RulesConfig};
use quant_fp8::{LAYER, QuantizeFp8};

const CASE: &str = "CKPT_ENGINE_TEST_CASE";
const LIBRARIES: &str = "CKPT_ENGINE_HCCL_DIR";
const FP8: &str = "CKPT_ENGINE_TEST_FP8";
const DELTA: &str = "CKPT_ENGINE_TEST_DELTA";
const REBUILD: &str = "CKPT_ENGINE_TEST_REBUILD";
/// The ranks' NPUs, separated by commas; all others are on the last one.
const NPUS: &str = "CKPT_ENGINE_TEST_NPUS";

/// When streams run.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Execution {
    Eager,
    Lazy,
}

/// What the trainer sends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Format {
    Plain,
    Fp8,
    Delta,
}

/// Where ranks are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Npus {
    /// Each on one of its own.
    Own,
    /// All on one, so that no rank broadcasts to any.
    One,
    /// One rollout on the trainer's, and all others on their own.
    Mixed,
}

/// The suite, each case in a process with these libraries.
struct Isolated(Profile, Execution, Format, Npus);

impl Isolated {
    fn test(&self, case: &str) {
        let Self(profile, execution, format, npus) = *self;
        let mut child = process(profile, execution, case);
        match npus {
            Npus::Own => {}
            Npus::One => drop(child.env(NPUS, "0")),
            Npus::Mixed => drop(child.env(NPUS, "0,0,1,2,3")),
        }
        match format {
            Format::Plain => {}
            Format::Fp8 => drop(child.env(FP8, "1")),
            Format::Delta => drop(child.env(DELTA, "1")),
        }
        let (succeeded, text) = run(&mut child);
        assert!(succeeded, "{text}");
        // A process that ran no case has not tested anything.
        assert!(text.contains("1 passed"), "{text}");
    }
}

/// A process that runs one case with these libraries.
fn process(profile: Profile, execution: Execution, case: &str) -> Command {
    let libraries = hccl_sim::libraries(profile).expect("the simulated libraries");
    let mut child = Command::new(std::env::current_exe().expect("this program"));
    child
        .args(["--exact", "one_case", "--nocapture"])
        .env(CASE, case)
        .env(LIBRARIES, libraries)
        .env("HCCL_SIM_LAZY", if execution == Execution::Lazy { "1" } else { "0" })
        // Joining may take 6 s: longer than the suite's deadline, as on hardware.
        .env("HCCL_SIM_TIME_SCALE", "0.05")
        .env("HCCL_EXEC_TIMEOUT", "1836")
        .env("HCCL_HOST_SOCKET_PORT_RANGE", "auto")
        .env("HCCL_NPU_SOCKET_PORT_RANGE", "auto");
    child
}

/// Whether it succeeded, and what it wrote.
fn run(child: &mut Command) -> (bool, String) {
    let output = child.output().expect("a process");
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

fn quantized(weights: Vec<Weight>) -> Vec<Weight> {
    let mut config = RulesConfig::default();
    config.receiver = Receiver::Any;
    let rules = Rules::new(&config).expect("rules");
    block_on(weights.quantize_fp8(rules).map(|weight| weight.expect("a weight")).collect())
}

/// What a child process does; nothing when this file's tests are run.
#[test]
fn one_case() {
    let Ok(case) = std::env::var(CASE) else { return };
    let suite = Suite::new(backend_hccl::BACKEND).with_control_plane().with_config(|config| {
        // One process has all ranks, each on the NPU of its number.
        config.device = "npu".parse().expect("a device");
        config.timeout_seconds = 4.0;
    });
    let suite = match std::env::var_os(FP8) {
        None => suite,
        Some(_) => suite.with_layer(LAYER, Role::Trainer, quantized).with_config(|config| {
            config.layers.insert("trainer_quantize_fp8".into(), true.into());
            // The suite's shapes are no engine's.
            config.layers.insert("quantization".into(), serde_json::json!({"receiver": "any"}));
        }),
    };
    let suite = match std::env::var_os(DELTA) {
        None => suite,
        Some(_) => {
            suite.with_layer(delta::LAYER, Role::Trainer, |weights| weights).with_config(|config| {
                config.layers.insert("delta".into(), true.into());
            })
        }
    };
    let suite = match std::env::var_os(REBUILD) {
        None => suite,
        Some(_) => suite.with_config(|config| {
            let section = config.engine_kwargs.entry("hccl".into()).or_default();
            section.insert("rebuild_group".into(), true.into());
        }),
    };
    let suite = match std::env::var(NPUS) {
        Err(_) => suite,
        Ok(npus) => suite.with_devices(
            npus.split(',')
                .map(|number| DeviceChoice::new("npu", number.parse().expect("a number"))),
        ),
    };
    assert!(CASES.iter().any(|known| known.name == case));
    suite.test(&case);
    // A colocated rollout that keeps a view for longer than its group lasts, and longer than the trainer waits for it,
    // reads the trainer's memory: that is never freed under it, and stays.
    let is_colocated = std::env::var_os(NPUS).is_some();
    let keeps_a_view = "a_view_of_a_group_that_is_no_more_frees_nothing_of_the_one_that_follows";
    gives_everything_back(if is_colocated && case == keeps_a_view {
        "1 allocations of devices, 1 keys of shared memory"
    } else {
        "nothing"
    });
}

/// Whether nothing but this of the libraries is held any more: engines that were dropped end in their own time.
fn gives_everything_back(but: &str) {
    let libraries = PathBuf::from(std::env::var_os(LIBRARIES).expect("the libraries"));
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let held = hccl_sim::held(&libraries).expect("the simulator");
        let words = if held.is_empty() { "nothing".to_owned() } else { held.to_string() };
        if words == but {
            return;
        }
        assert!(Instant::now() < until, "after the case the process holds {words}, not {but}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

macro_rules! suites {
    ($($name:ident: $profile:ident, $execution:ident, $format:ident, $npus:ident;)*) => {$(
        mod $name {
            conformance::suite!(super::Isolated(
                super::Profile::$profile,
                super::Execution::$execution,
                super::Format::$format,
                super::Npus::$npus
            ));
        }
    )*};
}

suites! {
    current_eager: Current, Eager, Plain, Own;
    current_eager_fp8: Current, Eager, Fp8, Own;
    current_lazy: Current, Lazy, Plain, Own;
    current_lazy_fp8: Current, Lazy, Fp8, Own;
    split_eager: Split, Eager, Plain, Own;
    split_eager_fp8: Split, Eager, Fp8, Own;
    split_lazy: Split, Lazy, Plain, Own;
    split_lazy_fp8: Split, Lazy, Fp8, Own;
    cann_8_1_eager: Cann81, Eager, Plain, Own;
    cann_8_1_eager_fp8: Cann81, Eager, Fp8, Own;
    cann_8_1_lazy: Cann81, Lazy, Plain, Own;
    cann_8_1_lazy_fp8: Cann81, Lazy, Fp8, Own;
    current_eager_delta: Current, Eager, Delta, Own;
    one_npu_current_eager: Current, Eager, Plain, One;
    one_npu_split_lazy_fp8: Split, Lazy, Fp8, One;
    mixed_current_lazy_fp8: Current, Lazy, Fp8, Mixed;
    mixed_split_eager: Split, Eager, Plain, Mixed;
}

/// Mistakes that the library makes on purpose where it is built so: each of them turns a case red that is
/// green without it.
#[cfg(feature = "mutations")]
mod mutations {
    use super::{Execution, NPUS, Profile, REBUILD, process, run};

    const MUTATION: &str = "CKPT_ENGINE_HCCL_MUTATION";

    /// What a case says with a mutation, which is not what it says without.
    fn turns_red(
        mutation: &str,
        execution: Execution,
        case: &str,
        settings: &[(&str, &str)],
    ) -> String {
        let child = || {
            let mut child = process(Profile::Current, execution, case);
            child.envs(settings.iter().copied());
            child
        };
        let (green, text) = run(&mut child());
        assert!(green && text.contains("1 passed"), "it is red without the mutation: {text}");
        let (green, text) = run(child().env(MUTATION, mutation));
        assert!(!green, "{mutation} goes unnoticed: {text}");
        text
    }

    /// The case fails, and for the reason that the mutation is.
    fn fails(
        mutation: &str,
        execution: Execution,
        case: &str,
        settings: &[(&str, &str)],
        why: &str,
    ) {
        let text = turns_red(mutation, execution, case, settings);
        let found = text.lines().find(|line| line.starts_with(&format!("hccl does not: {case}")));
        assert!(found.is_some_and(|line| line.contains(why)), "{mutation}: {text}");
    }

    const ARRIVES: &str = "every_weight_arrives_once_in_order_and_bit_for_bit";

    #[test]
    fn a_dropped_synchronise_turns_the_suite_red() {
        let words = "its digest is";
        fails("dropped-synchronise", Execution::Lazy, ARRIVES, &[], words);
        fails("dropped-synchronise", Execution::Lazy, ARRIVES, &[(NPUS, "0")], words);
    }

    #[test]
    fn a_call_from_an_executor_thread_turns_the_suite_red() {
        fails(
            "call-from-executor",
            Execution::Eager,
            ARRIVES,
            &[],
            "no device was set on this thread",
        );
    }

    #[test]
    fn a_wrong_enum_value_turns_the_suite_red() {
        fails("wrong-enum", Execution::Eager, ARRIVES, &[], "HcclAllReduce failed: not supported");
    }

    #[test]
    fn a_leaked_communicator_per_update_turns_the_suite_red() {
        // Five updates of three ranks, whose groups have six links in this process.
        let settings = [(REBUILD, "1"), ("HCCL_SIM_LINKS", "24")];
        let case = "the_same_shapes_again_send_no_metadata";
        fails("leaked-communicator", Execution::Eager, case, &settings, "no links are left");
    }

    #[test]
    fn a_single_communicator_that_is_leaked_is_seen_when_all_engines_are_gone() {
        let text = turns_red("leaked-communicator", Execution::Eager, ARRIVES, &[]);
        assert!(text.contains("after the case the process holds"), "{text}");
        assert!(text.contains(" communicators"), "{text}");
    }

    #[test]
    fn a_host_pointer_passed_as_device_memory_turns_the_suite_red() {
        fails("host-pointer", Execution::Eager, ARRIVES, &[], "is not device memory");
    }

    #[test]
    fn an_event_query_read_with_the_streams_meaning_turns_the_suite_red() {
        fails("event-as-stream", Execution::Eager, ARRIVES, &[], "its digest is");
    }
}
