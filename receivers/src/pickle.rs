//! Writes Python's pickles, and never reads them: only what Python receivers need to learn where memory is.
//!
//! Protocol 3, which every Python 3 reads. The module and name of a callable are looked up by the process that reads the pickle.

/// A Python value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Pickle {
    None,
    Bool(bool),
    Int(i64),
    Text(String),
    Bytes(Vec<u8>),
    Tuple(Vec<Pickle>),
    List(Vec<Pickle>),
    /// Keys and values, in insertion order.
    Dict(Vec<(Pickle, Pickle)>),
    /// A class, function or type of a module, by its name.
    Global(&'static str, &'static str),
    /// The result of calling something with these arguments.
    Call(Box<Pickle>, Vec<Pickle>),
}

impl Pickle {
    pub(crate) fn text(text: impl Into<String>) -> Self {
        Self::Text(text.into())
    }

    /// A whole number.
    ///
    /// Larger values are clamped: no memory is that large.
    pub(crate) fn size(size: u64) -> Self {
        Self::Int(i64::try_from(size).unwrap_or(i64::MAX))
    }

    /// The bytes from which Python's `pickle.loads` makes this value.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0x80, 3];
        self.write(&mut bytes);
        bytes.push(b'.');
        bytes
    }

    fn write(&self, to: &mut Vec<u8>) {
        match self {
            Self::None => to.push(b'N'),
            Self::Bool(true) => to.push(0x88),
            Self::Bool(false) => to.push(0x89),
            Self::Int(number) => {
                to.extend([0x8a, 8]);
                to.extend(number.to_le_bytes());
            }
            Self::Text(text) => {
                to.push(b'X');
                with_length(to, text.as_bytes());
            }
            Self::Bytes(bytes) => {
                to.push(b'B');
                with_length(to, bytes);
            }
            Self::Tuple(items) => write_tuple(to, items),
            Self::List(items) => {
                to.extend(*b"](");
                items.iter().for_each(|item| item.write(to));
                to.push(b'e');
            }
            Self::Dict(items) => {
                to.extend(*b"}(");
                for (key, value) in items {
                    key.write(to);
                    value.write(to);
                }
                to.push(b'u');
            }
            Self::Global(module, name) => to.extend(format!("c{module}\n{name}\n").into_bytes()),
            Self::Call(callable, arguments) => {
                callable.write(to);
                write_tuple(to, arguments);
                to.push(b'R');
            }
        }
    }
}

fn write_tuple(to: &mut Vec<u8>, items: &[Pickle]) {
    to.push(b'(');
    items.iter().for_each(|item| item.write(to));
    to.push(b't');
}

/// Writes a length of 32 bits: descriptions of a bucket are far shorter than 4 GiB.
fn with_length(to: &mut Vec<u8>, bytes: &[u8]) {
    let len = u32::try_from(bytes.len()).expect("a text of less than 4 GiB");
    to.extend(len.to_le_bytes());
    to.extend(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// The Python expression of the value.
    fn python(value: &Pickle) -> String {
        let all =
            |items: &[Pickle]| items.iter().map(|item| python(item) + ",").collect::<String>();
        match value {
            Pickle::None => "None".into(),
            Pickle::Bool(true) => "True".into(),
            Pickle::Bool(false) => "False".into(),
            Pickle::Int(number) => number.to_string(),
            Pickle::Text(text) => format!("bytes.fromhex('{}').decode()", hex(text.as_bytes())),
            Pickle::Bytes(bytes) => format!("bytes.fromhex('{}')", hex(bytes)),
            Pickle::Tuple(items) => format!("({})", all(items)),
            Pickle::List(items) => format!("[{}]", all(items)),
            Pickle::Dict(items) => {
                let item = |(key, value)| format!("{}:{},", python(key), python(value));
                format!(
                    "{{{}}}",
                    items.iter().map(|(key, value)| item((key, value))).collect::<String>()
                )
            }
            Pickle::Global(module, name) => format!("sys.modules['{module}'].{name}"),
            Pickle::Call(callable, arguments) => {
                format!("{}({})", python(callable), all(arguments))
            }
        }
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn values() -> impl Strategy<Value = Pickle> {
        let leaf = prop_oneof![
            Just(Pickle::None),
            any::<bool>().prop_map(Pickle::Bool),
            any::<i64>().prop_map(Pickle::Int),
            ".{0,8}".prop_map(Pickle::Text),
            proptest::collection::vec(any::<u8>(), 0..300).prop_map(Pickle::Bytes),
            Just(Pickle::Global("fractions", "Fraction")),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| {
            let many = proptest::collection::vec(inner.clone(), 0..6);
            let call = |over: i64| {
                let fraction = Pickle::Global("fractions", "Fraction");
                Pickle::Call(Box::new(fraction), vec![Pickle::Int(over), Pickle::Int(7)])
            };
            prop_oneof![
                many.clone().prop_map(Pickle::Tuple),
                many.prop_map(Pickle::List),
                proptest::collection::vec((".{0,4}".prop_map(Pickle::Text), inner), 0..5)
                    .prop_map(Pickle::Dict),
                any::<i64>().prop_map(call),
            ]
        })
    }

    #[test]
    fn python_reads_every_value_as_what_it_is() {
        let mut runner = TestRunner::deterministic();
        let mut script = String::from("import fractions, pickle, sys\n");
        for _ in 0..300 {
            let value = values().new_tree(&mut runner).expect("a value").current();
            let (bytes, wanted) = (hex(&value.to_bytes()), python(&value));
            script += &format!("got = pickle.loads(bytes.fromhex('{bytes}'))\n");
            script += &format!("wanted = {wanted}\nassert got == wanted, (got, wanted)\n");
        }
        let mut command = Command::new("python3");
        let child = command.arg("-").stdin(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = child.expect("Python 3, which the tests of this project need");
        let mut input = child.stdin.take().expect("its input");
        input.write_all(script.as_bytes()).expect("a reader");
        drop(input);
        let ended = child.wait_with_output().expect("an end");
        assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    }
}
