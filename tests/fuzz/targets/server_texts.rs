//! See `pgcutover::postgres::fuzzing::server_texts`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::postgres::fuzzing::server_texts(data));
