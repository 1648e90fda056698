//! See `pgcutover::wire::fuzzing::server_stream`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::wire::fuzzing::server_stream(data));
