//! Whether the declarations are what the real headers say.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::PathBuf;

use hccl_sim::headers::{self, Declarations};

fn include() -> PathBuf {
    let folder = std::env::var_os(headers::INCLUDE).map(PathBuf::from);
    folder.unwrap_or_else(|| panic!("{} is not set; see the reason", headers::INCLUDE))
}

#[test]
#[ignore = "needs g++ and the headers of torch_npu: CKPT_ENGINE_ASCEND_INCLUDE; `cargo xtask test` installs them"]
fn every_declaration_is_what_the_headers_say() {
    let declarations = hccl_sim::declarations();
    assert!(declarations.functions.len() > 50 && declarations.constants.len() > 80);
    headers::compare(&declarations, &include()).unwrap_or_else(|error| panic!("{error}"));
}

#[test]
#[ignore = "needs g++ and the headers of torch_npu: CKPT_ENGINE_ASCEND_INCLUDE; `cargo xtask test` installs them"]
fn every_kind_of_wrong_declaration_is_found() {
    let wrong = |change: &dyn Fn(&mut Declarations), what: &str| {
        let mut declarations = hccl_sim::declarations();
        change(&mut declarations);
        let error = headers::compare(&declarations, &include()).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
        assert_eq!(error.matches("static assertion").count(), 1, "{error}");
    };
    fn function<'a>(all: &'a mut Declarations, name: &str) -> &'a mut headers::Signature {
        all.functions.iter_mut().find(|one| one.name == name).unwrap()
    }
    fn config(all: &mut Declarations) -> &mut headers::Type {
        all.types.iter_mut().find(|one| one.name == "HcclCommConfig").unwrap()
    }
    wrong(
        &|all| function(all, "HcclBroadcast").arguments[1] = "uint32_t".into(),
        "signature of HcclBroadcast",
    );
    wrong(
        &|all| function(all, "aclrtMemcpy").arguments[2] = "void*".into(),
        "signature of aclrtMemcpy",
    );
    wrong(&|all| function(all, "aclrtFree").result = "uint32_t".into(), "signature of aclrtFree");
    wrong(
        &|all| all.constants.push(("ACL_EVENT_RECORDED_STATUS_COMPLETE".into(), 0)),
        "value of ACL_EVENT_RECORDED_STATUS_COMPLETE",
    );
    wrong(&|all| config(all).fields[5].offset += 4, "place of HcclCommConfig.hcclOpExpansionMode");
    wrong(&|all| config(all).size = Some(300), "size of HcclCommConfig");
    wrong(&|all| config(all).align = Some(4), "alignment of HcclCommConfig");
}

#[test]
fn declarations_are_the_same_after_json() {
    let declarations = hccl_sim::declarations();
    let json = serde_json::to_string(&declarations).unwrap();
    assert_eq!(serde_json::from_str::<Declarations>(&json).unwrap(), declarations);
}

#[test]
fn rust_types_become_the_types_of_c() {
    let rust =
        ["*mut *mut c_void", "*const std::ffi::c_char", "usize", "* const HcclRootInfo", "i32"];
    let signature = headers::Signature::from_rust("f", "sys::aclError", &rust);
    let c = ["void**", "char const*", "size_t", "HcclRootInfo const*", "int32_t"];
    assert_eq!(
        (signature.result.as_str(), &signature.arguments[..]),
        ("aclError", &c.map(String::from)[..])
    );
}
