//! Comparing declarations with C headers, by a program that only compiles where they agree.
//!
//! A crate that declares a C interface in Rust can describe its declarations as data, [`Declarations`], which
//! reads and writes as JSON. [`compare`] turns that into assertions in C++ and has a compiler check
//! them against the headers of the PyPI package `torch_npu`.
//!
//! Functions can be described in two ways. Who has a Rust name for every type of C gives a [`Signature`],
//! whose types have to be the very same ones. Who declares all handles as one type, and enums as numbers,
//! gives a [`Call`]: what has to be right for the machine code of the call.

use std::ffi::c_void;
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
    /// Functions, by the types that they have in C.
    #[serde(default)]
    pub functions: Vec<Signature>,
    /// Functions, by what their calls pass.
    #[serde(default)]
    pub calls: Vec<Call>,
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

/// A function, as the machine code that calls it has to know it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Call {
    /// Its name.
    pub name: String,
    /// What it returns.
    pub result: Value,
    /// What it is given.
    pub arguments: Vec<Value>,
}

/// What a call passes or returns, or what is behind an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Value {
    /// `void`.
    Nothing,
    /// A number or an enum. Whether an enum has a sign is not compared, because C leaves it to compilers; nor
    /// is it for a single byte, for `char` the same is true. Behind an address, single bytes are also what
    /// structs consist of that have no alignment.
    Number {
        /// Its size.
        bytes: usize,
        /// Whether it has a sign.
        signed: bool,
    },
    /// An address.
    Address {
        /// Whether the function may write there.
        writable: bool,
        /// What is there.
        of: Box<Value>,
    },
}

/// Rust types that C functions take: what each is for a [`Call`].
pub trait Abi {
    /// What a call passes.
    fn value() -> Value;
}

macro_rules! numbers {
    ($($ty:ident)*) => {$(
        impl Abi for $ty {
            fn value() -> Value {
                Value::Number { bytes: size_of::<$ty>(), signed: $ty::MIN != 0 }
            }
        }
    )*};
}

numbers! { i8 u8 i16 u16 i32 u32 i64 u64 isize usize }

impl Abi for c_void {
    fn value() -> Value {
        Value::Nothing
    }
}

impl<T: Abi> Abi for *mut T {
    fn value() -> Value {
        Value::Address { writable: true, of: Box::new(T::value()) }
    }
}

impl<T: Abi> Abi for *const T {
    fn value() -> Value {
        Value::Address { writable: false, of: Box::new(T::value()) }
    }
}

impl Value {
    /// The type in [`PRELUDE`] that knows whether a type of C is this.
    fn in_cpp(&self) -> String {
        match self {
            Self::Nothing => "abi::nothing".to_owned(),
            Self::Number { bytes, signed } => format!("abi::number<{bytes}, {signed}>"),
            Self::Address { writable, of } => format!("abi::address<{writable}, {}>", of.in_cpp()),
        }
    }
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

/// What the assertions about calls are made of.
const PRELUDE: &str = r"
namespace abi {
struct nothing {
  static constexpr bool is_byte = false;
  template <class T> static constexpr bool is() { return std::is_void<T>::value; }
};
template <std::size_t Bytes, bool Signed> struct number {
  static constexpr bool is_byte = Bytes == 1;
  template <class T> static constexpr bool is() {
    if constexpr (std::is_enum<T>::value) {
      return sizeof(T) == Bytes;
    } else if constexpr (std::is_integral<T>::value) {
      return sizeof(T) == Bytes && (is_byte || std::is_signed<T>::value == Signed);
    } else {
      return false;
    }
  }
};
template <bool Writable, class Of> struct address {
  static constexpr bool is_byte = false;
  template <class T> static constexpr bool is() {
    if constexpr (std::is_pointer<T>::value) {
      using Target = std::remove_pointer_t<T>;
      if (std::is_const<Target>::value == Writable) return false;
      if constexpr (Of::is_byte && std::is_class<Target>::value) {
        return alignof(Target) == 1;
      } else {
        return Of::template is<std::remove_cv_t<Target>>();
      }
    } else {
      return false;
    }
  }
};
template <class F> struct function;
template <class R, class... A> struct function<R (*)(A...)> {
  static constexpr std::size_t arguments = sizeof...(A);
  template <class V> static constexpr bool returns() { return V::template is<R>(); }
  // One that is too many is said by the number.
  template <std::size_t I, class V> static constexpr bool takes() {
    if constexpr (I < arguments) {
      return V::template is<std::tuple_element_t<I, std::tuple<A...>>>();
    } else {
      return true;
    }
  }
};
}
";

/// The program in C++ that compiles if, and only if, the headers say the same.
#[must_use]
pub fn program(declarations: &Declarations) -> String {
    let mut text = String::from(
        "#include <cstddef>\n#include <cstdint>\n#include <tuple>\n#include <type_traits>\n\
         #include \"third_party/hccl/inc/hccl/hccl.h\"\n#include \"acl/acl.h\"\n",
    );
    text.push_str(PRELUDE);
    let mut line = |arguments: std::fmt::Arguments<'_>| text.push_str(&arguments.to_string());
    for Signature { name, result, arguments } in &declarations.functions {
        let arguments = arguments.join(", ");
        line(format_args!(
            "static_assert(std::is_same<decltype(&{name}), {result} (*)({arguments})>::value, \
             \"signature of {name}\");\n"
        ));
    }
    for Call { name, result, arguments } in &declarations.calls {
        let (function, count) = (format!("abi::function<decltype(&{name})>"), arguments.len());
        line(format_args!(
            "static_assert({function}::arguments == {count}, \"number of arguments of {name}\");\n"
        ));
        line(format_args!(
            "static_assert({function}::returns<{}>(), \"result of {name}\");\n",
            result.in_cpp()
        ));
        for (index, argument) in arguments.iter().enumerate() {
            line(format_args!(
                "static_assert({function}::takes<{index}, {}>(), \"argument {} of {name}\");\n",
                argument.in_cpp(),
                index + 1
            ));
        }
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
