//! The engine behaves as every engine has to, over the simulated libraries: in all their profiles, with
//! streams that run at once and with such that run nothing before someone looks, quantised and not.
//!
//! The libraries read their settings from the environment once, so that every case is a process of its
//! own: this program again, running one test.

use std::process::Command;

use conformance::{CASES, Suite};
use engine_core::Weight;
use futures::StreamExt;
use futures::executor::block_on;
use hccl_sim::Profile;
use quant_fp8::rules::{Rules, RulesConfig};
use quant_fp8::{QuantizeFp8, with_fp8};

const CASE: &str = "CKPT_ENGINE_TEST_CASE";
const LIBRARIES: &str = "CKPT_ENGINE_HCCL_DIR";
const FP8: &str = "CKPT_ENGINE_TEST_FP8";

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
}

/// The suite, each case in a process with these libraries.
struct Isolated(Profile, Execution, Format);

impl Isolated {
    fn test(&self, case: &str) {
        let Self(profile, execution, format) = *self;
        let libraries = hccl_sim::libraries(profile).expect("the simulated libraries");
        let program = std::env::current_exe().expect("this program");
        let mut child = Command::new(program);
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
        if format == Format::Fp8 {
            child.env(FP8, "1");
        }
        let output = child.output().expect("a process");
        let text = [&output.stdout[..], &output.stderr[..]].concat();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&text));
        // A process that ran no case has not tested anything.
        assert!(String::from_utf8_lossy(&text).contains("1 passed"));
    }
}

fn quantized(weights: Vec<Weight>) -> Vec<Weight> {
    let rules = Rules::new(&RulesConfig::default()).expect("the default rules");
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
        Some(_) => suite
            .with_quantizer(with_fp8, quantized)
            .with_config(|config| config.trainer_quantize_fp8 = true),
    };
    assert!(CASES.iter().any(|known| known.name == case));
    suite.test(&case);
}

macro_rules! suites {
    ($($name:ident: $profile:ident, $execution:ident, $format:ident;)*) => {$(
        mod $name {
            conformance::suite!(super::Isolated(
                super::Profile::$profile,
                super::Execution::$execution,
                super::Format::$format
            ));
        }
    )*};
}

suites! {
    current_eager: Current, Eager, Plain;
    current_eager_fp8: Current, Eager, Fp8;
    current_lazy: Current, Lazy, Plain;
    current_lazy_fp8: Current, Lazy, Fp8;
    split_eager: Split, Eager, Plain;
    split_eager_fp8: Split, Eager, Fp8;
    split_lazy: Split, Lazy, Plain;
    split_lazy_fp8: Split, Lazy, Fp8;
    cann_8_1_eager: Cann81, Eager, Plain;
    cann_8_1_eager_fp8: Cann81, Eager, Fp8;
    cann_8_1_lazy: Cann81, Lazy, Plain;
    cann_8_1_lazy_fp8: Cann81, Lazy, Fp8;
}
