//! `README.md` and `docs/`: commands and statements that they show are understood, links lead somewhere, and the
//! references list what the code has, no more and no less.
//!
//! `UPDATE_DOCS=1 cargo test --test docs` writes the references anew.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use pgcutover::admin::console;
use pgcutover::cli;
use pgcutover::config::{self, Config, Environment, Live, Server, ServerKind};
use pgcutover::migration::preflight::{self, Apply, Definition, Outcome, Subject, When};
use pgcutover::migration::state::{Event, State, transition};
use pgcutover::telemetry::metrics::Metrics;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every page with its text.
fn pages() -> Vec<(PathBuf, String)> {
    let mut found = vec![root().join("README.md")];
    let mut folders = vec![root().join("docs")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                found.push(path);
            }
        }
    }
    found.sort();
    found.into_iter().map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect()
}

/// Lines of fenced blocks with the block's language, and what stands between single backticks, with none.
fn code(text: &str) -> Vec<(String, String)> {
    let (mut found, mut fence) = (Vec::new(), None::<String>);
    for line in text.lines() {
        match (&fence, line.trim_start().strip_prefix("```")) {
            (None, Some(language)) => fence = Some(language.trim().to_owned()),
            (Some(_), Some(_)) => fence = None,
            (Some(language), None) => found.push((language.clone(), line.trim().to_owned())),
            (None, None) => {
                found.extend(line.split('`').skip(1).step_by(2).map(|part| (String::new(), part.to_owned())))
            }
        }
    }
    found
}

/// The words of a line up to what the shell does with the output, or a comment.
fn words(line: &str) -> Vec<&str> {
    let end = |word: &&str| !matches!(*word, "#" | "|" | "&" | "&&" | ";") && !word.starts_with(['>', '#']);
    line.split_whitespace().take_while(end).collect()
}

/// What is wrong with the program's commands and the console's statements in `text`.
fn faults(text: &str) -> Vec<String> {
    let mut faults = Vec::new();
    for (language, line) in code(text) {
        let words = words(&line);
        if language == "console" && !line.is_empty() {
            faults.extend(console::understands(&line).err().map(|error| format!("{line}: {error}")));
        } else if words.first() == Some(&"pgcutover") && words.len() > 1 {
            let is_help = matches!(words.last(), Some(&"--help" | &"--version"));
            let words = if is_help { &words[..words.len() - 1] } else { &words[..] };
            let group = ["pgcutover", "migration"];
            if is_help && (words.len() == 1 || words == group) {
                continue;
            }
            // Where a page speaks of a command without its arguments, what is missing is no mistake.
            let complaint = cli::understands(words).err().filter(|error| language == "sh" || !is_incomplete(error));
            faults.extend(complaint.map(|error| format!("{line}: {error}")));
        }
    }
    faults
}

fn is_incomplete(error: &str) -> bool {
    error.contains("required arguments were not provided")
        || error.contains("requires a subcommand")
        || error.starts_with("Usage")
}

#[test]
fn every_command_and_statement_is_understood() {
    let mut shown = 0;
    for (path, text) in pages() {
        assert_eq!(faults(&text), [""; 0], "{}", path.display());
        shown += code(&text)
            .iter()
            .filter(|(language, line)| language == "console" || line.starts_with("pgcutover "))
            .count();
    }
    assert!(shown > 50, "{shown}");
}

#[test]
fn a_wrong_command_is_seen() {
    assert_eq!(faults("`pgcutover status`, `pgcutover migration show`, `pgcutover.toml`, `pgcutover --help`"), [""; 0]);
    assert_eq!(faults("`pgcutover migration cutover move --dryrun`").len(), 1);
    assert_eq!(faults("```sh\npgcutover stauts\n```").len(), 1);
    assert_eq!(faults("```sh\npgcutover migration show\n```").len(), 1);
    assert_eq!(faults("```console\nSHOW HELP\nSHOW NOTHING\n```").len(), 1);
}

/// The name that a heading has in a link (GitHub's rule).
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

/// Whether a link out of these pages is one by its form: nobody is asked whether it is there.
fn is_web_address(link: &str) -> bool {
    let rest = link.strip_prefix("https://").or_else(|| link.strip_prefix("http://"));
    let Some((host, path)) = rest.map(|rest| rest.split_once('/').unwrap_or((rest, ""))) else { return false };
    let named = host.split_once(':').map_or(host, |(name, _port)| name);
    let labels =
        named.split('.').all(|label| !label.is_empty() && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'));
    labels && named.contains('.') && !path.contains(|c: char| c.is_whitespace() || c.is_control())
}

#[test]
fn a_link_that_is_none_is_seen() {
    assert!(is_web_address("https://www.postgresql.org/docs/current/runtime-config-wal.html#GUC-WAL-LEVEL"));
    for wrong in ["htps://example.org/", "https:///docs", "https://example", "https://a..b/", "https://a.b/c d"] {
        assert!(!is_web_address(wrong), "{wrong}");
    }
}

#[test]
fn every_link_leads_somewhere() {
    let mut links = 0;
    for (path, text) in pages() {
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                assert!(is_web_address(link), "{} links to {link}", path.display());
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            assert!(target.exists(), "{} links to {link}", path.display());
            if !heading.is_empty() {
                let text = fs::read_to_string(&target).unwrap();
                let found = text
                    .lines()
                    .filter(|line| line.starts_with('#'))
                    .any(|line| anchor(line.trim_start_matches('#')) == heading);
                assert!(found, "{} links to {link}, a heading that is not there", path.display());
            }
            links += 1;
        }
    }
    assert!(links > 25, "{links}");
}

#[test]
fn every_page_is_reached_from_the_first() {
    let index = fs::read_to_string(root().join("docs/README.md")).unwrap();
    for (path, _) in pages() {
        let name = path.strip_prefix(root().join("docs")).map(|path| path.display().to_string()).unwrap_or_default();
        assert!(
            name.is_empty() || name == "README.md" || index.contains(&format!("({name})")),
            "{name} is not in docs/README.md"
        );
    }
}

/// What a reference is held against, or is written as.
fn held(name: &str, wanted: &str) {
    held_at(&format!("docs/reference/{name}"), wanted);
}

fn held_at(name: &str, wanted: &str) {
    let path = root().join(name);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, wanted).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    let lines = |text: &str| text.lines().map(str::to_owned).collect::<BTreeSet<_>>();
    let (found, wanted) = (lines(&found), lines(wanted));
    let missing: Vec<_> = wanted.difference(&found).collect();
    let stale: Vec<_> = found.difference(&wanted).collect();
    assert!(
        missing.is_empty() && stale.is_empty(),
        "{name} lacks {missing:#?} and has {stale:#?}: `UPDATE_DOCS=1 cargo test --test docs` writes it anew"
    );
}

#[test]
fn settings_are_those_of_the_code() {
    let config = Config::new(Server::new("", 5432, ""), Server::new("", 5432, ""));
    let mut text = String::from(
        "# Settings\n\nEvery key, with its default and whether `pgcutover reload` applies a change. What each means is said in\n\
         [config/pgcutover.toml](../../config/pgcutover.toml), which is a complete example. Secrets (`password`, `password_file`,\n\
         `password_env`, `token` and the like) are keys too, explained there and shown nowhere.\n\n\
         | key | default | reload |\n| --- | --- | --- |\n",
    );
    for setting in config.settings() {
        let own = setting.section == "listen" && setting.key == "workers";
        let value =
            if own { "half the number of cores".to_owned() } else { format!("`{}`", setting.value).replace("``", "") };
        let live = if setting.live == Live::Reload { "yes" } else { "restart" };
        writeln!(text, "| `{}.{}` | {value} | {live} |", setting.section, setting.key).unwrap();
    }
    held("settings.md", &text);
}

#[test]
fn metrics_are_those_of_the_code() {
    let metrics = Metrics::new().unwrap();
    let mut text = String::from(
        "# Metrics\n\nWhat `/metrics` exports. Dashboards and rules are in [dashboards](../../dashboards/).\n\n\
         | name | labels | meaning |\n| --- | --- | --- |\n",
    );
    for (name, metric) in metrics.described() {
        writeln!(text, "| `{name}` | {} | {} |", metric.labels.join(", "), metric.help).unwrap();
    }
    held("metrics.md", &text);
}

#[test]
fn every_state_is_explained() {
    let page = fs::read_to_string(root().join("docs/reference/states.md")).unwrap();
    for state in State::ALL {
        let row = format!("| {} | {} | ", state.name(), state.substate());
        assert!(page.contains(&row), "docs/reference/states.md has no row {row:?}");
        let told = page.lines().find(|line| line.starts_with(&row)).and_then(|line| line.split('|').nth(4)).unwrap();
        for (event, order) in
            [(Event::RetryAsked, "retry"), (Event::RollbackBegun, "rollback"), (Event::CompleteAsked, "complete")]
        {
            let is_possible = transition(state, event).is_ok();
            assert_eq!(told.contains(order), is_possible, "{row}: {order}");
        }
    }
}

#[test]
fn sqlstates_are_those_of_the_code() {
    let source = fs::read_to_string(root().join("src/sqlstate.rs")).unwrap();
    let mut text = String::from(
        "# SQLSTATEs\n\nWhat the proxy and the console send of their own, or act on. Everything else that clients get is the server's.\n\n\
         | code | meaning |\n| --- | --- |\n",
    );
    for line in source.lines().filter_map(|line| line.strip_prefix("/// `")) {
        let (code, meaning) = line.split_once("` ").unwrap();
        writeln!(text, "| `{code}` | {} |", meaning.trim_end_matches('.')).unwrap();
    }
    held("sqlstates.md", &text);
}

/// One rule as the page shows it.
fn rule_text(rule: &Definition) -> String {
    let mut text = format!("### `{}`\n\n{}.\n\n", rule.code, sentence(rule.why));
    let worst = if rule.worst == Outcome::Failed { "failure" } else { "warning" };
    let when = match rule.when {
        When::Before => "before the migration begins",
        When::BeforeOnline => "before an online migration begins",
        When::Repeatedly => "before the migration begins, every minute while it streams, and before its cutover",
        When::RepeatedlyOnline => {
            "before an online migration begins, every minute while it streams, and before its cutover"
        }
    };
    writeln!(text, "- Outcome at worst: {worst}. Asked {when}.").unwrap();
    writeln!(text, "- Evidence: {}.", rule.evidence).unwrap();
    writeln!(text, "- Fix: {}.", rule.fix).unwrap();
    for (name, kind) in [
        ("Amazon RDS, Aurora", ServerKind::AwsRds),
        ("Azure", ServerKind::Azure),
        ("Cloud SQL, AlloyDB", ServerKind::GcpCloudSql),
    ] {
        let fix = rule.fix_on(kind);
        if fix != rule.fix {
            writeln!(text, "- {name}: {fix}.").unwrap();
        }
    }
    let applied = match rule.apply {
        Apply::Since(0) => "runs its statements.".to_owned(),
        Apply::Since(version) => format!("runs its statements from PostgreSQL {} on.", version / 10_000),
        Apply::Refused(why) => format!("shows its statements and does not run them: {why}."),
        Apply::ByHand => "has nothing to run: it is mended by hand.".to_owned(),
    };
    writeln!(text, "- `--fix {}` {applied}\n", rule.code).unwrap();
    text
}

fn sentence(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

#[test]
fn validation_rules_are_those_of_the_code() {
    let mut text = String::from(
        "# Premigration validation\n\nWhat is asked before a migration begins, by stable code. Nothing is changed on either server. Each rule answers\n\
         Succeeded, Warning or Failed, with evidence (at most 20 items, and how many there are), why it matters, what mends it,\n\
         and where SQL mends it the very statements. A rule that cannot be evaluated has failed. A migration whose validation\n\
         failed does not begin.\n\n\
         ```sh\npgcutover migration create NAME --option validate\npgcutover migration validation NAME\n\
         pgcutover migration validation NAME --fix always_triggers\npgcutover migration validation NAME --fix always_triggers --yes\n```\n\n\
         `--fix` validates anew, shows the statements of that rule and, with `--yes`, runs them one by one. Rules whose fix could\n\
         cost something are shown and refused. What was run is in the log and among the events.\n\n",
    );
    for (heading, subject) in [("Servers", Subject::Instance), ("Databases", Subject::Database)] {
        writeln!(text, "## {heading}\n").unwrap();
        for rule in preflight::rules().filter(|rule| rule.subject == subject) {
            text.push_str(&rule_text(rule));
        }
    }
    held_at("docs/validation.md", &text);
}

/// What the engine's error codes are: words in quotes where a code is chosen, in these files.
fn error_codes() -> BTreeSet<String> {
    let code = |text: &str| {
        let word = text.split('"').nth(1).unwrap_or_default();
        let is_code = !word.is_empty() && word.chars().all(|c| c.is_ascii_lowercase() || c == '_');
        is_code.then(|| word.to_owned())
    };
    let mut codes = BTreeSet::new();
    let mut files = vec![root().join("src/migration/stream.rs")];
    files.extend(fs::read_dir(root().join("src/migration/engine")).unwrap().map(|entry| entry.unwrap().path()));
    for text in files.into_iter().filter(|path| path.is_file()).map(|path| fs::read_to_string(path).unwrap()) {
        codes.extend(text.lines().filter(|line| line.contains("code: \"")).filter_map(code));
        // The bodies of `fn code` and `fn problem`, where an arm says the code, or a code and its hint.
        for start in ["pub fn code(&self)", "pub(super) fn problem(&self, database"] {
            let body = text.split(start).nth(1).and_then(|rest| rest.split("\n    }\n").next()).unwrap_or_default();
            let body = body.split("let object").next().unwrap_or_default();
            for arm in body.split("=>").skip(1) {
                codes.extend(code(arm.split(',').next().unwrap_or_default()));
            }
        }
    }
    codes
}

#[test]
fn the_runbook_has_every_alert_and_every_error_code() {
    let page = fs::read_to_string(root().join("docs/runbook.md")).unwrap();
    let rules = fs::read_to_string(root().join("dashboards/alerts.yml")).unwrap();
    let under = |heading: &str| {
        let part = page.split(&format!("\n## {heading}\n")).nth(1).unwrap();
        let part = part.split("\n## ").next().unwrap();
        let named = part.lines().filter_map(|line| line.strip_prefix("### "));
        named.map(|name| name.trim_matches('`').to_owned()).collect::<BTreeSet<_>>()
    };
    let alerts: BTreeSet<String> = values(&rules, "alert").into_iter().map(str::to_owned).collect();
    assert!(alerts.len() > 10, "{alerts:?}");
    assert_eq!(under("Alerts"), alerts, "headings on the left, rules on the right");
    for (alert, rule) in rules.split("- alert: ").skip(1).filter_map(|rule| rule.split_once('\n')) {
        let place = format!("runbook_page: \"docs/runbook.md#{}\"", alert.to_lowercase());
        assert!(rule.contains(&place), "{alert} does not lead to its part of the runbook");
    }
    let codes = error_codes();
    for known in ["connection", "slot_timeout", "slot_lost", "wal_limit", "validation", "target_differs"] {
        assert!(codes.contains(known), "{known} is not found in the source: {codes:?}");
    }
    assert_eq!(under("Error codes"), codes, "headings on the left, codes on the right");
}

/// The lines below the line `key: |` of a manifest, without their indentation.
fn literal(manifest: &str, key: &str) -> String {
    let mut lines = manifest.lines().skip_while(|line| line.trim() != format!("{key}: |"));
    let head = lines.next().unwrap_or_else(|| panic!("no {key} in the manifest"));
    let indent = head.len() - head.trim_start().len();
    let below = lines.take_while(|line| line.trim().is_empty() || line.len() - line.trim_start().len() > indent);
    below.map(|line| line.get(indent + 2..).unwrap_or_default().to_owned() + "\n").collect()
}

/// Values of `key` wherever it stands in a manifest, in block or flow style.
fn values<'a>(manifest: &'a str, key: &str) -> Vec<&'a str> {
    let key = format!("{key}: ");
    let starts = manifest.match_indices(&key).filter(|(at, _)| {
        let before = manifest[..*at].chars().next_back();
        before.is_none_or(|c| !c.is_alphanumeric() && c != '-')
    });
    let rest = starts.map(|(at, _)| &manifest[at + key.len()..]);
    rest.map(|rest| rest.split(['\n', ',', '}']).next().unwrap_or_default().trim()).collect()
}

#[test]
fn kubernetes_manifests_start_the_program_that_there_is() {
    let manifest = fs::read_to_string(root().join("config/kubernetes/pgcutover.yaml")).unwrap();
    let monitor = fs::read_to_string(root().join("config/kubernetes/servicemonitor.yaml")).unwrap();
    // What the Secret holds lies where it is mounted.
    let secrets = tempfile::tempdir().unwrap();
    let secret = manifest.split("\n---").find(|part| part.contains("kind: Secret")).unwrap();
    for line in secret.lines().skip_while(|line| *line != "stringData:").skip(1) {
        if let Some((name, value)) = line.strip_prefix("  ").and_then(|line| line.split_once(": "))
            && !name.starts_with([' ', '#'])
        {
            let text = if value == "|" { literal(secret, name) } else { value.to_owned() };
            fs::write(secrets.path().join(name), text).unwrap();
        }
    }
    let mounted = values(&manifest, "mountPath").into_iter().find(|path| path.starts_with("/run/secrets")).unwrap();
    let text = literal(&manifest, "pgcutover.toml");
    assert!(text.contains(mounted), "{text}");
    let file = secrets.path().join("pgcutover.toml");
    fs::write(&file, text.replace(mounted, &secrets.path().display().to_string())).unwrap();

    let token = fs::read_to_string(secrets.path().join("admin-token")).unwrap();
    let environment: Environment = [("PGCUTOVER_ADMIN_TOKEN".to_owned(), token)].into();
    assert!(manifest.contains("- name: PGCUTOVER_ADMIN_TOKEN"));
    let config = config::load(Some(&file), &environment).unwrap_or_else(|error| panic!("{error}\n{text}"));
    assert!(config.admin.token.is_some());
    for server in [&config.source, &config.target] {
        assert!(server.sslrootcert.as_ref().is_some_and(|path| path.exists()), "no authorities for {}", server.host);
    }

    let ports: Vec<u16> = values(&manifest, "containerPort").iter().map(|port| port.parse().unwrap()).collect();
    let listening = [config.listen.address.unwrap(), config.admin.address.unwrap()];
    assert_eq!(ports, listening.map(|address| address.port()));
    assert!(
        listening.iter().all(|address| address.ip().is_unspecified()),
        "nothing outside the pod reaches {listening:?}"
    );
    // The only pod is reached whatever it says of one database.
    let is_service = |part: &&str| part.lines().any(|line| line == "kind: Service");
    let services: Vec<&str> = manifest.split("\n---").filter(is_service).collect();
    assert_eq!((services.len(), values(&manifest, "replicas")), (2, vec!["1"]));
    for service in services {
        assert_eq!(values(service, "publishNotReadyAddresses"), ["true"], "{service}");
    }
    let router = fs::read_to_string(root().join("src/admin/http/mod.rs")).unwrap();
    let mut asked = values(&manifest, "path");
    asked.extend(values(&monitor, "path"));
    assert!(asked.len() > 3, "{asked:?}");
    for path in asked {
        assert!(router.contains(&format!(".route({path:?}")), "{path} is asked for and not served");
    }
    let arguments = manifest.lines().find(|line| line.trim().starts_with("args: ")).unwrap();
    let words: Vec<&str> = std::iter::once("pgcutover").chain(arguments.split('"').skip(1).step_by(2)).collect();
    assert_eq!(cli::understands(&words), Ok(()));
    assert_eq!(words.last(), Some(&"/etc/pgcutover/pgcutover.toml"));
}

/// The unit starts what there is, and leaves its directory to a successor and to `pgcutover.socket`.
#[test]
fn the_unit_starts_the_program_that_there_is_and_leaves_its_sockets() {
    let unit = fs::read_to_string(root().join("config/systemd/pgcutover.service")).unwrap();
    let setting =
        |key: &str| unit.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).unwrap_or_default();
    let started: Vec<&str> = setting("ExecStart").split(' ').collect();
    assert_eq!(started[0], "/usr/bin/pgcutover");
    assert_eq!(cli::understands(&started), Ok(()));
    assert_eq!(setting("RuntimeDirectory"), "pgcutover");
    assert_eq!(setting("RuntimeDirectoryPreserve"), "yes", "its end would remove the sockets of who goes on");
    // The README's takeover is the same process otherwise.
    let page = fs::read_to_string(root().join("README.md")).unwrap();
    let command = page.split("sudo systemd-run ").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
    let (options, successor) = command.split_once("/usr/bin/").unwrap();
    let successor: Vec<&str> = successor.split_whitespace().collect();
    assert_eq!(cli::understands(&successor), Ok(()));
    let others: Vec<&str> = successor.into_iter().filter(|word| *word != "--takeover").collect();
    assert_eq!(others[1..], started[1..]);
    for (option, key) in [("--service-type=", "Type"), ("--uid=", "User"), ("--gid=", "Group")] {
        assert!(options.contains(&format!("{option}{} ", setting(key))), "{options}");
    }
    for key in ["LimitNOFILE", "NotifyAccess"] {
        assert!(options.contains(&format!("-p {key}={} ", setting(key))), "{options}");
    }
    let socket = format!("takeover_socket = \"/run/{}/", setting("RuntimeDirectory"));
    assert!(page.contains(&socket), "{socket}");
}
