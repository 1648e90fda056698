//! See `pgcutover::proxy::fuzzing::access_files`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::proxy::fuzzing::access_files(data));
