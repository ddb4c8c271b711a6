//! Three parsers, and one form for their errors.

use serde::de::DeserializeSeed;
use serde_saphyr::options::{DuplicateKeyPolicy, NonFiniteFloatPolicy};

use crate::Format;

/// What is wrong with a text, and where.
pub(crate) struct Problem {
    pub(crate) line: Option<usize>,
    pub(crate) message: String,
}

/// Reads a value out of a text of a format.
pub(crate) fn run<T>(
    text: &str,
    format: Format,
    seed: impl for<'de> DeserializeSeed<'de, Value = T>,
) -> Result<T, Problem> {
    match format {
        Format::Toml => toml::Deserializer::parse(text)
            .and_then(|deserializer| seed.deserialize(deserializer))
            .map_err(|error| Problem {
                line: error.span().and_then(|span| line_at(text, span.start)),
                message: error.message().to_owned(),
            }),
        Format::Json => {
            let mut deserializer = serde_json::Deserializer::from_str(text);
            seed.deserialize(&mut deserializer)
                .and_then(|value| deserializer.end().map(|()| value))
                .map_err(|error| {
                    let (line, column) = (error.line(), error.column());
                    Problem {
                        line: (line > 0).then_some(line),
                        message: without_place(
                            error.to_string(),
                            &format!(" at line {line} column {column}"),
                        ),
                    }
                })
        }
        Format::Yaml => {
            let read =
                |deserializer: serde_saphyr::Deserializer<'_, '_>| seed.deserialize(deserializer);
            serde_saphyr::with_deserializer_from_str_with_options(text, yaml_options(), read)
                .map_err(|error| {
                    let words = &serde_saphyr::UserMessageFormatter;
                    let message = error.without_snippet().render_with_formatter(words);
                    match error.location() {
                        Some(place) => {
                            let (line, column) = (place.line(), place.column());
                            let place = format!(" at line {line}, column {column}");
                            Problem {
                                line: usize::try_from(line).ok(),
                                message: without_place(message, &place),
                            }
                        }
                        None => Problem { line: None, message },
                    }
                })
        }
    }
}

/// YAML 1.2, whose keys and numbers are checked where they are read: in their own words, and alike
/// for all three formats.
fn yaml_options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        with_snippet: false,
        strict_booleans: true,
        // YAML 1.1, which verl reads, takes `0755` for octal, and YAML 1.2 does not: it is no number here.
        leading_zero_numbers_as_strings: true,
        duplicate_keys: DuplicateKeyPolicy::PassThrough,
        non_finite_float_policy: NonFiniteFloatPolicy::PassThrough,
    }
}

fn line_at(text: &str, offset: usize) -> Option<usize> {
    Some(text.get(..offset)?.matches('\n').count() + 1)
}

/// The line stands before the message already.
fn without_place(message: String, place: &str) -> String {
    match message.strip_suffix(place) {
        Some(message) => message.to_owned(),
        None => message,
    }
}
