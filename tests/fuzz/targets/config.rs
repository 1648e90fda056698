//! See `pgcutover::config::fuzzing::config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::config::fuzzing::config(data));
