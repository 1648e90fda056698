#!/usr/bin/env python3
"""Moves the same database with pgcopydb, pg_dump | pg_restore, a native subscription and pgcutover, interleaved, and prints ratios.

    tests/bench/copy.py [--rounds 3] [--scale 10] [--peers PEER,PEER…] [--set NAME=VALUE…] [--binary FILE]

Peers: pgcopydb, pgcopydb-split, pgcopydb-wide (2 jobs, 2 jobs on parts of tables, 4 jobs: the best counts), dump (pg_dump -j2,
then pg_restore -j2), subscription (definitions, a native subscription's initial copy with 2 workers, then indexes),
pgcutover (a migration, from `create` to ready to be cut over). All of them end with indexes, constraints and ANALYZE.
Beside them the data phase alone, of pgbench's largest table without an index: raw1 and raw2 (binary COPY over one and two
connections), ours1 and ours2 (pgcutover with as many).

The database is pgbench's of the given scale and a table with jsonb, arrays, bytea and a GIN index that is a quarter as large as
pgbench's (scale 100: 1.5 GB and about 320 MB).

Printed are medians over the rounds, ratios to the best pgcopydb (data phase: to raw COPY over as many connections), the CPU
time of both servers, and that of the tool with its share of the whole.

Needs PostgreSQL's programs of the major that pgcopydb was built for. Everything runs on loopback in a temporary directory and
is stopped at the end. Start it on a machine that does nothing else.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from proxy import find_program, free_port, postgresql_bindir

PEERS = "pgcopydb,pgcopydb-split,pgcopydb-wide,dump,subscription,pgcutover,raw1,raw2,ours1,ours2"
# Jobs for tables, jobs for indexes, and whether tables are copied in parts.
PGCOPYDB = {"pgcopydb": (2, 2, False), "pgcopydb-split": (2, 2, True), "pgcopydb-wide": (4, 4, False)}
DATABASE, BARE = "bench", "bare"
LARGEST = "pgbench_accounts"
# Rows of the mixed table for each unit of pgbench's scale.
MIXED_ROWS = 5000
MIXED = """
CREATE TABLE mixed (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at timestamptz NOT NULL, kind text NOT NULL,
    body jsonb NOT NULL, tags text[] NOT NULL, numbers int[] NOT NULL, raw bytea NOT NULL);
INSERT INTO mixed (at, kind, body, tags, numbers, raw)
    SELECT '2024-01-01'::timestamptz + g * interval '1 minute', 'kind ' || g % 10,
           jsonb_build_object('id', g, 'name', md5(g::text), 'nested', jsonb_build_object('a', g % 7, 'b', repeat(md5(g::text), 6))),
           ARRAY['t' || g % 100, 't' || g % 1000, md5((g % 50)::text)], ARRAY[g, g * 2, g * 3],
           decode(repeat(md5(g::text), 12), 'hex')
    FROM generate_series(1, {rows}) g;
CREATE INDEX mixed_body ON mixed USING gin (body jsonb_path_ops);
CREATE INDEX mixed_at ON mixed (at);
"""
SETTINGS = ["listen_addresses=127.0.0.1", "max_connections=60", "wal_level=logical", "shared_buffers=1GB", "max_wal_size=8GB",
            "checkpoint_timeout=30min", "max_sync_workers_per_subscription=2", "max_logical_replication_workers=6",
            "max_worker_processes=12", "maintenance_work_mem=256MB"]


def ticks(pid):
    """CPU seconds of a process and of the children that it has waited for."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as listed:
            return listed.read().split()
    except FileNotFoundError:
        return []


def server_seconds(pid):
    """CPU seconds of a server: its own, of the backends that have ended, and of those that run."""
    return ticks(pid) + sum(ticks(child) for child in children(pid))


class Bench:
    def __init__(self, args):
        self.args = args
        self.bindir = postgresql_bindir(args.bindir)
        self.directory = tempfile.mkdtemp(prefix="pgcutover-bench-", dir=args.directory)
        os.chmod(self.directory, 0o755)
        self.as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
        self.environment = dict(os.environ, PATH=f"{self.bindir}{os.pathsep}{os.environ['PATH']}", PGUSER="postgres",
                                PGHOST="127.0.0.1", PGOPTIONS="-c client_min_messages=warning")
        self.started, self.servers, self.number = [], {}, 0

    # Servers

    def start_server(self, name):
        data, port = f"{self.directory}/{name}", free_port()
        os.mkdir(data)
        if self.as_user:
            shutil.chown(data, "postgres", "postgres")
        subprocess.run(self.as_user + [f"{self.bindir}/initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8",
                                       "--locale=C", "-N"], check=True, stdout=subprocess.DEVNULL, cwd="/")
        settings = SETTINGS + [f"fsync={self.args.fsync}"]
        command = [f"{self.bindir}/postgres", "-D", data, "-p", str(port), "-k", data]
        log = open(f"{self.directory}/{name}.log", "w")
        process = subprocess.Popen(self.as_user + command + [word for setting in settings for word in ("-c", setting)],
                                   stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd="/")
        self.started.append(process)
        for _ in range(300):
            asked = self.run(["psql", "-XAtqc", "SELECT 1", "-p", port, "postgres"], check=False)
            if asked.returncode == 0:
                break
            time.sleep(0.1)
        self.servers[name] = (port, process.pid)

    def run(self, command, check=True, **more):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=self.environment, cwd="/", **more)
        if check and done.returncode != 0:
            sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
        return done

    def port(self, name):
        return self.servers[name][0]

    def sql(self, server, text, database=DATABASE):
        return self.run(["psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-p", self.port(server), "-c", text, database]).stdout.strip()

    def uri(self, server, database=DATABASE):
        return f"postgresql://postgres@127.0.0.1:{self.port(server)}/{database}"

    def furnish(self):
        for name in ("source", "target"):
            self.start_server(name)
        for database, steps in ((DATABASE, "dtgvp"), (BARE, "dtg")):
            self.sql("source", f"CREATE DATABASE {database}", "postgres")
            self.run(["pgbench", "-p", self.port("source"), "-i", "-q", "-I", steps, "-s", self.args.scale, database])
        self.run(["psql", "-Xq", "-v", "ON_ERROR_STOP=1", "-p", self.port("source"), DATABASE],
                 input=MIXED.format(rows=MIXED_ROWS * self.args.scale))
        for database in (DATABASE, BARE):
            self.sql("source", "VACUUM ANALYZE", database)
        size = self.sql("source", f"SELECT pg_size_pretty(pg_database_size('{DATABASE}')), pg_size_pretty(pg_table_size('mixed')),"
                                  f" pg_size_pretty(pg_indexes_size('mixed')), current_setting('server_version')")
        print("database {}, of it mixed {} and its indexes {}; PostgreSQL {}".format(*size.split("|")), flush=True)

    def fresh(self, database):
        """An empty database on the target, and nothing of the run before in memory or waiting to be written."""
        self.sql("target", f"DROP DATABASE IF EXISTS {database} WITH (FORCE)", "postgres")
        self.sql("target", f"CREATE DATABASE {database} TEMPLATE template0", "postgres")
        self.sql("target", "CHECKPOINT", "postgres")
        # The same pages are in the source's memory for everybody.
        self.sql("source", f"SELECT count(*) FROM {LARGEST}", database)

    # Peers: each moves the database

    def pgcopydb(self, peer):
        tables, indexes, split = PGCOPYDB[peer]
        parts = ["--split-tables-larger-than", f"{max(2, self.args.scale * 13 // 8)}MB"] if split else []
        directory = f"{self.directory}/pgcopydb"
        self.run(["pgcopydb", "clone", "--source", self.uri("source"), "--target", self.uri("target"), "--dir", directory,
                  "--table-jobs", tables, "--index-jobs", indexes, "--not-consistent", "--restart", *parts])
        shutil.rmtree(directory, ignore_errors=True)

    def dump(self, _peer):
        directory = f"{self.directory}/dump"
        self.run(["pg_dump", "-Fd", "-Z0", "-j2", "-f", directory, "-p", self.port("source"), DATABASE])
        self.run(["pg_restore", "-j2", "-d", DATABASE, "-p", self.port("target"), directory])
        shutil.rmtree(directory)
        self.sql("target", "ANALYZE")

    def subscription(self, _peer):
        for section in ("pre-data", "post-data"):
            self.run(["pg_dump", "-Fc", f"--section={section}", "-f", f"{self.directory}/{section}", "-p", self.port("source"), DATABASE])
        self.run(["pg_restore", "-d", DATABASE, "-p", self.port("target"), f"{self.directory}/pre-data"])
        self.sql("source", "CREATE PUBLICATION bench FOR ALL TABLES")
        self.sql("target", f"CREATE SUBSCRIPTION bench CONNECTION '{self.uri('source')}' PUBLICATION bench")
        while self.sql("target", "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate NOT IN ('s', 'r')") != "0":
            time.sleep(0.05)
        self.run(["pg_restore", "-j2", "-d", DATABASE, "-p", self.port("target"), f"{self.directory}/post-data"])
        self.sql("target", "ANALYZE")
        return lambda: (self.sql("target", "DROP SUBSCRIPTION bench"), self.sql("source", "DROP PUBLICATION bench"))

    def raw(self, peer):
        self.run(["psql", "-Xq", "-p", self.port("target"), BARE], input=self.run(
            ["pg_dump", "-s", "-t", LARGEST, "-p", self.port("source"), BARE]).stdout)
        jobs = int(peer[-1])
        pages = int(self.sql("source", f"SELECT pg_relation_size('{LARGEST}') / 8192", BARE))
        pipes = []
        for job in range(jobs):
            part = f"ctid >= '({pages * job // jobs},0)'" + (f" AND ctid < '({pages * (job + 1) // jobs},0)'" if job + 1 < jobs else "")
            query = LARGEST if jobs == 1 else f"(SELECT * FROM {LARGEST} WHERE {part})"
            psql = ["psql", "-Xq", "-p"]
            reader = subprocess.Popen([*psql, str(self.port("source")), "-c", f"COPY {query} TO STDOUT (FORMAT binary)", BARE],
                                      stdout=subprocess.PIPE, env=self.environment)
            writer = subprocess.Popen([*psql, str(self.port("target")), "-c", f"COPY {LARGEST} FROM STDIN (FORMAT binary)", BARE],
                                      stdin=reader.stdout, env=self.environment)
            reader.stdout.close()
            pipes += [reader, writer]
        if any(pipe.wait() for pipe in pipes):
            sys.exit("a raw COPY failed")

    def pgcutover(self, peer):
        """Ends when the migration is ready; the data phase alone is read from the log."""
        database = BARE if peer.startswith("ours") else DATABASE
        self.sql("target", f"DROP DATABASE {database}", "postgres")
        settings = list(self.args.set)
        if peer.startswith("ours"):
            settings.append(f"copy_workers={peer[-1]}")
        self.number += 1
        name, config, log = f"m{self.number}", f"{self.directory}/{peer}.toml", f"{self.directory}/{peer}.log"
        with open(config, "w") as out:
            out.write(f'[listen]\naddress = "127.0.0.1:{free_port()}"\n[admin]\naddress = "127.0.0.1:{free_port()}"\n'
                      f'users = ["postgres"]\n[telemetry]\nformat = "json"\n[migration]\nbindir = "{self.bindir}"\n'
                      + "".join(f"{key} = {value}\n" for key, value in (setting.split("=", 1) for setting in settings))
                      + "".join(f'[{server}]\nhost = "127.0.0.1"\nport = {self.port(server)}\nuser = "postgres"\nsslmode = "disable"\n'
                                for server in ("source", "target")))
        binary = os.path.abspath(self.args.binary)
        process = subprocess.Popen([binary, "run", "-c", config], stdout=open(log, "w"), stderr=subprocess.STDOUT, cwd=self.directory)
        self.started.append(process)

        def pgcutover(*words, check=True):
            return self.run([binary, *words, "-c", config, "--output", "json"], check=check)

        while pgcutover("migration", "list", check=False).returncode != 0:
            time.sleep(0.05)
        self.used_before = server_seconds(process.pid)
        self.began = time.monotonic()
        created = pgcutover("migration", "create", name, "--database", database, "--wait")
        self.ended = time.monotonic()
        shown = json.loads(created.stdout)
        if shown["state"] != "WaitingForUserAction":
            sys.exit(f"the migration is not ready: {json.dumps(shown, indent=1)}")
        self.own = server_seconds(process.pid) - self.used_before
        with open(log) as lines:
            self.events = [json.loads(line) for line in lines if line.startswith("{")]

        def clean():
            pgcutover("migration", "cancel", name)
            process.send_signal(signal.SIGINT)
            process.wait(30)
            self.started.remove(process)
            for server in ("source", "target"):
                self.sql(server, "DROP SCHEMA IF EXISTS pgcutover CASCADE", "postgres")

        return clean

    def load(self, peer):
        move = {"dump": self.dump, "subscription": self.subscription}.get(peer)
        move = move or (self.pgcopydb if peer in PGCOPYDB else self.raw if peer.startswith("raw") else self.pgcutover)
        self.fresh(BARE if peer[-1] in "12" else DATABASE)
        pids = [pid for _, pid in self.servers.values()]
        self.own, self.began, self.ended = None, None, None
        servers, before = sum(map(server_seconds, pids)), resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.monotonic()
        clean = move(peer)
        ended = time.monotonic()
        seconds = (self.ended or ended) - (self.began or began)
        servers = sum(map(server_seconds, pids)) - servers
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        own = self.own if self.own is not None else after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if peer.startswith("ours"):
            seconds = self.data_phase()
        if clean:
            clean()
        print(f"  {peer:<16}{seconds:6.2f} s", flush=True)
        return {"seconds": seconds, "servers": servers, "own": own}

    def data_phase(self):
        """From the first table's snapshot to the last row."""
        def at(event):
            clock = event["timestamp"].rstrip("Z").partition("T")[2].split(":")
            return int(clock[0]) * 3600 + int(clock[1]) * 60 + float(clock[2])

        def fields(event):
            return event.get("fields", event)

        begun = [at(event) for event in self.events if fields(event).get("message") == "copying"]
        done = [at(event) for event in self.events if fields(event).get("message") == "rows copied"]
        return (max(done) - min(begun)) % 86400

    def measure(self):
        self.furnish()
        rows = {peer: [] for peer in self.args.peers}
        for number in range(self.args.rounds):
            order = list(rows)
            for peer in order[number % len(order):] + order[:number % len(order)]:
                rows[peer].append(self.load(peer))
        report(rows)

    def stop(self):
        for process in reversed(self.started):
            process.send_signal(signal.SIGINT)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.args.keep:
            print(f"logs are in {self.directory}")
        else:
            shutil.rmtree(self.directory, ignore_errors=True)


def report(rows):
    median = {peer: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for peer, runs in rows.items() if runs}
    best = min((median[peer]["seconds"] for peer in median if peer in PGCOPYDB), default=None)
    for peer, figures in median.items():
        base = median.get(f"raw{peer[-1]}", {}).get("seconds") if peer[-1] in "12" else best
        ratio = f"{figures['seconds'] / base:.2f}x" if base else ""
        share = figures["own"] / ((figures["own"] + figures["servers"]) or 1)
        print(f"{peer:<16}{figures['seconds']:7.2f} s  {ratio:>6}   servers' CPU {figures['servers']:6.1f} s   "
              f"own CPU {figures['own']:5.2f} s ({100 * share:.1f} %)", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=int, default=10, help="of pgbench's tables")
    parser.add_argument("--peers", default=PEERS, type=lambda text: text.split(","))
    parser.add_argument("--set", action="append", default=[], help="a key of [migration] for pgcutover, such as copy_workers=2")
    parser.add_argument("--binary", default="target/release/pgcutover")
    parser.add_argument("--bindir", help="where PostgreSQL's programs are")
    parser.add_argument("--directory", help="where the servers' data may be (default: the temporary directory)")
    parser.add_argument("--fsync", choices=("on", "off"), default="off")
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory with the logs")
    args = parser.parse_args()
    for peer in args.peers:
        if peer not in PEERS.split(","):
            parser.error(f"no such peer: {peer}")
    for program in {"pgcopydb" for peer in args.peers if peer in PGCOPYDB}:
        if find_program(program) is None:
            print("without pgcopydb: it is not installed", flush=True)
            args.peers = [peer for peer in args.peers if peer not in PGCOPYDB]
    if any(peer.startswith(("pgcutover", "ours")) for peer in args.peers) and not os.access(args.binary, os.X_OK):
        parser.error(f"{args.binary} is not there: cargo build --release --locked")
    bench = Bench(args)
    # What was started must be stopped, however this ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        bench.measure()
    finally:
        bench.stop()


if __name__ == "__main__":
    main()
