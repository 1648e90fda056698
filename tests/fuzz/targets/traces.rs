//! See `pgcutover::proxy::handoff::fuzzing::traces`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::proxy::handoff::fuzzing::traces(data));
