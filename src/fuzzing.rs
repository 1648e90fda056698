//! Every function that fuzzing drives, by the name of its target: one for each parser of bytes from a client, a server
//! or an operator. Built for tests and fuzzing only.
//!
//! `tests/fuzz` makes a libFuzzer target of each; the test below replays the corpus kept there, with the ordinary
//! compiler. An input that ever broke something is kept under its target and comes back here.

use tokio::runtime::Runtime;

use crate::{admin, cli, config, migration, pgoutput, postgres, proxy, wire};

/// What a target needs besides its input.
#[derive(Clone, Copy)]
pub enum Target {
    /// Nothing.
    Pure(fn(&[u8])),
    /// A current-thread runtime: the parser sits inside an exchange, met by a scripted peer.
    Scripted(fn(&Runtime, &[u8])),
}

use Target::{Pure, Scripted};

/// The names are those of the files in `tests/fuzz/targets` and of the folders in `tests/fuzz/corpus`.
pub const TARGETS: &[(&str, Target)] = &[
    ("access_files", Pure(proxy::fuzzing::access_files)),
    ("authentication", Scripted(postgres::fuzzing::authentication)),
    ("backend_frames", Pure(postgres::fuzzing::backend_frames)),
    ("bind", Pure(proxy::handoff::fuzzing::bind)),
    ("certificate", Pure(proxy::fuzzing::certificate)),
    ("config", Pure(config::fuzzing::config)),
    ("console", Pure(admin::console::fuzzing::console)),
    ("control_answers", Scripted(postgres::fuzzing::control_answers)),
    ("dump", Pure(migration::schema::fuzzing::dump)),
    ("error_fields", Pure(wire::fuzzing::error_fields)),
    ("expected", Pure(proxy::fuzzing::expected)),
    ("frontend_frames", Pure(wire::fuzzing::frontend_frames)),
    ("handoff_answers", Scripted(proxy::handoff::fuzzing::handoff_answers)),
    ("handshake", Scripted(proxy::fuzzing::handshake)),
    ("http_guard", Pure(admin::http::fuzzing::http_guard)),
    ("ledger", Pure(wire::fuzzing::ledger)),
    ("password_messages", Pure(wire::fuzzing::password_messages)),
    ("pgoutput", Pure(pgoutput::fuzzing::pgoutput)),
    ("prepare", Pure(proxy::handoff::fuzzing::prepare)),
    ("properties", Pure(cli::fuzzing::properties)),
    ("proxy_header", Pure(wire::fuzzing::proxy_header)),
    ("scram_client_messages", Pure(wire::fuzzing::scram_client_messages)),
    ("scram_server_messages", Pure(postgres::fuzzing::scram_server_messages)),
    ("scram_verifier", Pure(wire::fuzzing::scram_verifier)),
    ("server_stream", Pure(wire::fuzzing::server_stream)),
    ("server_texts", Pure(postgres::fuzzing::server_texts)),
    ("snapshot", Pure(migration::schema::fuzzing::snapshot)),
    ("sql_scan", Pure(proxy::handoff::fuzzing::sql_scan)),
    ("startup", Pure(wire::fuzzing::startup)),
    ("startup_options", Pure(proxy::fuzzing::startup_options)),
    ("takeover_messages", Pure(proxy::fuzzing::takeover_messages)),
    ("traces", Pure(proxy::handoff::fuzzing::traces)),
    ("tracked", Pure(proxy::handoff::fuzzing::tracked)),
    ("walsender_messages", Pure(postgres::fuzzing::walsender_messages)),
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::PathBuf;

    use super::*;

    fn folder(name: &str) -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz").join(name)
    }

    fn names(of: &str) -> BTreeSet<String> {
        let entries = std::fs::read_dir(folder(of)).expect("a folder");
        let stem = |path: PathBuf| path.file_stem().map(|stem| stem.to_string_lossy().into_owned());
        entries.filter_map(|entry| stem(entry.expect("readable").path())).collect()
    }

    #[test]
    fn every_target_has_its_file_and_its_corpus() {
        let known: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(names("targets"), known);
        assert_eq!(names("corpus"), known);
    }

    #[test]
    fn the_corpus_keeps_every_promise() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        for (name, target) in TARGETS {
            let mut inputs = vec![Vec::new()];
            for entry in std::fs::read_dir(folder("corpus").join(name)).expect("a folder") {
                inputs.push(std::fs::read(entry.expect("readable").path()).expect("readable"));
            }
            assert!(inputs.len() > 1, "{name} has no corpus");
            for input in inputs {
                // Shown only where the test fails: which input it was.
                println!("{name}: {}", input.escape_ascii());
                match target {
                    Pure(check) => check(&input),
                    Scripted(check) => check(&runtime, &input),
                }
            }
        }
    }
}
