//! See `pgcutover::wire::fuzzing::error_fields`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::wire::fuzzing::error_fields(data));
