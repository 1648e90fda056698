//! The server as a process: who it runs as, how it is watched, stopped, and found ready.

use std::fs;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Another account, for root, whom PostgreSQL refuses to serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Account {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// A shell around `program`: it ends the program with `signal` (such as `QUIT`) and removes `directory` when its standard
/// input ends without the line `keep`. Arguments of the program can be added. The shell exits as the program does.
pub fn guarded(directory: &Path, signal: &str, program: &Path) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", GUARDIAN, "pgcutover-guardian"]).arg(directory).arg(signal).arg(program);
    // Ctrl-C at the terminal is for us; we then stop our children in order.
    command.stdin(Stdio::piped()).process_group(0);
    command
}

const GUARDIAN: &str = r#"
directory=$1; signal=$2; shift 2
exec 3<&0
"$@" </dev/null 3<&- & program=$!
(
    read -r word <&3
    [ "$word" = keep ] && exit
    : >"$directory/abandoned"
    kill -s "$signal" "$program"
) 2>/dev/null & watcher=$!
exec 3<&-
wait "$program"; status=$?
kill "$watcher" 2>/dev/null
if [ -e "$directory/abandoned" ]; then cd / && rm -rf "$directory"; fi
exit "$status"
"#;

/// Made for logical replication and for speed; a test of durability sets fsync itself.
pub(super) const DEFAULT_SETTINGS: &[(&str, &str)] = &[
    ("listen_addresses", "127.0.0.1"),
    ("wal_level", "logical"),
    ("max_replication_slots", "20"),
    ("max_wal_senders", "20"),
    ("max_connections", "200"),
    ("max_prepared_transactions", "20"),
    ("shared_buffers", "64MB"),
    ("fsync", "off"),
    ("full_page_writes", "off"),
    ("log_min_messages", "warning"),
    ("log_line_prefix", "%m [%p] %q%u@%d %a "),
    ("timezone", "UTC"),
    ("log_timezone", "UTC"),
];

pub(super) fn setting_line(name: &str, value: &str) -> String {
    format!("{name} = '{}'\n", value.replace('\'', "''"))
}

/// What postmaster.pid says (miscadmin.h: LOCK_FILE_LINE_…): line 1 pid, line 3 start time, line 4 port, line 8 status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PostmasterStatus {
    pub(super) pid: u32,
    /// Seconds since 1970.
    pub(super) started: u64,
    pub(super) port: u16,
    pub(super) ready: bool,
}

pub(super) fn postmaster_status(data: &Path) -> Option<PostmasterStatus> {
    parse_postmaster_pid(&fs::read_to_string(data.join("postmaster.pid")).ok()?)
}

fn parse_postmaster_pid(text: &str) -> Option<PostmasterStatus> {
    let lines: Vec<&str> = text.lines().collect();
    Some(PostmasterStatus {
        pid: lines.first()?.trim().parse().ok()?,
        started: lines.get(2).and_then(|line| line.trim().parse().ok()).unwrap_or(0),
        port: lines.get(3).and_then(|line| line.trim().parse().ok()).unwrap_or(0),
        ready: lines.get(7).is_some_and(|line| line.trim() == "ready"),
    })
}

/// The shell's own `kill`, because the program of that name is not everywhere and the system call is not in `std`.
pub fn send_signal(pid: u32, signal: &str) {
    send(&pid.to_string(), signal);
}

/// The same for every process of the group that `leader` leads.
pub fn send_signal_to_group(leader: u32, signal: &str) {
    send(&format!("-{leader}"), signal);
}

fn send(to: &str, signal: &str) {
    let result =
        Command::new("/bin/sh").args(["-c", "kill -s \"$1\" -- \"$2\" 2>/dev/null", "kill", signal, to]).status();
    if let Err(error) = result {
        tracing::warn!(to, signal, %error, "cannot send a signal");
    }
}

pub(super) fn pause() {
    std::thread::sleep(Duration::from_millis(10));
}

/// The last lines of `text`, for messages.
pub(super) fn tail(text: &str) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n")
}

/// Below the range that Linux gives to outgoing connections (32768 and up), so that a stopped server's port is still
/// free when it comes back.
pub fn free_port() -> std::io::Result<u16> {
    // Never the same twice in a process: who asked before may not have bound it yet. Processes begin at places of their own.
    static TRIED: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id().wrapping_mul(7919);
    for _ in 0..200 {
        let tried = TRIED.fetch_add(1, Ordering::Relaxed);
        let port = 15_000 + u16::try_from(first.wrapping_add(tried) % 17_000).unwrap_or_default();
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return Ok(port);
        }
    }
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr().map(|address| address.port())
}

/// A Unix socket's path has at most 107 bytes, and the server's account must be able to walk to it.
pub(super) fn temp_root() -> PathBuf {
    let configured = std::env::temp_dir();
    let usable = configured.as_os_str().len() < 60 && others_may_enter(&configured);
    if usable { configured } else { PathBuf::from("/tmp") }
}

fn others_may_enter(dir: &Path) -> bool {
    dir.ancestors().all(|dir| fs::metadata(dir).is_ok_and(|metadata| metadata.mode() & 0o001 != 0))
}

/// Who owns what we just created is who we are; root needs somebody else.
pub(super) fn account_for_server(created: &Path) -> Option<Account> {
    let root = fs::metadata(created).is_ok_and(|metadata| metadata.uid() == 0);
    root.then(|| unprivileged_account(&fs::read_to_string("/etc/passwd").unwrap_or_default()))
}

fn unprivileged_account(passwd: &str) -> Account {
    let find = |name: &str| {
        let line = passwd.lines().find(|line| line.split(':').next() == Some(name))?;
        let mut fields = line.split(':').skip(2);
        let account = Account { uid: fields.next()?.parse().ok()?, gid: fields.next()?.parse().ok()? };
        (account.uid != 0).then_some(account)
    };
    find("postgres").or_else(|| find("nobody")).unwrap_or(Account { uid: 65_534, gid: 65_534 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn postmaster_pid_is_ready_only_when_it_says_so() {
        let text = "123\n/data\n1700000000\n20001\n/tmp\n127.0.0.1\n  12345  1\nready   \n";
        assert_eq!(
            parse_postmaster_pid(text),
            Some(PostmasterStatus { pid: 123, started: 1_700_000_000, port: 20_001, ready: true })
        );
        let starting = text.replace("ready", "starting");
        assert!(!parse_postmaster_pid(&starting).expect("has a pid").ready);
        assert!(!parse_postmaster_pid("123\n").expect("has a pid").ready, "written in two steps");
        assert_eq!(parse_postmaster_pid(""), None);
    }

    #[test]
    fn root_gets_the_first_account_that_is_not_root() {
        let account = |text| unprivileged_account(text);
        assert_eq!(account("root:x:0:0::/:\npostgres:x:101:103::/:\n"), Account { uid: 101, gid: 103 });
        assert_eq!(account("postgres:x:0:0::/:\nnobody:x:99:98::/:\n"), Account { uid: 99, gid: 98 });
        assert_eq!(account(""), Account { uid: 65_534, gid: 65_534 });
    }
}
