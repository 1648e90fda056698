//! See `pgcutover::proxy::fuzzing::startup_options`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::proxy::fuzzing::startup_options(data));
