//! See `pgcutover::proxy::fuzzing::certificate`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::proxy::fuzzing::certificate(data));
