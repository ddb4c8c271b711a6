//! What a pickle of the trainer's says, as plain data: nothing is looked up, and nothing is called.

/// A value.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Said {
    None,
    Bool(bool),
    Int(i64),
    Text(String),
    Bytes(Vec<u8>),
    /// Of a tuple or a list.
    Items(Vec<Said>),
    Dict(Vec<(Said, Said)>),
    Global(String),
    Call(String, Vec<Said>),
}

impl Said {
    pub(crate) fn int(&self) -> Option<u64> {
        match self {
            Self::Int(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    pub(crate) fn items(&self) -> Option<&[Said]> {
        match self {
            Self::Items(items) => Some(items),
            _ => None,
        }
    }

    pub(crate) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) | Self::Global(text) => Some(text),
            _ => None,
        }
    }

    /// What a dictionary has for a key.
    pub(crate) fn get(&self, key: &str) -> Option<&Said> {
        let Self::Dict(items) = self else { return None };
        items.iter().find(|(name, _)| name.text() == Some(key)).map(|(_, value)| value)
    }
}

/// Reads the operations that the trainer uses; `None` for any other, and for one that ends early.
pub(crate) fn unpickle(bytes: &[u8]) -> Option<Said> {
    let mut rest = bytes.strip_prefix(&[0x80, 3])?;
    let (mut stack, mut marks) = (Vec::<Said>::new(), Vec::<usize>::new());
    let take = |rest: &mut &[u8], len: usize| -> Option<Vec<u8>> {
        let (taken, after) = rest.split_at_checked(len)?;
        *rest = after;
        Some(taken.to_vec())
    };
    let sized = |rest: &mut &[u8]| -> Option<Vec<u8>> {
        let len = u32::from_le_bytes(take(rest, 4)?.try_into().ok()?);
        take(rest, len as usize)
    };
    let line = |rest: &mut &[u8]| -> Option<String> {
        let end = rest.iter().position(|byte| *byte == b'\n')?;
        let text = String::from_utf8(take(rest, end)?).ok()?;
        take(rest, 1)?;
        Some(text)
    };
    loop {
        let operation = take(&mut rest, 1)?[0];
        let value = match operation {
            b'N' => Said::None,
            0x88 | 0x89 => Said::Bool(operation == 0x88),
            0x8a => {
                assert_eq!(take(&mut rest, 1)?, [8]);
                Said::Int(i64::from_le_bytes(take(&mut rest, 8)?.try_into().ok()?))
            }
            b'X' => Said::Text(String::from_utf8(sized(&mut rest)?).ok()?),
            b'B' => Said::Bytes(sized(&mut rest)?),
            b']' | b'}' => continue,
            b'(' => {
                marks.push(stack.len());
                continue;
            }
            b't' | b'e' => Said::Items(stack.split_off(marks.pop()?)),
            b'u' => {
                let items = stack.split_off(marks.pop()?);
                Said::Dict(items.chunks(2).map(|pair| (pair[0].clone(), pair[1].clone())).collect())
            }
            b'c' => Said::Global(format!("{}.{}", line(&mut rest)?, line(&mut rest)?)),
            b'R' => match (stack.pop()?, stack.pop()?) {
                (Said::Items(arguments), Said::Global(name)) => Said::Call(name, arguments),
                _ => return None,
            },
            b'.' => return stack.pop().filter(|_| stack.is_empty() && rest.is_empty()),
            _ => return None,
        };
        stack.push(value);
    }
}
