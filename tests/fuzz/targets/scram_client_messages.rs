//! See `pgcutover::wire::fuzzing::scram_client_messages`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::wire::fuzzing::scram_client_messages(data));
