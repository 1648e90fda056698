#!/usr/bin/env python3
"""Moves a database under load, by the best script that can be written today and by pgcutover, interleaved, and compares
what the clients felt.

    tests/bench/cutover.py [--rounds 6] [--cases CASE,CASE…] [--peers PEER,PEER…] [--think MS] [--binary FILE]

Cases: clients:N (pgbench with N clients), wide:N (the same beside 1,000 tables, 1,000 sequences and 500 sessions that are
idle), slow:N (the same beside a client whose transactions take 200 ms).
Peers: scripted (PgBouncer in transaction mode, simple protocol, a native subscription; PAUSE, a marker row that is waited
for on the other server, sequences by one statement, RELOAD, RESUME; every connection that the script needs is open
beforehand), pgcutover (session mode, prepared statements).

A round moves the database of one peer to its other server while pgbench writes, and the next one moves it back; each peer
has a source and a target of its own, and whoever is not measured is idle. The stall is the longest time that any client waited for any transaction, from
the order to two seconds after its end. The scripted way has no fence, no decision that survives a crash and no way back
from the first write; it is measured as it is. What pgbench was told is counted on the server that serves at the end: a
round that has lost a transaction ends the benchmark.

Where the kernel schedules by session (autogroup) each backend is a group of its own, and one that has just come to another
processor may wait there for a second while the others run: the benchmark then runs in one control group, if it may make it.

Printed are medians over the rounds, and the ratio of the stalls. `spread` is from the smallest to the largest. Needs
PostgreSQL's programs and pgbouncer. Everything runs on loopback in a temporary directory and is stopped at the end. Start
it on a machine that does nothing else.
"""

import argparse
import contextlib
import glob
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time

import proxy
import wire

CASES = "clients:16,clients:32,wide:16,slow:16"
PEERS = "scripted,pgcutover"
DATABASE, ROLE, PASSWORD = proxy.DATABASE, proxy.ROLE, proxy.PASSWORD
WIDE_TABLES = WIDE_SEQUENCES = 1000
IDLE_SESSIONS = 500
SLOW_MS = 200
# Seconds of load before the order and after its end.
BEFORE, AFTER = 2.0, 2.0
TABLES = """
CREATE TABLE account (id bigint PRIMARY KEY, balance bigint NOT NULL);
INSERT INTO account SELECT g, 0 FROM generate_series(1, 100000) g;
CREATE TABLE entry (id bigserial PRIMARY KEY, account bigint NOT NULL, note text);
CREATE TABLE marker (id int PRIMARY KEY, nonce text);
INSERT INTO marker VALUES (1, '');
"""
SCRIPT = """\\set id random(1, 100000)
BEGIN;
UPDATE account SET balance = balance + 1 WHERE id = :id;
INSERT INTO entry (account, note) VALUES (:id, 'a note of some length');
COMMIT;
"""


class Server:
    """One of the two servers of a peer."""

    def __init__(self, name, port):
        self.name, self.port = name, port


class Peer:
    """A way to move the database: two servers, and where clients connect."""

    protocol = "simple"

    def __init__(self, bench, name):
        self.bench, self.name = bench, name
        self.servers = [Server(role, bench.start_server(f"{role}-{name}")) for role in ("source", "target")]
        self.active = 0
        self.admin = {server.name: wire.connect(server.port, "postgres", "", "postgres") for server in self.servers}
        bench.sql(self.servers[0].port, f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'")
        bench.sql(self.servers[0].port, f"CREATE DATABASE {DATABASE} OWNER {ROLE}")
        for script in [TABLES] + ([wide_schema()] if bench.wide else []):
            bench.load(self.servers[0].port, script)

    def serving(self):
        return self.servers[self.active]

    def rows(self):
        return int(self.bench.sql(self.serving().port, "SELECT count(*) FROM entry", DATABASE))


class Scripted(Peer):
    """PgBouncer, native logical replication and a script."""

    def start(self):
        here, there = self.servers
        verifier = self.bench.sql(here.port, f"SELECT rolpassword FROM pg_authid WHERE rolname = '{ROLE}'")
        self.bench.sql(there.port, f"CREATE ROLE {ROLE} LOGIN PASSWORD '{verifier}'")
        self.bench.sql(there.port, f"CREATE DATABASE {DATABASE} OWNER {ROLE}")
        dump = self.bench.program("pg_dump", here.port, "-s", DATABASE)
        self.bench.load(there.port, dump)
        # Names that both directions share.
        for server in self.servers:
            self.bench.sql(server.port, "CREATE PUBLICATION moved FOR ALL TABLES", DATABASE)
        self.subscribe(copy=True)
        self.users = f"{self.bench.directory}/users"
        with open(self.users, "w") as out:
            out.write(f'"{ROLE}" "{verifier}"\n"postgres" ""\n')
        self.port = proxy.free_port()
        self.write_config(here)
        self.bench.start("pgbouncer", self.bench.as_user + [proxy.find_program("pgbouncer"), self.config()], self.port)
        self.console = wire.connect(self.port, ROLE, PASSWORD, "pgbouncer")

    def config(self):
        return f"{self.bench.directory}/pgbouncer.ini"

    def write_config(self, server):
        with open(self.config(), "w") as out:
            out.write(f"[databases]\n{DATABASE} = host=127.0.0.1 port={server.port}\n[pgbouncer]\nlisten_addr=127.0.0.1\n"
                      f"listen_port={self.port}\nauth_type=scram-sha-256\nauth_file={self.users}\nadmin_users={ROLE}\n"
                      f"pool_mode=transaction\nmax_client_conn=2000\ndefault_pool_size={self.bench.args.pool}\n"
                      f"unix_socket_dir=\nignore_startup_parameters=extra_float_digits\n")

    def subscribe(self, copy):
        here, there = self.serving(), self.servers[1 - self.active]
        self.bench.sql(there.port, f"CREATE SUBSCRIPTION moved_{there.name} CONNECTION 'host=127.0.0.1 port={here.port} "
                       f"dbname={DATABASE} user=postgres' PUBLICATION moved WITH (copy_data = {'on' if copy else 'off'})", DATABASE)
        waiting = "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate <> 'r'"
        while self.bench.sql(there.port, waiting, DATABASE) != "0":
            time.sleep(0.2)

    def get_ready(self):
        """The next move may begin: the stream flows from the server that serves, and the script's sessions are open."""
        here, there = self.serving(), self.servers[1 - self.active]
        if self.bench.sql(there.port, "SELECT count(*) FROM pg_subscription", DATABASE) == "0":
            # Nothing has gone back since the last move, so everything is copied while nobody writes.
            self.bench.sql(here.port, f"DROP SUBSCRIPTION moved_{here.name}", DATABASE)
            self.bench.sql(there.port, "TRUNCATE account, entry, marker", DATABASE)
            rows = self.bench.program("pg_dump", here.port, "-a", "-t", "account", "-t", "entry", "-t", "marker", DATABASE)
            self.bench.load(there.port, rows)
            self.subscribe(copy=False)
        self.sessions = [wire.connect(server.port, "postgres", "", DATABASE) for server in (here, there)]
        names = wire.rows(self.sessions[0], "SELECT quote_ident(schemaname) || '.' || quote_ident(sequencename) FROM pg_sequences")
        self.read_sequences = " UNION ALL ".join(f"SELECT '{name}', last_value, is_called FROM {name}" for name, in names)
        wire.query(self.sessions[1], "UPDATE marker SET nonce = '' WHERE false")

    def move(self):
        here, there = self.sessions
        self.write_config(self.servers[1 - self.active])
        phases, began = {}, time.monotonic()

        def lap(name):
            nonlocal began
            now = time.monotonic()
            phases[name], began = 1000 * (now - began), now

        start = began
        wire.query(self.console, f"PAUSE {DATABASE}")
        lap("pause")
        nonce = os.urandom(8).hex()
        wire.query(here, f"UPDATE marker SET nonce = '{nonce}'")
        while wire.rows(there, "SELECT nonce FROM marker") != [(nonce,)]:
            time.sleep(0.0005)
        lap("catch-up")
        values = wire.rows(here, self.read_sequences)
        wire.query(there, "SELECT " + ", ".join(f"setval('{name}', {last}, {'true' if called == 't' else 'false'})"
                                                for name, last, called in values))
        lap("sequences")
        wire.query(self.console, "RELOAD")
        wire.query(self.console, f"RESUME {DATABASE}")
        lap("resume")
        self.active = 1 - self.active
        for session in self.sessions:
            session.close()
        return {"pause": 1000 * (time.monotonic() - start), **phases}


class Pgcutover(Peer):
    """The daemon, in session mode."""

    protocol = "prepared"

    def start(self):
        self.port, self.configuration = proxy.free_port(), f"{self.bench.directory}/pgcutover.toml"
        with open(self.configuration, "w") as out:
            out.write(f'[listen]\naddress = "127.0.0.1:{self.port}"\n[admin]\naddress = "127.0.0.1:{proxy.free_port()}"\n'
                      f'users = ["postgres"]\n[migration]\nbindir = "{self.bench.bindir}"\n')
            for server in self.servers:
                out.write(f'[{server.name}]\nhost = "127.0.0.1"\nport = {server.port}\nuser = "postgres"\nsslmode = "disable"\n')
        self.binary = os.path.abspath(self.bench.args.binary)
        if not os.access(self.binary, os.X_OK):
            sys.exit(f"{self.binary} is not there: cargo build --release --locked")
        self.bench.start("pgcutover", [self.binary, "run", "-c", self.configuration], self.port)
        self.order("create", "bench", "--database", DATABASE, "--option", "migrate", "--wait")

    def order(self, *words):
        done = subprocess.run([self.binary, "migration", *words, "-c", self.configuration, "--output", "json"],
                              capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"migration {words}: {done.stdout}{done.stderr}")
        return json.loads(done.stdout) if done.stdout.strip() else {}

    def get_ready(self):
        wanted = ("InProgress", "WaitingForUserAction") if self.active == 0 else ("Succeeded",)
        while True:
            view = self.order("show", "bench")
            if view["state"] in wanted and view["databases"][0]["latency_bytes"] is not None:
                return
            time.sleep(0.2)

    def move(self):
        report = self.order("rollback" if self.active else "cutover", "bench")
        if report["outcome"] != "switched":
            sys.exit(f"{report}")
        self.active = 1 - self.active
        steps = {one["step"]: one["ms"] for one in report["pause_steps"]}
        if self.bench.args.verbose:
            print("  " + shown({one["step"]: one["ms"] for one in report["prepare_steps"]}), flush=True)
        return {"pause": report["pause_ms"], "prepare": report["phases_ms"]["prepare"], **steps}


class Cutovers(proxy.Bench):
    """The servers, the load and the rounds."""

    def __init__(self, args):
        args.cases_of_cutover, args.cases = args.cases, []
        super().__init__(args)
        args.cases = args.cases_of_cutover
        self.wide = any(case.startswith("wide") for case in args.cases)
        self.max_connections = 1200 if self.wide else 200

    def start_server(self, name):
        port = super().start_server(name)
        settings = {"fsync": "on" if self.args.fsync else "off", "synchronous_commit": "on", "max_wal_size": "8GB",
                    "checkpoint_timeout": "1h", "max_logical_replication_workers": 8, "max_locks_per_transaction": 256,
                    "shared_buffers": "256MB"}
        for setting, value in settings.items():
            self.sql(port, f"ALTER SYSTEM SET {setting} = '{value}'")
        self.sql(port, "SELECT pg_reload_conf()")
        return port

    def program(self, name, port, *arguments):
        return subprocess.run([f"{self.bindir}/{name}", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", *arguments],
                              check=True, capture_output=True, text=True).stdout

    def load(self, port, script):
        subprocess.run([f"{self.bindir}/psql", "-Xq", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", str(port), "-U",
                        "postgres", "-d", DATABASE], check=True, input=script, text=True, stdout=subprocess.DEVNULL)
        self.sql(port, f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {ROLE}; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {ROLE}",
                 DATABASE)

    def run(self):
        if proxy.find_program("pgbouncer") is None and "scripted" in self.args.peers:
            sys.exit("pgbouncer is not installed (looked in PATH, /usr/sbin and /usr/local/sbin)")
        self.peers = {}
        for name in self.args.peers:
            self.peers[name] = {"scripted": Scripted, "pgcutover": Pgcutover}[name](self, name)
            self.peers[name].start()
        for case in self.args.cases:
            figures = {name: [] for name in self.peers}
            for number in range(self.args.rounds):
                order = list(self.peers)
                for name in order[number % len(order):] + order[:number % len(order)]:
                    figures[name].append(self.round(case, self.peers[name]))
                    if self.args.verbose:
                        print(f"  {case} {name}: {shown(figures[name][-1])}", flush=True)
            self.report(case, figures)

    def round(self, case, peer):
        kind, clients = case.split(":")
        peer.get_ready()
        idle = self.idle_sessions(peer) if kind == "wide" else []
        prefix, script, before = f"{self.directory}/latency", f"{self.directory}/load.sql", peer.rows()
        with open(script, "w") as out:
            out.write(SCRIPT + (f"\\sleep {self.args.think} ms\n" if self.args.think else ""))
        started = time.time()
        pgbench = subprocess.Popen(
            [f"{self.bindir}/pgbench", "-h", "127.0.0.1", "-p", str(peer.port), "-U", ROLE, "-n", "-T", str(self.args.seconds), "-c", clients, "-j",
             "1", "-M", peer.protocol, "-f", script, "-l", f"--log-prefix={prefix}", DATABASE],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment)
        stop, slow = threading.Event(), []
        if kind == "slow":
            slow.append(threading.Thread(target=long_transactions, args=(peer.port, stop)))
            slow[0].start()
        time.sleep(BEFORE)
        if pgbench.poll() is not None:
            sys.exit(f"pgbench ended: {pgbench.stderr.read()}")
        start = time.time()
        figures = peer.move()
        end = time.time() + AFTER
        if end > started + self.args.seconds:
            sys.exit(f"the move of {peer.name} outlasted the load: give more --seconds")
        _, errors = pgbench.communicate(timeout=60 + self.args.seconds)
        stop.set()
        for thread in slow:
            thread.join()
        for session in idle:
            session.close()
        if pgbench.returncode != 0 or "error" in errors or "abort" in errors:
            sys.exit(f"a client of {peer.name} met an error: {errors}")
        stalls, base, begun, done = self.latencies(prefix, start, end)
        found = peer.rows() - before
        if done != found:
            sys.exit(f"{peer.name}: {done} transactions were acknowledged and {found} are there")
        return {"stall": stalls, "stall began": begun, "move": 1000 * (end - AFTER - start), "usual": base, **figures}

    def latencies(self, prefix, start, end):
        """Longest wait of any client in the window, longest before it, how long after the order the first of them began,
        and how many transactions there were."""
        stall, usual, begun, done = 0.0, 0.0, 0.0, 0
        for path in glob.glob(prefix + ".*"):
            with open(path) as lines:
                for line in lines:
                    _, _, microseconds, _, seconds, part = line.split()[:6]
                    took, ended = int(microseconds) / 1000 - self.args.think, int(seconds) + int(part) / 1e6
                    done += 1
                    if start <= ended <= end:
                        if took > stall:
                            stall, begun = took, 1000 * (ended - start) - took
                    # Connecting is no part of the load.
                    elif start - BEFORE / 2 <= ended < start:
                        usual = max(usual, took)
            os.unlink(path)
        return stall, usual, begun, done

    def idle_sessions(self, peer):
        sessions = []
        for _ in range(IDLE_SESSIONS):
            sessions.append(wire.connect(peer.port, ROLE, PASSWORD, DATABASE))
            wire.query(sessions[-1], "SELECT 1")
        return sessions

    def report(self, case, figures):
        for name, runs in figures.items():
            medians = {key: statistics.median(run.get(key, 0) for run in runs) for key in runs[0]}
            stalls = sorted(run["stall"] for run in runs)
            print(f"{case:<12}{name:<11}stall {medians.pop('stall'):6.1f} ms (spread {stalls[0]:.0f} to {stalls[-1]:.0f})   "
                  f"{shown(medians)}", flush=True)
        if len(figures) == 2:
            medians = {name: statistics.median(run["stall"] for run in runs) for name, runs in figures.items()}
            print(f"{case:<12}ratio of the stalls {medians['pgcutover'] / medians['scripted']:.2f}\n", flush=True)


class OneGroup:
    """Makes what is started from now on one group for the scheduler, where each backend would be one by itself."""

    ROOT, WEIGHT = "/sys/fs/cgroup/cpu", 16384

    def __init__(self):
        self.path = None
        with contextlib.suppress(OSError), open("/proc/sys/kernel/sched_autogroup_enabled") as enabled:
            if enabled.read().strip() != "1":
                return
            try:
                self.path = f"{self.ROOT}/pgcutover-bench-{os.getpid()}"
                os.mkdir(self.path)
                self.write(f"{self.path}/cpu.shares", self.WEIGHT)
                self.write(f"{self.path}/cgroup.procs", os.getpid())
            except OSError as error:
                print(f"backends are scheduled as groups of their own, which makes stalls of hundreds of ms: {error}", flush=True)
                self.path = None

    def leave(self):
        if self.path:
            self.write(f"{self.ROOT}/cgroup.procs", os.getpid())
            # What was killed may need a moment.
            for _ in range(20):
                with contextlib.suppress(OSError):
                    return os.rmdir(self.path)
                time.sleep(0.1)

    @staticmethod
    def write(path, value):
        with open(path, "w") as out:
            out.write(str(value))


def long_transactions(port, stop):
    session = wire.connect(port, ROLE, PASSWORD, DATABASE)
    while not stop.is_set():
        wire.query(session, "BEGIN")
        wire.query(session, f"SELECT pg_sleep({SLOW_MS / 1000})")
        wire.query(session, "COMMIT")
    session.close()


def wide_schema():
    tables = [f"CREATE TABLE wide_{number} (id bigint PRIMARY KEY, note text);" for number in range(WIDE_TABLES)]
    return "\n".join(tables + [f"CREATE SEQUENCE numbers_{number};" for number in range(WIDE_SEQUENCES)])


def shown(figures):
    return "  ".join(f"{name} {value:.1f}" for name, value in figures.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=int, default=10, help="length of the load of one round")
    parser.add_argument("--cases", default=CASES, type=lambda text: text.split(","))
    parser.add_argument("--peers", default=PEERS, type=lambda text: text.split(","))
    parser.add_argument("--think", type=float, default=0, help="milliseconds that a client waits after each transaction")
    parser.add_argument("--pool", type=int, default=20, help="server connections of PgBouncer (20 is its default)")
    parser.add_argument("--fsync", action=argparse.BooleanOptionalAction, default=True, help="whether the servers flush")
    parser.add_argument("--binary", default="target/release/pgcutover")
    parser.add_argument("--bindir", help="where PostgreSQL's programs are")
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory with the logs")
    parser.add_argument("--verbose", action="store_true", help="print every round")
    args = parser.parse_args()
    for case in args.cases:
        if not re.fullmatch(r"(clients|wide|slow):\d+", case):
            parser.error(f"no such case: {case}")
    for peer in args.peers:
        if peer not in PEERS.split(","):
            parser.error(f"no such peer: {peer}")
    group = OneGroup()
    bench = Cutovers(args)
    # What was started must be stopped, however this ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        bench.run()
    finally:
        bench.stop()
        group.leave()


if __name__ == "__main__":
    main()
