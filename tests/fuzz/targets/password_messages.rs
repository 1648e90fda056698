//! See `pgcutover::wire::fuzzing::password_messages`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::wire::fuzzing::password_messages(data));
