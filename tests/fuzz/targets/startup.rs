//! See `pgcutover::wire::fuzzing::startup`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::wire::fuzzing::startup(data));
