//! See `pgcutover::admin::http::fuzzing::http_guard`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| pgcutover::admin::http::fuzzing::http_guard(data));
