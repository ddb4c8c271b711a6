//! Whether what [`sys`] declares is what the real headers say.

use std::collections::HashSet;
use std::path::PathBuf;

use hccl_sim::headers::{self, Call, Declarations, Field, Type, Value};

use crate::sys::{self, Known};

/// Functions that are looked for and that the headers do not have, and why.
const NOT_IN_THE_HEADERS: &[(&str, &str)] =
    &[("HcclSimVersion", "by which the simulator says what it is; real libraries lack it")];

/// All that is declared, and that the headers say as well.
fn declarations() -> Declarations {
    let mut calls = sys::calls();
    calls.retain(|call| NOT_IN_THE_HEADERS.iter().all(|(name, _)| *name != call.name));
    let mut constants = Vec::new();
    for constant in sys::CONSTANTS {
        if let Known::Header(names) = constant.known {
            let value = i64::try_from(constant.value).unwrap();
            constants.extend(names.iter().map(|name| ((*name).to_owned(), value)));
        }
    }
    // It is passed as bytes that have no alignment.
    let root_info = Type {
        name: "HcclRootInfo".into(),
        size: Some(sys::ROOT_INFO_BYTES),
        align: Some(align_of::<u8>()),
        fields: vec![Field { name: "internal".into(), offset: 0, size: sys::ROOT_INFO_BYTES }],
    };
    Declarations { calls, constants, types: vec![root_info], ..Declarations::default() }
}

fn include() -> PathBuf {
    let folder = std::env::var_os(headers::INCLUDE).map(PathBuf::from);
    folder.unwrap_or_else(|| panic!("{} is not set; see the reason", headers::INCLUDE))
}

/// What the compiler says of these declarations.
fn found(declarations: &Declarations) -> String {
    headers::compare(declarations, &include()).unwrap_err().to_string()
}

#[test]
fn every_function_that_is_bound_is_compared_or_known_not_to_be_in_the_headers() {
    let compared: HashSet<String> =
        declarations().calls.into_iter().map(|call| call.name).collect();
    let excepted: HashSet<String> =
        NOT_IN_THE_HEADERS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let bound: HashSet<String> =
        sys::FUNCTIONS.iter().map(|(name, _)| (*name).to_owned()).collect();
    assert!(compared.is_disjoint(&excepted));
    let known = &compared | &excepted;
    assert_eq!(&known ^ &bound, HashSet::new(), "bound and not compared, or the reverse");
    assert_eq!(bound.len(), sys::FUNCTIONS.len(), "a function is bound twice");
    assert!(NOT_IN_THE_HEADERS.iter().all(|(_, reason)| !reason.is_empty()));
}

#[test]
fn every_number_is_in_the_table_that_is_compared() {
    let text = include_str!("sys.rs");
    let loose = text.lines().filter_map(|line| {
        let line = line.trim_start();
        let (name, rest) = line
            .strip_prefix("pub(crate) ")
            .unwrap_or(line)
            .strip_prefix("const ")?
            .split_once(':')?;
        let ty = rest.split('=').next()?.trim();
        let is_number = ["Status", "i32", "u32", "i64", "u64", "usize"].contains(&ty);
        is_number.then_some(name)
    });
    assert_eq!(loose.collect::<Vec<_>>(), [""; 0], "numbers that nothing compares");
    for constant in sys::CONSTANTS {
        let (Known::Header(words) | Known::Elsewhere(words)) = constant.known;
        assert!(words.iter().all(|words| !words.is_empty()), "{}", constant.name);
    }
}

#[test]
#[ignore = "needs g++ and the headers of torch_npu: CKPT_ENGINE_ASCEND_INCLUDE; `cargo xtask test` installs them"]
fn every_declaration_is_what_the_headers_say() {
    let declarations = declarations();
    assert!(declarations.calls.len() >= 34 && declarations.constants.len() >= 55);
    headers::compare(&declarations, &include()).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
#[ignore = "needs g++ and the headers of torch_npu: CKPT_ENGINE_ASCEND_INCLUDE; `cargo xtask test` installs them"]
fn functions_that_are_not_compared_are_indeed_in_no_header() {
    for (name, _) in NOT_IN_THE_HEADERS {
        let calls = sys::calls().into_iter().filter(|call| call.name == *name).collect();
        let words = found(&Declarations { calls, ..Declarations::default() });
        assert!(words.contains(name) && words.contains("not declared"), "{name}: {words}");
    }
}

#[test]
#[ignore = "needs g++ and the headers of torch_npu: CKPT_ENGINE_ASCEND_INCLUDE; `cargo xtask test` installs them"]
fn every_kind_of_wrong_declaration_is_found() {
    let wrong = |change: &dyn Fn(&mut Declarations), what: &str| {
        let mut declarations = declarations();
        change(&mut declarations);
        let words = found(&declarations);
        assert!(words.contains(what), "{what}: {words}");
        assert_eq!(words.matches("static assertion").count(), 1, "{words}");
    };
    fn call<'a>(all: &'a mut Declarations, name: &str) -> &'a mut Call {
        all.calls.iter_mut().find(|one| one.name == name).unwrap()
    }
    let number = |bytes, signed| Value::Number { bytes, signed };
    let address = |writable, of| Value::Address { writable, of: Box::new(of) };
    let argument = |name: &'static str, at: usize, value: Value| {
        let what = format!("argument {} of {name}", at + 1);
        wrong(&|all| call(all, name).arguments[at] = value.clone(), &what);
    };
    // A count of 32 bits.
    argument("HcclBroadcast", 1, number(4, false));
    // A timeout that cannot be -1.
    argument("aclrtSynchronizeStreamWithTimeout", 1, number(4, false));
    // An enum of another size.
    argument("HcclBroadcast", 2, number(8, true));
    // A number where an address is, and the reverse.
    argument("aclrtStreamQuery", 0, number(8, false));
    argument("HcclBroadcast", 3, address(true, Value::Nothing));
    // A result that is written to too few bytes, or to too many.
    argument("aclrtGetMemInfo", 1, address(true, number(4, false)));
    argument("aclrtGetVersion", 2, address(true, number(8, true)));
    // The address of memory, where the address of an address is.
    argument("aclrtMalloc", 0, address(true, Value::Nothing));
    // The other way of a copy.
    argument("aclrtMemcpy", 2, address(true, Value::Nothing));
    wrong(
        &|all| drop(call(all, "aclrtMemset").arguments.pop()),
        "number of arguments of aclrtMemset",
    );
    wrong(
        &|all| call(all, "aclrtFree").arguments.push(Value::Number { bytes: 4, signed: true }),
        "number of arguments of aclrtFree",
    );
    wrong(
        &|all| call(all, "HcclGetCommConfigCapability").result = Value::Nothing,
        "result of HcclGetCommConfigCapability",
    );
    wrong(
        &|all| {
            let name = "ACL_EVENT_RECORDED_STATUS_COMPLETE";
            all.constants.iter_mut().find(|(known, _)| known == name).unwrap().1 = 0;
        },
        "value of ACL_EVENT_RECORDED_STATUS_COMPLETE",
    );
    wrong(&|all| all.types[0].size = Some(4104), "size of HcclRootInfo");
    wrong(&|all| all.types[0].fields[0].offset = 4, "place of HcclRootInfo.internal");
}

#[test]
#[ignore = "needs g++ and the headers of torch_npu: CKPT_ENGINE_ASCEND_INCLUDE; `cargo xtask test` installs them"]
fn no_value_of_any_declaration_goes_uncompared() {
    let mut all = declarations();
    // No function has a number of this size.
    let none = Value::Number { bytes: 3, signed: true };
    let mut changed = all.constants.len();
    for call in &mut all.calls {
        call.result = none.clone();
        call.arguments.fill(none.clone());
        changed += 1 + call.arguments.len();
    }
    all.constants.iter_mut().for_each(|(_, value)| *value += 1);
    let words = found(&all);
    assert_eq!(
        words.matches("static assertion").count(),
        changed,
        "values that differ and are not found"
    );
}
