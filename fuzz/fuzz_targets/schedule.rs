//! Whole groups of the protocol's machines, through schedules of everything that may happen to them: messages that come
//! late, twice, garbled or never, and ranks that die.

#![no_main]

use libfuzzer_sys::fuzz_target;

/// As many steps as fit into the time that one input may take.
const LONGEST: usize = 240;

fuzz_target!(|input: (bool, Vec<u16>)| {
    let (faults, mut numbers) = input;
    numbers.truncate(LONGEST);
    protocol::fuzzing::schedule(&numbers, faults);
});
