//! Gives a backend's options their type, and refuses options that the type does not have.

use serde::Deserialize;
use serde::de::value::Error;
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value};

pub(super) fn typed<'de, T: Deserialize<'de>>(
    options: &'de Map<String, Value>,
) -> Result<T, Error> {
    T::deserialize(Options(options))
}

/// A struct tells its deserialiser the names of its fields; this one compares them with what is
/// there before anything is read, so that no backend can forget `deny_unknown_fields`.
struct Options<'de>(&'de Map<String, Value>);

impl<'de> Deserializer<'de> for Options<'de> {
    type Error = Error;

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        match self.0.keys().find(|key| !fields.contains(&key.as_str())) {
            Some(key) if fields.is_empty() => {
                Err(Error::custom(format_args!("unknown key `{key}`; this backend has no options")))
            }
            Some(key) => Err(Error::custom(format_args!(
                "unknown key `{key}`; known keys: `{}`",
                fields.join("`, `")
            ))),
            None => self.deserialize_any(visitor),
        }
    }

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(Entries { rest: self.0.iter(), value: None })
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option
        unit unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

struct Entries<'de> {
    rest: serde_json::map::Iter<'de>,
    value: Option<(&'de str, &'de Value)>,
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, Error> {
        let Some((key, value)) = self.rest.next() else { return Ok(None) };
        self.value = Some((key, value));
        seed.deserialize(serde::de::value::BorrowedStrDeserializer::new(key)).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let Some((key, value)) = self.value.take() else {
            return Err(Error::custom("a value was asked for before its key"));
        };
        seed.deserialize(value).map_err(|error| Error::custom(format_args!("`{key}`: {error}")))
    }
}
