//! See `pgcutover::wire::fuzzing::proxy_header`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::wire::fuzzing::proxy_header(data));
