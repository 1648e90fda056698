//! See `pgcutover::postgres::fuzzing::walsender_messages`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::postgres::fuzzing::walsender_messages(data));
