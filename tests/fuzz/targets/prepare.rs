//! See `pgcutover::proxy::handoff::fuzzing::prepare`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::proxy::handoff::fuzzing::prepare(data));
