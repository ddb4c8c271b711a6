//! What is lent, as the parts that it consists of.

/// Parts of a [`Lender`](crate::Lender)'s memory, found by offsets: each begins at an offset, and has something to say of its bytes.
#[derive(Clone, Debug)]
pub struct Parts<T>(Vec<(u64, u64, T)>);

impl<T> Parts<T> {
    /// Parts that do not overlap, each with the offset of its first byte and its length. Those of no bytes are left out.
    pub fn new(parts: impl IntoIterator<Item = (u64, u64, T)>) -> Self {
        let mut parts: Vec<_> = parts.into_iter().filter(|(_, bytes, _)| *bytes > 0).collect();
        parts.sort_by_key(|(at, _, _)| *at);
        Self(parts)
    }

    /// The offset behind the last part.
    pub(crate) fn end(&self) -> u64 {
        self.0.last().map_or(0, |(at, bytes, _)| at + bytes)
    }

    /// The part with all of these bytes, and where in it they begin.
    pub fn find(&self, at: u64, len: u64) -> Option<(&T, u64)> {
        let after = self.0.partition_point(|(start, _, _)| *start <= at);
        let (start, bytes, part) = self.0.get(after.checked_sub(1)?)?;
        let from = at - start;
        from.checked_add(len).filter(|end| end <= bytes).map(|_| (part, from))
    }

    /// The part that has this byte, where in it that is, and how many of its bytes there are from there on.
    pub fn rest(&self, at: u64) -> Option<(&T, u64, u64)> {
        let (part, from) = self.find(at, 1)?;
        let after = self.0.partition_point(|(start, _, _)| *start <= at);
        let (_, bytes, _) = self.0.get(after.checked_sub(1)?)?;
        Some((part, from, bytes - from))
    }
}

impl<T: AsRef<[u8]>> Parts<T> {
    /// These bytes of the host, if they are in one part.
    pub fn bytes(&self, at: u64, len: u64) -> Option<&[u8]> {
        let (part, from) = self.find(at, len)?;
        let from = usize::try_from(from).ok()?;
        part.as_ref().get(from..from.checked_add(usize::try_from(len).ok()?)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_are_those_of_the_part_that_has_all_of_them(
            // The gaps between parts, and their lengths.
            sizes in proptest::collection::vec((0_u64..5, 0_u64..9), 0..8),
            at in 0_u64..90,
            len in 0_u64..12,
            far in prop::bool::weighted(0.1),
        ) {
            let mut end = 0;
            let mut all = Vec::new();
            for (number, (gap, bytes)) in sizes.iter().enumerate() {
                let at = end + gap;
                end = at + bytes;
                let values: Vec<u8> = (0..*bytes).map(|byte| number as u8 * 16 + byte as u8).collect();
                all.push((at, values));
            }
            let len = if far { u64::MAX - len } else { len };
            let expected = all.iter().find_map(|(start, values)| {
                let holds = !values.is_empty()
                    && at >= *start
                    && at.checked_add(len)? <= start + values.len() as u64
                    && (at < start + values.len() as u64 || len == 0);
                holds.then(|| values[(at - start) as usize..(at - start + len) as usize].to_vec())
            });
            let mut shuffled = all.clone();
            shuffled.reverse();
            let parts = Parts::new(shuffled.into_iter().map(|(at, v)| (at, v.len() as u64, v)));
            match (parts.bytes(at, len), expected) {
                // No bytes are anywhere.
                (found, _) if len == 0 => prop_assert!(found.is_none_or(<[u8]>::is_empty)),
                (found, expected) => prop_assert_eq!(found.map(<[u8]>::to_vec), expected),
            }
        }
    }
}
