//! See `pgcutover::proxy::fuzzing::handshake`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover_fuzz::scripted(pgcutover::proxy::fuzzing::handshake, data));
