//! See `pgcutover::proxy::fuzzing::expected`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::proxy::fuzzing::expected(data));
