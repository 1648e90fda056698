//! See `pgcutover::postgres::fuzzing::scram_server_messages`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::postgres::fuzzing::scram_server_messages(data));
