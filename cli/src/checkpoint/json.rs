//! JSON files of others, of which a few keys are read or changed and the rest stays as it was written.
//!
//! Python's `json` writes and reads what is no JSON: `NaN`, `Infinity` and `-Infinity`, and integers
//! of any length. Models have them in their `config.json`. So a document is kept as its text; values
//! are read out of it, and an edit replaces only the bytes of what it changes. Key order, spelling of
//! numbers and white space stay.

use std::ops::Range;

use serde_json::{Map, Value};

/// The deepest nesting that is read: Python's own limit is about a thousand.
const DEEPEST: usize = 500;

/// A JSON object as its text.
#[derive(Clone, Debug)]
pub struct JsonText {
    text: String,
}

/// Why a text is not JSON, or not the JSON that was expected.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message} at line {line} column {column}")]
pub struct JsonError {
    message: &'static str,
    line: usize,
    column: usize,
}

/// A key of an object, with the places of the key and of its value.
#[derive(Debug)]
struct Member {
    key: String,
    at: usize,
    value: Range<usize>,
}

impl JsonText {
    /// Reads a document, which has to be an object.
    ///
    /// # Errors
    ///
    /// Where and why it is not: the grammar is JSON's, and also takes what Python writes for numbers
    /// that JSON does not have.
    pub fn parse(text: impl Into<String>) -> Result<Self, JsonError> {
        let text = text.into();
        let mut reader = Reader { bytes: text.as_bytes(), at: 0 };
        let checked = reader.document();
        match checked {
            Ok(()) => Ok(Self { text }),
            Err(message) => Err(JsonError::new(&text, reader.at, message)),
        }
    }

    /// The text, with all changes.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The value at the end of a path of keys.
    ///
    /// Numbers that JSON does not have, or that no machine type holds, become their text.
    pub fn get(&self, path: &[&str]) -> Option<Value> {
        let at = self.find(path)?;
        Some(Reader { bytes: self.text.as_bytes(), at: at.start }.value_of())
    }

    /// The paths, from the outermost object on, at which a key is found, through objects only.
    pub fn paths_of(&self, key: &str) -> Vec<Vec<String>> {
        let mut found = Vec::new();
        self.search(self.root(), key, &mut Vec::new(), &mut found);
        found
    }

    fn search(
        &self,
        object: Range<usize>,
        key: &str,
        path: &mut Vec<String>,
        found: &mut Vec<Vec<String>>,
    ) {
        for member in self.members(object) {
            path.push(member.key);
            if path.last().is_some_and(|last| last == key) {
                found.push(path.clone());
            } else if self.text.as_bytes().get(member.value.start) == Some(&b'{') {
                self.search(member.value, key, path, found);
            }
            path.pop();
        }
    }

    /// Puts a value at the end of a path whose objects are there, but for the last key.
    ///
    /// A key that is there is replaced where it is; a new one comes after all others, in the
    /// document's own indentation. Returns whether the objects on the way were there.
    pub fn set(&mut self, path: &[&str], value: &Value) -> bool {
        let Some((key, parents)) = path.split_last() else { return false };
        let indent = self.indent();
        let written = |depth: usize| written(value, indent.as_deref(), depth);
        if let Some(at) = self.find(path) {
            let text = written(path.len());
            self.text.replace_range(at, &text);
            return true;
        }
        let Some(object) = self.find(parents) else { return false };
        if self.text.as_bytes().get(object.start) != Some(&b'{') {
            return false;
        }
        let name = Value::from(*key).to_string();
        let (lead, trail) = match &indent {
            Some(indent) => (
                format!("\n{}", indent.repeat(path.len())),
                format!("\n{}", indent.repeat(path.len() - 1)),
            ),
            None => (String::new(), String::new()),
        };
        let text = written(path.len());
        match self.members(object.clone()).last() {
            Some(last) => {
                let lead = if indent.is_some() { lead } else { " ".into() };
                let end = last.value.end;
                self.text.insert_str(end, &format!(",{lead}{name}: {text}"));
            }
            None => {
                self.text.replace_range(object, &format!("{{{lead}{name}: {text}{trail}}}"));
            }
        }
        true
    }

    /// Takes a key away, however often it is there; returns whether it was.
    pub fn remove(&mut self, path: &[&str]) -> bool {
        let Some((key, parents)) = path.split_last() else { return false };
        let mut removed = false;
        while let Some(object) = self.find(parents) {
            let members = self.members(object);
            let Some(index) = members.iter().position(|member| member.key == *key) else { break };
            // With the comma after it, or before it if it is the last one.
            let cut = match (members.get(index + 1), index.checked_sub(1)) {
                (Some(next), _) => members[index].at..next.at,
                (None, Some(before)) => members[before].value.end..members[index].value.end,
                (None, None) => members[index].at..members[index].value.end,
            };
            self.text.replace_range(cut, "");
            removed = true;
        }
        removed
    }

    fn root(&self) -> Range<usize> {
        let mut reader = Reader { bytes: self.text.as_bytes(), at: 0 };
        reader.white();
        reader.at..self.text.trim_end().len()
    }

    /// Where the value at the end of a path is. Of a key that is there twice the last one counts, as
    /// in Python.
    fn find(&self, path: &[&str]) -> Option<Range<usize>> {
        let mut at = self.root();
        for key in path {
            at = self.members(at).into_iter().rev().find(|member| member.key == *key)?.value;
        }
        Some(at)
    }

    /// The members of an object; none of anything else.
    fn members(&self, object: Range<usize>) -> Vec<Member> {
        let mut reader = Reader { bytes: self.text.as_bytes(), at: object.start };
        reader.members()
    }

    /// What one level is indented by, in a document of several lines.
    fn indent(&self) -> Option<String> {
        let first = self.members(self.root()).into_iter().next()?;
        let before = &self.text[self.root().start + 1..first.at];
        let line = before.rsplit_once('\n')?.1;
        Some(line.to_owned())
    }
}

/// A value as text, in lines where the document has lines.
fn written(value: &Value, indent: Option<&str>, depth: usize) -> String {
    let Some(indent) = indent else { return spaced(value) };
    match value {
        Value::Object(map) if !map.is_empty() => {
            let lead = format!("\n{}", indent.repeat(depth + 1));
            let members: Vec<String> = map
                .iter()
                .map(|(key, value)| {
                    let key = Value::from(key.as_str());
                    format!("{lead}{key}: {}", written(value, Some(indent), depth + 1))
                })
                .collect();
            format!("{{{}\n{}}}", members.join(","), indent.repeat(depth))
        }
        Value::Array(list) if !list.is_empty() => {
            let lead = format!("\n{}", indent.repeat(depth + 1));
            let items: Vec<String> = list
                .iter()
                .map(|item| format!("{lead}{}", written(item, Some(indent), depth + 1)))
                .collect();
            format!("[{}\n{}]", items.join(","), indent.repeat(depth))
        }
        other => other.to_string(),
    }
}

/// A value on one line, as Python writes it.
fn spaced(value: &Value) -> String {
    match value {
        Value::Object(map) => {
            let members: Vec<String> = map
                .iter()
                .map(|(key, value)| format!("{}: {}", Value::from(key.as_str()), spaced(value)))
                .collect();
            format!("{{{}}}", members.join(", "))
        }
        Value::Array(list) => {
            format!("[{}]", list.iter().map(spaced).collect::<Vec<_>>().join(", "))
        }
        other => other.to_string(),
    }
}

impl JsonError {
    fn new(text: &str, at: usize, message: &'static str) -> Self {
        let before = text.as_bytes().get(..at).unwrap_or_default();
        let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
        let start = before.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        Self { message, line, column: at - start + 1 }
    }
}

/// Walks over a text. The methods that do not return a result are for texts that were checked.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

type Walked = Result<(), &'static str>;

impl Reader<'_> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn white(&mut self) {
        while matches!(self.peek(), Some(b' ' | b'\t' | b'\n' | b'\r')) {
            self.at += 1;
        }
    }

    fn document(&mut self) -> Walked {
        self.white();
        if self.peek() != Some(b'{') {
            return Err("expected an object");
        }
        self.value(0)?;
        self.white();
        match self.peek() {
            None => Ok(()),
            Some(_) => Err("something follows the document"),
        }
    }

    fn value(&mut self, depth: usize) -> Walked {
        if depth > DEEPEST {
            return Err("nested too deeply");
        }
        match self.peek() {
            Some(b'{') => self.list(b'}', |reader| {
                if reader.peek() != Some(b'"') {
                    return Err("expected a key");
                }
                reader.string()?;
                reader.white();
                if reader.peek() != Some(b':') {
                    return Err("expected `:`");
                }
                reader.at += 1;
                reader.white();
                reader.value(depth + 1)
            }),
            Some(b'[') => self.list(b']', |reader| reader.value(depth + 1)),
            Some(b'"') => self.string(),
            Some(_) => self.word(),
            None => Err("the text ends"),
        }
    }

    fn list(&mut self, end: u8, mut item: impl FnMut(&mut Self) -> Walked) -> Walked {
        self.at += 1;
        self.white();
        if self.peek() == Some(end) {
            self.at += 1;
            return Ok(());
        }
        loop {
            self.white();
            item(self)?;
            self.white();
            match self.peek() {
                Some(b',') => self.at += 1,
                Some(byte) if byte == end => {
                    self.at += 1;
                    return Ok(());
                }
                _ => return Err("expected `,` or the end of the list"),
            }
        }
    }

    fn string(&mut self) -> Walked {
        self.at += 1;
        loop {
            match self.peek() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(());
                }
                Some(b'\\') => {
                    let known = |byte: &u8| b"\"\\/bfnrt".contains(byte);
                    let hex = |code: &[u8]| code.iter().all(u8::is_ascii_hexdigit);
                    match self.bytes.get(self.at + 1) {
                        Some(byte) if known(byte) => self.at += 2,
                        Some(b'u') if self.bytes.get(self.at + 2..self.at + 6).is_some_and(hex) => {
                            self.at += 6;
                        }
                        _ => return Err("an escape that JSON does not have"),
                    }
                }
                Some(byte) if byte < 0x20 => return Err("a control character in a text"),
                Some(_) => self.at += 1,
                None => return Err("a text that does not end"),
            }
        }
    }

    /// `true`, `false`, `null`, a number, or what Python writes for one.
    fn word(&mut self) -> Walked {
        let start = self.at;
        while self
            .peek()
            .is_some_and(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'+' | b'-' | b'.'))
        {
            self.at += 1;
        }
        let word = &self.bytes[start..self.at];
        let known: [&[u8]; 6] = [b"true", b"false", b"null", b"NaN", b"Infinity", b"-Infinity"];
        if known.contains(&word) || is_number(word) {
            return Ok(());
        }
        self.at = start;
        Err("expected a value")
    }

    /// A text's value; one that is no Unicode (half a surrogate pair) as it is written.
    fn text_of(&mut self) -> String {
        let start = self.at;
        let _checked = self.string();
        let written = &self.bytes[start..self.at];
        serde_json::from_slice(written)
            .unwrap_or_else(|_| String::from_utf8_lossy(written).into_owned())
    }

    fn members(&mut self) -> Vec<Member> {
        let mut members = Vec::new();
        if self.peek() == Some(b'{') {
            let _checked = self.list(b'}', |reader| {
                let at = reader.at;
                let key = reader.text_of();
                reader.white();
                reader.at += 1;
                reader.white();
                let start = reader.at;
                reader.value(0)?;
                members.push(Member { key, at, value: start..reader.at });
                Ok(())
            });
        }
        members
    }

    fn value_of(&mut self) -> Value {
        match self.peek() {
            Some(b'{') => {
                let members = self.members();
                let value = |member: Member| {
                    let mut reader = Reader { bytes: self.bytes, at: member.value.start };
                    (member.key, reader.value_of())
                };
                Value::Object(members.into_iter().map(value).collect::<Map<String, Value>>())
            }
            Some(b'[') => {
                let mut items = Vec::new();
                let _checked = self.list(b']', |reader| {
                    items.push(reader.value_of());
                    Ok(())
                });
                Value::Array(items)
            }
            Some(b'"') => Value::String(self.text_of()),
            _ => {
                let start = self.at;
                let _checked = self.word();
                let word = String::from_utf8_lossy(&self.bytes[start..self.at]).into_owned();
                serde_json::from_str(&word).unwrap_or(Value::String(word))
            }
        }
    }
}

/// JSON's grammar of numbers.
fn is_number(word: &[u8]) -> bool {
    let digits = |rest: &mut &[u8]| {
        let count = rest.iter().take_while(|byte| byte.is_ascii_digit()).count();
        let (taken, left) = rest.split_at(count);
        *rest = left;
        taken.to_vec()
    };
    let mut rest = word.strip_prefix(b"-").unwrap_or(word);
    let whole = digits(&mut rest);
    if whole.is_empty() || whole.len() > 1 && whole[0] == b'0' {
        return false;
    }
    if let Some(fraction) = rest.strip_prefix(b".") {
        rest = fraction;
        if digits(&mut rest).is_empty() {
            return false;
        }
    }
    if let Some(exponent) = rest.strip_prefix(b"e").or_else(|| rest.strip_prefix(b"E")) {
        rest =
            exponent.strip_prefix(b"+").or_else(|| exponent.strip_prefix(b"-")).unwrap_or(exponent);
        if digits(&mut rest).is_empty() {
            return false;
        }
    }
    rest.is_empty()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on should panic")]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const PYTHON: &str = "{\n  \"z\": [0.0, Infinity, -Infinity, NaN],\n  \"n\": 123456789012345678901234567890,\n  \"e\": 1e-05,\n  \"q\": {\"a\": 1, \"b\": null},\n  \"last\": \"\\ud800 \\u00e9\"\n}\n";

    #[test]
    fn what_is_not_changed_stays_byte_for_byte() {
        let mut json = JsonText::parse(PYTHON).unwrap();
        assert!(json.set(&["new"], &json!({"k": [1, 2]})));
        assert!(json.as_str().contains("\"new\": {\n    \"k\": [\n      1,\n      2\n    ]\n  }"));
        assert!(json.remove(&["new"]));
        assert_eq!(json.as_str(), PYTHON);
        assert!(json.set(&["q"], &json!(7)));
        assert_eq!(json.as_str(), PYTHON.replace("{\"a\": 1, \"b\": null}", "7"));
    }

    #[test]
    fn keys_go_from_any_place_and_however_often_they_are_there() {
        for (before, after) in [
            (r#"{"k": 1}"#, "{}"),
            (r#"{"k": 1, "a": 2}"#, r#"{"a": 2}"#),
            (r#"{"a": 2, "k": 1}"#, r#"{"a": 2}"#),
            (r#"{"a": 2, "k": 1, "b": 3}"#, r#"{"a": 2, "b": 3}"#),
            (r#"{"k": {"k": 1}, "a": 2, "k": 3}"#, r#"{"a": 2}"#),
            (r#"{"a": {"k": 1}}"#, r#"{"a": {"k": 1}}"#),
        ] {
            let mut json = JsonText::parse(before).unwrap();
            json.remove(&["k"]);
            assert_eq!(json.as_str(), after);
        }
        let mut json = JsonText::parse(r#"{"a": {"k": 1, "b": 2}}"#).unwrap();
        assert!(json.remove(&["a", "k"]));
        assert_eq!(json.as_str(), r#"{"a": {"b": 2}}"#);
    }

    #[test]
    fn values_are_found_at_any_depth_and_the_last_of_two_counts() {
        let json = JsonText::parse(r#"{"k": 1, "a": {"k": [NaN, 2]}, "b": [{"k": 3}], "k": 4}"#);
        let json = json.unwrap();
        assert_eq!(json.get(&["k"]), Some(json!(4)));
        assert_eq!(json.get(&["a", "k"]), Some(json!(["NaN", 2])));
        assert_eq!(json.get(&["a", "x"]), None);
        assert_eq!(json.paths_of("k"), [vec!["k"], vec!["a", "k"], vec!["k"]]);
    }

    #[test]
    fn what_is_no_object_or_no_json_is_refused_with_the_place() {
        for text in [
            "",
            "[1]",
            "\"x\"",
            "{",
            "{\"a\"}",
            "{\"a\": }",
            "{\"a\": 01}",
            "{\"a\": 1,}",
            "{\"a\": nan}",
            "{\"a\": 1} 2",
            "{\"a\": \"\\x\"}",
            "{\"a\": \"\n\"}",
            "{a: 1}",
            "{\"a\": 1.}",
            "{\"a\": +1}",
        ] {
            assert!(JsonText::parse(text).is_err(), "{text}");
        }
        let error = JsonText::parse("{\n \"a\": x}").unwrap_err();
        assert_eq!(error.to_string(), "expected a value at line 2 column 7");
        let deep = format!("{{\"a\": {}", "[".repeat(100_000));
        assert!(JsonText::parse(deep).is_err());
    }

    proptest! {
        #[test]
        fn edits_are_those_of_any_other_json_library(
            keys in prop::collection::vec("[a-c]", 1..6),
            edits in prop::collection::vec(("[a-d]", prop::option::of(0..100_u32)), 1..6),
            lines in any::<bool>(),
        ) {
            let mut map = Map::new();
            for (index, key) in keys.iter().enumerate() {
                map.insert(key.clone(), json!({"inner": index, "list": [1, {"x": "}"}]}));
            }
            let value = Value::Object(map.clone());
            let text = if lines { format!("{value:#}") } else { value.to_string() };
            let mut ours = JsonText::parse(text).unwrap();
            for (key, edit) in &edits {
                match edit {
                    Some(number) => {
                        prop_assert!(ours.set(&[key], &json!(number)));
                        map.insert(key.clone(), json!(number));
                    }
                    None => prop_assert_eq!(ours.remove(&[key]), map.remove(key).is_some()),
                }
                let back: Value = serde_json::from_str(ours.as_str()).unwrap();
                prop_assert_eq!(&back, &Value::Object(map.clone()));
                prop_assert!(JsonText::parse(ours.as_str()).is_ok());
            }
        }
    }
}
