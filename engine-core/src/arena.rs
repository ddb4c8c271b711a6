//! Values that are shared many at a time.

use std::fmt;
use std::ops::Deref;
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Values of one allocation.
const CHUNK: usize = 1024;

/// Makes values that live together, many in an allocation with one reference count.
///
/// A model has tens of thousands of descriptions, and every update shares each of them several times. A count of its own
/// for each is rarely in a CPU's caches, and to change it the CPU waits for memory: that was half of the host's work of an
/// update. What shares a value keeps all values of its allocation alive.
#[derive(Debug)]
pub struct Arena<T> {
    chunk: Arc<[OnceLock<T>]>,
    next: usize,
}

impl<T> Default for Arena<T> {
    fn default() -> Self {
        Self { chunk: Arc::new([]), next: 0 }
    }
}

impl<T> Arena<T> {
    /// Moves a value there.
    pub fn put(&mut self, value: T) -> ArenaArc<T> {
        if self.next == self.chunk.len() {
            self.chunk = std::iter::repeat_with(OnceLock::new).take(CHUNK).collect();
            self.next = 0;
        }
        let at = self.next;
        self.next += 1;
        ArenaArc::set(self.chunk.clone(), at, value)
    }
}

/// A value that is shared by reference count, as with an [`Arc`], but with one count for many: see [`Arena`].
///
/// Two of the same value are equal without a look at it.
pub struct ArenaArc<T> {
    chunk: Arc<[OnceLock<T>]>,
    /// Is set: only `set` makes one.
    at: u32,
}

impl<T> ArenaArc<T> {
    fn set(chunk: Arc<[OnceLock<T>]>, at: usize, value: T) -> Self {
        chunk[at].get_or_init(|| value);
        // At most a chunk.
        Self { chunk, at: at as u32 }
    }

    /// Whether both are the same value, and not only equal.
    pub fn is(&self, other: &Self) -> bool {
        std::ptr::eq(&**self, &**other)
    }
}

impl<T> From<T> for ArenaArc<T> {
    fn from(value: T) -> Self {
        Self::set(Arc::new([OnceLock::new()]), 0, value)
    }
}

impl<T> Deref for ArenaArc<T> {
    type Target = T;

    fn deref(&self) -> &T {
        match self.chunk[self.at as usize].get() {
            Some(value) => value,
            None => unreachable!("it was set before this was made"),
        }
    }
}

impl<T> Clone for ArenaArc<T> {
    fn clone(&self) -> Self {
        Self { chunk: self.chunk.clone(), at: self.at }
    }
}

impl<T: fmt::Debug> fmt::Debug for ArenaArc<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (**self).fmt(f)
    }
}

impl<T: Eq> PartialEq for ArenaArc<T> {
    fn eq(&self, other: &Self) -> bool {
        (Arc::ptr_eq(&self.chunk, &other.chunk) && self.at == other.at) || **self == **other
    }
}

impl<T: Eq> Eq for ArenaArc<T> {}

impl<T: Serialize> Serialize for ArenaArc<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        (**self).serialize(serializer)
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for ArenaArc<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        T::deserialize(deserializer).map(Self::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its number, and a clone of what counts how many are left.
    type Counted = (usize, Arc<()>);

    #[test]
    fn every_value_is_the_one_that_was_put_there_however_many_there_are() {
        let (count, mut arena) = (Arc::new(()), Arena::default());
        let all: Vec<ArenaArc<Counted>> =
            (0..2 * CHUNK + 7).map(|at| arena.put((at, count.clone()))).collect();
        assert!(all.iter().enumerate().all(|(at, value)| value.0 == at));
        drop(arena);
        let last = all[CHUNK].clone();
        drop(all);
        assert_eq!(last.0, CHUNK);
        assert_eq!(Arc::strong_count(&count), 1 + CHUNK, "those of its allocation stay");
        drop(last);
        assert_eq!(Arc::strong_count(&count), 1);
    }

    #[test]
    fn equal_are_those_of_equal_values_and_the_same_those_of_one() {
        let mut arena = Arena::default();
        let (one, other, alone) = (arena.put(1), arena.put(2), ArenaArc::from(1));
        assert!(one == one.clone() && one.is(&one.clone()));
        assert!(one == alone && !one.is(&alone));
        assert_ne!(one, other);
    }

    #[test]
    fn it_travels_as_its_value() {
        let text = serde_json::to_string(&ArenaArc::from(vec![1, 2])).unwrap();
        assert_eq!(text, "[1,2]");
        assert_eq!(*serde_json::from_str::<ArenaArc<Vec<u8>>>(&text).unwrap(), [1, 2]);
    }
}
