//! The rules of the source that no compiler checks: layers, pure modules, no hidden state, headers, names, sizes.
//!
//! Every check is a function from text to findings, so that a test below can show it finding something.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// `use crate::…` points only downwards. Within a layer, only the pairs of [`SIDEWAYS`] may meet.
const LAYERS: &[(u8, &[&str])] = &[
    (5, &["main", "cli", "app", "demo", "fuzzing"]),
    (4, &["admin"]),
    (3, &["cutover"]),
    (2, &["proxy", "migration"]),
    (1, &["switch", "catalog", "postgres", "wire", "pgoutput"]),
    (0, &["lsn", "ident", "sqlstate", "config", "shutdown", "failpoint", "telemetry"]),
];

/// Who may use whom within a layer; layers 5 and 0 are free.
const SIDEWAYS: &[(&str, &str)] = &[("catalog", "postgres"), ("catalog", "switch"), ("postgres", "wire")];

/// Files and folders (below src/) that have no sockets, no clock and no runtime.
const PURE: &[&str] = &[
    "wire/",
    "pgoutput/",
    "migration/state.rs",
    "migration/apply/plan",
    "migration/backoff.rs",
    "cutover/phase.rs",
    "catalog/resolve",
    "proxy/auth/hba",
    "proxy/auth/user_maps.rs",
    "proxy/handoff/scan.rs",
];

/// What a pure module never names.
const IMPURE: &[&str] =
    &["tokio", "tokio_postgres", "socket2", "TcpStream", "UnixStream", "Instant", "SystemTime", "await", "std::fs"];

/// Types that make a `static` hold state.
const STATEFUL: &[&str] =
    &["Mutex", "RwLock", "Atomic", "OnceLock", "OnceCell", "LazyLock", "LazyCell", "ArcSwap", "RefCell", "Cell<"];

/// Names that say nothing about the domain.
const EMPTY_NAMES: &[&str] = &["utils", "util", "common", "helpers", "helper", "types", "manager", "misc"];

/// Longer than this, tests at the end not counted, needs a reason in [`LONG_FILES`].
const LINES: usize = 640;

/// Long files, and why they are one straight story.
const LONG_FILES: &[(&str, &str)] = &[];

#[test]
fn layers_point_downwards() {
    no_findings(sources("src"), layer_findings);
}

#[test]
fn pure_modules_stay_pure() {
    no_findings(sources("src"), purity_findings);
}

#[test]
fn no_static_holds_state() {
    no_findings(sources("src"), static_findings);
}

#[test]
fn no_lint_is_switched_off_in_silence() {
    no_findings(all_sources(), lint_findings);
}

#[test]
fn files_say_what_they_are_and_stay_readable() {
    no_findings(all_sources(), file_findings);
}

#[test]
fn dependencies_say_what_they_are_for() {
    let text = fs::read_to_string(root().join("Cargo.toml")).expect("Cargo.toml is readable");
    let findings = dependency_findings(&text);
    assert!(findings.is_empty(), "\n{}", findings.join("\n"));
}

#[test]
fn every_pure_path_exists() {
    let files = sources("src");
    for path in PURE {
        let prefix = format!("src/{path}");
        assert!(files.iter().any(|(file, _)| file.starts_with(&prefix)), "PURE names {path}, which is not there");
    }
    for (path, _) in LONG_FILES {
        assert!(root().join(path).exists(), "LONG_FILES names {path}, which is not there");
    }
}

#[test]
fn the_readme_names_only_what_exists() {
    let text = fs::read_to_string(root().join("README.md")).expect("README.md is readable");
    let findings = readme_findings(&text, &make_targets(), &help_of);
    assert!(findings.is_empty(), "\n{}", findings.join("\n"));
    for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
        let outside = link.starts_with("http") || link.starts_with('#');
        let file = link.split_once('#').map_or(link, |(file, _)| file);
        assert!(outside || root().join(file).exists(), "README.md links to {link}, which is not there");
    }
}

// --- the checks -----------------------------------------------------------------------------------------------------

fn layer_findings(path: &str, text: &str) -> Vec<String> {
    let from = top_module(path);
    if from == "lib" {
        return Vec::new();
    }
    let Some(from_layer) = layer(from) else { return vec![format!("module `{from}` is in no layer")] };
    let mut findings = Vec::new();
    for (line, to) in crate_paths(path, text) {
        let Some(to_layer) = layer(&to) else {
            findings.push(format!("{line}: `crate::{to}` is in no layer"));
            continue;
        };
        let sideways = to_layer == from_layer && !matches!(from_layer, 0 | 5);
        let allowed = SIDEWAYS.contains(&(from, to.as_str()));
        if to != from && (to_layer > from_layer || sideways && !allowed) {
            findings.push(format!("{line}: {from} (layer {from_layer}) uses {to} (layer {to_layer})"));
        }
    }
    findings
}

fn purity_findings(path: &str, text: &str) -> Vec<String> {
    let below_src = path.strip_prefix("src/").unwrap_or(path);
    if !PURE.iter().any(|pure| below_src.starts_with(pure)) {
        return Vec::new();
    }
    let code = code_only(text);
    let mut findings = Vec::new();
    for (index, line) in code.lines().enumerate() {
        for word in IMPURE.iter().filter(|word| has_word(line, word)) {
            findings.push(format!("{}: a pure module names `{word}`", index + 1));
        }
    }
    findings
}

/// The one file with such a static: a port that was given out may not be bound yet, and nothing but the process knows.
const GIVES_OUT_PORTS: &str = "src/demo/cluster/process.rs";

fn static_findings(path: &str, text: &str) -> Vec<String> {
    if path == GIVES_OUT_PORTS {
        return Vec::new();
    }
    let code = code_only(text);
    let mut findings = Vec::new();
    for (index, line) in code.lines().enumerate() {
        let item = line.trim_start().trim_start_matches("pub(crate) ").trim_start_matches("pub ");
        let state = item.starts_with("static mut ")
            || item.starts_with("thread_local!")
            || item.starts_with("static ") && STATEFUL.iter().any(|kind| item.contains(kind));
        if state {
            findings.push(format!("{}: a static with state; pass a handle from app.rs", index + 1));
        }
    }
    findings
}

fn lint_findings(_path: &str, text: &str) -> Vec<String> {
    let code = code_only(text);
    let mut findings = Vec::new();
    for (index, line) in code.lines().enumerate() {
        let packed: String = line.split_whitespace().collect();
        if packed.contains("#[allow(") || packed.contains("#![allow(") {
            findings.push(format!("{}: `allow`; use #[expect(…, reason = \"…\")]", index + 1));
        }
    }
    findings
}

fn file_findings(path: &str, text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    if !text.trim_start_matches("#![cfg(loom)]").trim_start().starts_with("//!") {
        findings.push("1: no header that says what the file is, why it exists, what it must never do".into());
    }
    let stem = Path::new(path).file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    if EMPTY_NAMES.contains(&stem.as_str()) {
        findings.push(format!("1: `{stem}` is not a noun of the domain"));
    }
    let lines = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).count();
    if lines > LINES && !LONG_FILES.iter().any(|(long, _)| *long == path) {
        findings.push(format!("1: {lines} lines; split it, or give the reason in LONG_FILES"));
    }
    findings
}

fn dependency_findings(text: &str) -> Vec<String> {
    let mut findings = Vec::new();
    let mut in_dependencies = false;
    let mut previous = "";
    for (index, line) in text.lines().enumerate() {
        if line.starts_with('[') {
            in_dependencies = line.trim_end().ends_with("dependencies]");
        } else if in_dependencies && line.contains('=') && !line.starts_with([' ', '#']) && !previous.starts_with('#') {
            findings.push(format!("Cargo.toml:{}: no comment above says what `{line}` is for", index + 1));
        }
        previous = line;
    }
    findings
}

/// `help` gives the help text of a subcommand, if there is one.
fn readme_findings(text: &str, targets: &[String], help: &dyn Fn(&[&str]) -> Option<String>) -> Vec<String> {
    let mut findings = Vec::new();
    for code in code_of_markdown(text) {
        let words: Vec<&str> = code.split_whitespace().collect();
        if let ["make", target, ..] = words.as_slice()
            && !targets.iter().any(|known| known == target)
        {
            findings.push(format!("`make {target}` is not in the Makefile"));
        }
        if words.first() != Some(&"pgcutover") {
            continue;
        }
        let command: Vec<&str> = words[1..].iter().copied().take_while(|word| is_subcommand(word)).collect();
        // A migration's name follows the verb: `migration show move`.
        let verb = if command.first() == Some(&"migration") { 2 } else { 1 };
        let command = &command[..command.len().min(verb)];
        let Some(help) = help(command) else {
            findings.push(format!("`{code}`: there is no such command"));
            continue;
        };
        let options = words[1..].iter().take_while(|word| !word.starts_with('#'));
        for option in options.filter(|word| word.starts_with("--")) {
            let option = option.split('=').next().unwrap_or(option);
            if !has_word(&help, option) && option != "--help" {
                findings.push(format!("`{code}`: no option {option}"));
            }
        }
    }
    findings
}

fn is_subcommand(word: &str) -> bool {
    word.starts_with(|c: char| c.is_ascii_lowercase()) && word.chars().all(|c| c.is_ascii_lowercase() || c == '-')
}

/// Lines of fenced blocks, and what stands between single backticks.
fn code_of_markdown(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if fenced {
            found.push(line.split(" # ").next().unwrap_or(line).trim().to_owned());
        } else {
            found.extend(line.split('`').skip(1).step_by(2).map(str::to_owned));
        }
    }
    found
}

fn make_targets() -> Vec<String> {
    let text = fs::read_to_string(root().join("Makefile")).expect("the Makefile is readable");
    text.lines().filter_map(|line| line.split_once(':')).map(|(target, _)| target.to_owned()).collect()
}

fn help_of(command: &[&str]) -> Option<String> {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_pgcutover")).args(command).arg("--help").output();
    let output = output.expect("the program can be run");
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

// --- reading Rust ---------------------------------------------------------------------------------------------------

/// First segment of every path from the crate's root, with its line: `crate::a`, `crate::{a, b::c}`, `pgcutover::a` in
/// the binary, and `super::super::a` where it climbs to the root.
fn crate_paths(path: &str, text: &str) -> Vec<(usize, String)> {
    let code = code_only(text);
    let mut found = Vec::new();
    let depth = module_depth(path);
    let mut roots = vec!["crate::".to_owned(), "super::".repeat(depth)];
    if path == "src/main.rs" {
        roots.push("pgcutover::".to_owned());
    }
    for root in roots.iter().filter(|root| !root.is_empty()) {
        let mut from = 0;
        while let Some(at) = code[from..].find(root.as_str()).map(|at| at + from) {
            from = at + root.len();
            let before = code[..at].chars().next_back();
            if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                continue;
            }
            let line = code[..at].lines().count().max(1);
            let rest = code[from..].trim_start();
            let names = if rest.starts_with('{') { group_heads(rest) } else { vec![ident(rest)] };
            // Items of lib.rs itself are macros or nothing: a name with a capital is not a module.
            let modules = names.into_iter().filter(|name| name.starts_with(|c: char| c.is_ascii_lowercase()));
            found.extend(modules.filter(|name| name != "super" && name != "self").map(|name| (line, name)));
        }
    }
    found
}

/// `a` and `c` of `{a::{b, x}, c}`.
fn group_heads(text: &str) -> Vec<String> {
    let mut heads = Vec::new();
    let mut level = 0;
    let mut expect_head = false;
    for (at, c) in text.char_indices() {
        match c {
            '{' => {
                level += 1;
                expect_head = level == 1;
            }
            '}' => {
                level -= 1;
                if level == 0 {
                    break;
                }
            }
            ',' if level == 1 => expect_head = true,
            c if expect_head && !c.is_whitespace() => {
                heads.push(ident(&text[at..]));
                expect_head = false;
            }
            _ => {}
        }
    }
    heads
}

fn ident(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// `src/a.rs` and `src/a/mod.rs`: 1; `src/a/b.rs`: 2.
fn module_depth(path: &str) -> usize {
    let parts = path.trim_start_matches("src/").trim_end_matches(".rs").split('/');
    let depth = parts.filter(|part| !matches!(*part, "mod" | "lib" | "main")).count();
    // `a_tests.rs` is the module `tests` of `a.rs`, by a path attribute.
    if path.ends_with("_tests.rs") { depth + 1 } else { depth }
}

fn top_module(path: &str) -> &str {
    let first = path.trim_start_matches("src/").split('/').next().unwrap_or(path);
    first.trim_end_matches(".rs")
}

fn layer(module: &str) -> Option<u8> {
    LAYERS.iter().find(|(_, modules)| modules.contains(&module)).map(|(layer, _)| *layer)
}

fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        let part = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
        !part(before) && !part(after)
    })
}

/// The text with comments, strings and character literals blanked; lines keep their numbers.
fn code_only(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    let mut previous = ' ';
    while let Some(c) = rest.chars().next() {
        let skip = skipped(rest, previous);
        let taken = if skip > 0 { skip } else { c.len_utf8() };
        if skip > 0 {
            // A blank holds the place, so that words on both sides do not join.
            code.push(' ');
            code.extend(rest[..taken].chars().filter(|c| *c == '\n'));
            previous = ' ';
        } else {
            code.push(c);
            previous = c;
        }
        rest = &rest[taken..];
    }
    code
}

/// Bytes of the comment or literal that `text` begins with; 0: it begins with code.
fn skipped(text: &str, previous: char) -> usize {
    if text.starts_with("//") {
        return text.find('\n').unwrap_or(text.len());
    }
    if text.starts_with("/*") {
        return text.find("*/").map_or(text.len(), |end| end + 2);
    }
    if !previous.is_alphanumeric() && previous != '_' {
        let raw = text.trim_start_matches(['b', 'c']).strip_prefix('r');
        if let Some(raw) = raw.filter(|raw| raw.trim_start_matches('#').starts_with('"')) {
            let hashes = raw.len() - raw.trim_start_matches('#').len();
            let end = format!("\"{}", "#".repeat(hashes));
            let body = hashes + 1;
            let start = text.len() - raw.len();
            return raw[body..].find(&end).map_or(text.len(), |at| start + body + at + end.len());
        }
    }
    if text.starts_with('"') {
        return quoted(text, '"');
    }
    if text.starts_with('\'') {
        let mut chars = text.chars().skip(1);
        let (first, second) = (chars.next(), chars.next());
        // 'a' and '\n' are literals; 'a of a lifetime is code.
        return if first == Some('\\') || second == Some('\'') { quoted(text, '\'') } else { 0 };
    }
    0
}

fn quoted(text: &str, end: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        if !escaped && c == end {
            return at + end.len_utf8();
        }
        escaped = !escaped && c == '\\';
    }
    text.len()
}

// --- files ----------------------------------------------------------------------------------------------------------

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn all_sources() -> Vec<(String, String)> {
    ["src", "tests", "benches", "examples"].into_iter().flat_map(sources).collect()
}

/// Path below the root, and text, of every Rust file in `folder`.
fn sources(folder: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for path in entries.map(|entry| entry.expect("directories are readable").path()) {
            if path.is_dir() {
                // What a build of the fuzzing targets leaves there is not ours.
                if !path.ends_with("fuzz/target") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("sources are UTF-8");
                let below = path.strip_prefix(root()).expect("found below the root").display().to_string();
                found.push((below, text));
            }
        }
    }
    found.sort();
    found
}

fn no_findings(files: Vec<(String, String)>, check: fn(&str, &str) -> Vec<String>) {
    assert!(files.len() > 5, "the sources were not found");
    let mut report = String::new();
    for (path, text) in &files {
        for finding in check(path, text) {
            let _ = writeln!(report, "{path}:{finding}");
        }
    }
    assert!(report.is_empty(), "\n{report}");
}

// --- the checks can fail --------------------------------------------------------------------------------------------

#[test]
fn layers_are_found_in_every_way_of_writing_a_path() {
    let bad = |path, text| !layer_findings(path, text).is_empty();
    assert!(bad("src/proxy/relay.rs", "use crate::migration::Engine;"));
    assert!(bad("src/proxy/relay.rs", "use crate::{lsn::Lsn, migration::{self, x}};"));
    assert!(bad("src/proxy/relay.rs", "fn f() { crate::cutover::go() }"));
    assert!(bad("src/proxy/relay.rs", "use super::super::admin::Service;"));
    assert!(bad("src/proxy/mod.rs", "use super::admin;"));
    assert!(bad("src/wire/frame.rs", "use crate::postgres::Stream;"));
    assert!(bad("src/lsn.rs", "use crate::wire::Frame;"));
    assert!(bad("src/new/mod.rs", "use crate::lsn;"), "a module that no layer has");
    assert!(!bad("src/proxy/relay.rs", "use crate::{wire, switch::Gate};\nuse super::session::Session;"));
    assert!(!bad("src/proxy/handoff/scan.rs", "use super::super::session;"), "climbs to proxy only");
    assert!(!bad("src/catalog/mod.rs", "use crate::postgres::Control;"));
    assert!(!bad(
        "src/lsn.rs",
        "// crate::admin\nconst A: &str = \"crate::admin\";\n/* crate::admin */ const B: &str = r#\"crate::admin\"#;"
    ));
    assert!(!bad("src/lsn.rs", "pub(crate) fn f<'a>(x: &'a str) -> char { '\"' }"));
}

#[test]
fn absent_commands_are_found_in_a_readme() {
    let help = |command: &[&str]| match command {
        ["run"] => Some("  -c, --config".to_owned()),
        ["migration", "show"] => Some("--watch".to_owned()),
        _ => None,
    };
    let findings = |text: &str| readme_findings(text, &["demo".to_owned()], &help).len();
    assert_eq!(
        findings("`make demo`, `pgcutover run --config x` and\n```sh\npgcutover migration show move --watch\n```"),
        0
    );
    assert_eq!(findings("`make tea`"), 1);
    assert_eq!(findings("`pgcutover fly`"), 1);
    assert_eq!(findings("```\npgcutover run --fast   # really --slow\n```"), 1);
}

#[test]
fn purity_state_lints_headers_and_dependencies_can_be_found_wanting() {
    assert_eq!(purity_findings("src/wire/a.rs", "use tokio::io;").len(), 1);
    assert_eq!(purity_findings("src/cutover/phase.rs", "\nlet a = Instant::now();")[0].split(':').next(), Some("2"));
    assert!(purity_findings("src/proxy/relay.rs", "use tokio::io;").is_empty());
    assert!(purity_findings("src/wire/a.rs", "//! no tokio here\nfn instantly() {}").is_empty());

    assert_eq!(static_findings("a", "pub static COUNT: AtomicU64 = AtomicU64::new(0);").len(), 1);
    assert_eq!(static_findings("a", "    thread_local! { }").len(), 1);
    assert!(static_findings("a", "static NAMES: &[&str] = &[\"Mutex\"];").is_empty());

    assert_eq!(lint_findings("a", "#[allow(dead_code)]").len(), 1);
    assert!(lint_findings("a", "#[expect(dead_code, reason = \"…\")]").is_empty());

    assert_eq!(file_findings("src/a.rs", "fn f() {}").len(), 1);
    assert_eq!(file_findings("src/utils.rs", "//! A bag.").len(), 1);
    assert_eq!(file_findings("src/a.rs", &("//! Long.\n".to_owned() + &"\n".repeat(LINES))).len(), 1);
    assert!(file_findings("src/a.rs", "//! A thing.").is_empty());
    assert!(file_findings("src/a.rs", &("//! Tests.\n#[cfg(test)]\n".to_owned() + &"\n".repeat(LINES))).is_empty());

    assert_eq!(dependency_findings("[dependencies]\n# Why.\na = \"1\"\nb = \"1\"\n").len(), 1);
    assert!(dependency_findings("[package]\nname = \"x\"\n[dev-dependencies]\n# Why.\na = \"1\"\n").is_empty());
}
