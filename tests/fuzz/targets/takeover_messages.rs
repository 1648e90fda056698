//! See `pgcutover::proxy::fuzzing::takeover_messages`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::proxy::fuzzing::takeover_messages(data));
