//! Comparing declarations with C headers, by a program that only compiles where they agree.
//!
//! Whoever declares a C interface in Rust can describe its declarations as data, [`Declarations`], which
//! reads and writes as JSON. [`compare`] turns that into assertions in C++ and has a compiler check
//! them against the headers of the PyPI package `torch_npu`.

use std::io;
use std::path::Path;
use std::process::Command;

use serde::{Deserialize, Serialize};

/// The environment variable that tells tests where the headers are: the folder `torch_npu/include`.
pub const INCLUDE: &str = "CKPT_ENGINE_ASCEND_INCLUDE";

/// What a client or a simulator believes the headers to say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Declarations {
    /// Functions.
    #[serde(default)]
    pub functions: Vec<Signature>,
    /// Values of enums, constants and macros.
    #[serde(default)]
    pub constants: Vec<(String, i64)>,
    /// Types by the names that they have in C.
    #[serde(default)]
    pub types: Vec<Type>,
}

/// A function, with C types as one would write them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signature {
    /// Its name.
    pub name: String,
    /// What it returns.
    pub result: String,
    /// What it is given.
    pub arguments: Vec<String>,
}

/// A type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Type {
    /// Its name in C.
    pub name: String,
    /// In bytes; without one, it is not compared.
    #[serde(default)]
    pub size: Option<usize>,
    /// In bytes; without one, it is not compared.
    #[serde(default)]
    pub align: Option<usize>,
    /// Of a struct.
    #[serde(default)]
    pub fields: Vec<Field>,
}

/// A field of a struct.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Field {
    /// Its name in C.
    pub name: String,
    /// Where it begins.
    pub offset: usize,
    /// How long it is.
    pub size: usize,
}

impl Signature {
    /// From the Rust types' own text, as `stringify!` gives it. A type's last name is its name in C,
    /// except for numbers and `c_char` and `c_void`.
    #[must_use]
    pub fn from_rust(name: &str, result: &str, arguments: &[&str]) -> Self {
        Self {
            name: name.to_owned(),
            result: in_c(result),
            arguments: arguments.iter().map(|argument| in_c(argument)).collect(),
        }
    }
}

/// A Rust type in the words of C.
fn in_c(rust: &str) -> String {
    let rust = rust.trim();
    let pointer = rust.strip_prefix('*').map(str::trim_start);
    if let Some(target) = pointer.and_then(|rest| rest.strip_prefix("mut ")) {
        return format!("{}*", in_c(target));
    }
    if let Some(target) = pointer.and_then(|rest| rest.strip_prefix("const ")) {
        return format!("{} const*", in_c(target));
    }
    let name = rust.rsplit("::").next().unwrap_or(rust).trim();
    let c = match name {
        "i8" => "int8_t",
        "u8" => "uint8_t",
        "i32" | "c_int" => "int32_t",
        "u32" | "c_uint" => "uint32_t",
        "i64" => "int64_t",
        "u64" => "uint64_t",
        "usize" => "size_t",
        "c_char" => "char",
        "c_void" | "()" => "void",
        other => other,
    };
    c.to_owned()
}

/// The program in C++ that compiles if, and only if, the headers say the same.
#[must_use]
pub fn program(declarations: &Declarations) -> String {
    let mut text = String::from(
        "#include <cstddef>\n#include <cstdint>\n#include <type_traits>\n\
         #include \"third_party/hccl/inc/hccl/hccl.h\"\n#include \"acl/acl.h\"\n",
    );
    let mut line = |arguments: std::fmt::Arguments<'_>| text.push_str(&arguments.to_string());
    for Signature { name, result, arguments } in &declarations.functions {
        let arguments = arguments.join(", ");
        line(format_args!(
            "static_assert(std::is_same<decltype(&{name}), {result} (*)({arguments})>::value, \
             \"signature of {name}\");\n"
        ));
    }
    for (name, value) in &declarations.constants {
        line(format_args!(
            "static_assert(static_cast<long long>({name}) == {value}LL, \"value of {name}\");\n"
        ));
    }
    for Type { name, size, align, fields } in &declarations.types {
        if let Some(size) = size {
            line(format_args!("static_assert(sizeof({name}) == {size}, \"size of {name}\");\n"));
        }
        if let Some(align) = align {
            line(format_args!(
                "static_assert(alignof({name}) == {align}, \"alignment of {name}\");\n"
            ));
        }
        for Field { name: field, offset, size } in fields {
            line(format_args!(
                "static_assert(offsetof({name}, {field}) == {offset} && \
                 sizeof({name}::{field}) == {size}, \"place of {name}.{field}\");\n"
            ));
        }
    }
    text
}

/// Compiles the program against headers: `include` is the folder `torch_npu/include` of the package.
///
/// # Errors
///
/// With what differs, in the compiler's words; or if there is no compiler, `g++`.
pub fn compare(declarations: &Declarations, include: &Path) -> io::Result<()> {
    let folder = tempfile::tempdir()?;
    let source = folder.path().join("probe.cpp");
    std::fs::write(&source, program(declarations))?;
    let mut compiler = Command::new("g++");
    compiler.args(["-std=c++17", "-fsyntax-only", "-Wno-deprecated-declarations", "-I"]);
    compiler.arg(include);
    for part in ["third_party/acl/inc", "third_party/hccl/inc"] {
        compiler.arg("-I").arg(include.join(part));
    }
    let output = compiler.arg(&source).output()?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let errors: Vec<&str> = words.lines().filter(|line| line.contains("error")).collect();
    Err(io::Error::new(io::ErrorKind::InvalidData, errors.join("\n")))
}
