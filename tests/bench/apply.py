#!/usr/bin/env python3
"""Lets backlogs of changes be applied by native logical replication and by pgcutover, interleaved, and prints ratios.

    tests/bench/apply.py [--rounds 3] [--changes 100000] [--cases CASE,CASE…] [--peers PEER,PEER…] [--fsync on]
                         [--binary FILE]

Cases: tpcb (pgbench's transaction), insert (single rows, each its own transaction), insert1000 (transactions of 1,000 rows),
update (single rows), update1000, mixed (inserts, updates and deletes, of a few rows each), live (a backlog of pgbench's
transactions, while pgbench writes more of them with 16 clients at full speed for --seconds: what is applied meanwhile, as a
multiple of what is written).
Peers: decode (pg_recvlogical, which throws away what it gets: the limit of one slot), native (a subscription), pgcutover.

Each peer has its own target server. A backlog is written once for a round while nobody reads; each peer's slot then has the
same WAL before it. A peer is timed from the moment its walsender was started, by the server's clock, to the moment the target
shows the last transaction (decode: pg_recvlogical has reached the end); CPU is that of every process that takes part: source server,
target server, and the peer's own. One round trip more than decode is in the others' times, and nothing else.

Printed are medians over the rounds, and ratios to native. Needs PostgreSQL's programs. Everything runs on loopback in a
temporary directory and is stopped at the end. Start it on a machine that does nothing else.
"""

import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import time

import proxy
import wire

CASES = "tpcb,insert,insert1000,update,update1000"
PEERS = "decode,native,pgcutover"
DATABASE = "bench"
ROWS_PER_LARGE = 1000
TABLES = """
CREATE TABLE single (id bigint PRIMARY KEY, number int NOT NULL, note text);
CREATE TABLE many (id bigint PRIMARY KEY, number int NOT NULL, note text);
CREATE SEQUENCE ids;
CREATE TABLE last (id int PRIMARY KEY, nonce text);
INSERT INTO last VALUES (1, '');
INSERT INTO many SELECT g, 0, 'note ' || g FROM generate_series(1, 200000) g;
"""
# Not all tables: pgcutover adds one of its own, which only its target knows.
PUBLISHED = "single, many, last, pgbench_accounts, pgbench_branches, pgbench_tellers, pgbench_history"
INSERT = "INSERT INTO single VALUES (nextval('ids'), {n}, 'a note of some length, number {n}');\n"
SCRIPTS = {
    "insert": INSERT.format(n="1"),
    "insert1000": f"INSERT INTO single SELECT nextval('ids'), g, 'a note of some length, number ' || g "
                  f"FROM generate_series(1, {ROWS_PER_LARGE}) g;\n",
    "update": "\\set id random(1, 200000)\nUPDATE many SET number = number + 1 WHERE id = :id;\n",
    "update1000": f"\\set id random(1, {200000 - ROWS_PER_LARGE})\nUPDATE many SET number = number + 1 "
                  f"WHERE id > :id AND id <= :id + {ROWS_PER_LARGE};\n",
    "mixed": "\\set id random(1, 200000)\nBEGIN;\n" + INSERT.format(n="2")
             + "UPDATE many SET note = 'x' || number WHERE id = :id;\nDELETE FROM single WHERE id = (SELECT min(id) FROM single);\n"
             "END;\n",
}


class Tree:
    """A server with all its backends, those that have ended included."""

    def __init__(self, pid):
        self.pid = pid

    def cpu_seconds(self):
        with open(f"/proc/{self.pid}/task/{self.pid}/children") as children:
            pids = children.read().split()
        ticks = self.ticks(self.pid, slice(11, 15))
        for pid in pids:
            try:
                ticks += self.ticks(pid, slice(11, 13))
            except (FileNotFoundError, ProcessLookupError):
                # Has just ended, and is counted with its parent the next time.
                pass
        return ticks / os.sysconf("SC_CLK_TCK")

    @staticmethod
    def ticks(pid, fields):
        with open(f"/proc/{pid}/stat") as stat:
            return sum(int(value) for value in stat.read().rpartition(")")[2].split()[fields])


class Apply(proxy.Bench):
    """The servers, the backlogs and the peers."""

    def __init__(self, args):
        args.cases_of_proxy, args.cases = args.cases, []
        super().__init__(args)
        args.cases = args.cases_of_proxy
        self.max_connections, self.fsync = 100, args.fsync
        self.trees = {}

    def start(self, name, command, port):
        process = super().start(name, command, port)
        self.trees[name] = Tree(process.pid)
        return process

    def start_server(self, name):
        port = super().start_server(name)
        self.sql(port, "ALTER SYSTEM SET wal_sender_timeout = 0")
        self.sql(port, "ALTER SYSTEM SET max_wal_size = '8GB'")
        self.sql(port, "ALTER SYSTEM SET checkpoint_timeout = '1h'")
        self.sql(port, "ALTER SYSTEM SET autovacuum = off")
        self.sql(port, "SELECT pg_reload_conf()")
        return port

    def session(self, port, database=DATABASE):
        return wire.connect(port, "postgres", "", database)

    def prepare(self):
        self.source = self.start_server("source")
        self.sql(self.source, f"CREATE DATABASE {DATABASE}")
        subprocess.run([f"{self.bindir}/pgbench", "-h", "127.0.0.1", "-p", str(self.source), "-U", "postgres", "-i", "-q", "-s",
                        str(self.args.scale), DATABASE], check=True, stderr=subprocess.DEVNULL, env=self.environment)
        self.sql(self.source, TABLES, DATABASE)
        for peer in self.args.peers:
            getattr(self, f"prepare_{peer}")()

    def prepare_decode(self):
        self.sql(self.source, f"CREATE PUBLICATION decode FOR TABLE {PUBLISHED}", DATABASE)
        self.sql(self.source, "SELECT pg_create_logical_replication_slot('decode', 'pgoutput')", DATABASE)

    def prepare_native(self):
        self.native = self.start_server("target-native")
        self.sql(self.native, f"CREATE DATABASE {DATABASE}")
        dump = subprocess.run([f"{self.bindir}/pg_dump", "-h", "127.0.0.1", "-p", str(self.source), "-U", "postgres", "-s",
                               "--no-publications", DATABASE], check=True, capture_output=True, text=True).stdout
        subprocess.run([f"{self.bindir}/psql", "-Xq", "-h", "127.0.0.1", "-p", str(self.native), "-U", "postgres", "-d", DATABASE],
                       check=True, input=dump, text=True, stdout=subprocess.DEVNULL)
        self.sql(self.source, f"CREATE PUBLICATION native FOR TABLE {PUBLISHED}", DATABASE)
        self.sql(self.native, f"CREATE SUBSCRIPTION native CONNECTION 'host=127.0.0.1 port={self.source} dbname={DATABASE} "
                 f"user=postgres' PUBLICATION native", DATABASE)
        self.poll(self.native, "SELECT count(*) FROM pg_subscription_rel WHERE srsubstate <> 'r'", "0")
        self.sql(self.native, "ALTER SUBSCRIPTION native DISABLE", DATABASE)

    def prepare_pgcutover(self):
        self.ours = self.start_server("target-pgcutover")
        self.configuration, self.admin = f"{self.directory}/pgcutover.toml", proxy.free_port()
        with open(self.configuration, "w") as out:
            out.write(f'[listen]\naddress = "127.0.0.1:{proxy.free_port()}"\n[admin]\naddress = "127.0.0.1:{self.admin}"\n'
                      f'users = ["postgres"]\n'
                      f'[source]\nhost = "127.0.0.1"\nport = {self.source}\nuser = "postgres"\nsslmode = "disable"\n'
                      f'[target]\nhost = "127.0.0.1"\nport = {self.ours}\nuser = "postgres"\nsslmode = "disable"\n')
        self.binary = os.path.abspath(self.args.binary)
        if not os.access(self.binary, os.X_OK):
            sys.exit(f"{self.binary} is not there: cargo build --release --locked")
        self.daemon = self.run_daemon()
        subprocess.run([self.binary, "migration", "create", "bench", "--database", DATABASE, "--option", "migrate", "--wait", "-c",
                        self.configuration], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.stop_daemon()

    def run_daemon(self):
        log = open(f"{self.directory}/pgcutover.log", "a")
        process = subprocess.Popen([self.binary, "run", "-c", self.configuration], stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.started.append(process)
        for _ in range(300):
            try:
                wire.socket.create_connection(("127.0.0.1", self.admin), 1).close()
                return process
            except OSError:
                time.sleep(0.05)
        sys.exit(f"pgcutover does not answer, see {self.directory}/pgcutover.log")

    def stop_daemon(self):
        self.started.remove(self.daemon)
        self.daemon.send_signal(signal.SIGTERM)
        self.daemon.wait(60)

    def poll(self, port, sql, wanted):
        session = self.session(port)
        while answer(session, sql) != wanted:
            time.sleep(0.05)
        session.close()

    # A backlog, and its end

    def write_backlog(self, case):
        """Returns how many transactions or rows it has, and the nonce that comes last."""
        large = case.endswith("1000")
        transactions = self.args.changes // (ROWS_PER_LARGE if large else 1)
        script = ["-b", "tpcb-like"]
        if case != "tpcb":
            path = f"{self.directory}/{case}.sql"
            with open(path, "w") as out:
                out.write(SCRIPTS[case])
            script = ["-f", path]
        clients = 8
        each = max(1, transactions // clients)
        self.pgbench("-c", str(clients), "-t", str(each), "-M", "simple" if large else "prepared", *script)
        # A backend that ends counts twice or not at all for a moment.
        time.sleep(0.5)
        nonce = os.urandom(8).hex()
        self.sql(self.source, f"UPDATE last SET nonce = '{nonce}'", DATABASE)
        self.sql(self.source, "CHECKPOINT")
        return each * clients * (ROWS_PER_LARGE if large else 1), nonce

    def pgbench(self, *options):
        subprocess.run([f"{self.bindir}/pgbench", "-h", "127.0.0.1", "-p", str(self.source), "-U", "postgres", "-n", *options, DATABASE],
                       check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self.environment)

    def until_active(self, session, slot_sql):
        """Returns when the slot's walsender was started. The answer itself may come late, on a machine that is busy by then."""
        started = ("SELECT extract(epoch FROM a.backend_start) FROM pg_replication_slots s JOIN pg_stat_activity a "
                   f"ON a.pid = s.active_pid WHERE s.active AND {slot_sql}")
        while (seconds := answer(session, started)) is None:
            time.sleep(0.001)
        return float(seconds)

    def until_applied(self, session, nonce):
        while answer(session, "SELECT nonce FROM last") != nonce:
            time.sleep(0.005)

    def waiting(self, session, end):
        """The end of a run: the nonce that comes last, or a function that returns at the end."""
        return end if callable(end) else lambda: self.until_applied(session, end)

    # Each returns seconds and CPU seconds of one backlog

    def measured(self, trees, begin, wait, own=lambda: 0.0):
        before = [self.trees[name].cpu_seconds() for name in trees]
        start = begin()
        wait()
        seconds = time.time() - start
        used = [self.trees[name].cpu_seconds() - earlier for name, earlier in zip(trees, before)]
        return {"seconds": seconds, "source": used[0], "target": sum(used[1:]), "own": own()}

    def run_decode(self, nonce):
        session = self.session(self.source)
        end = answer(session, "SELECT pg_current_wal_flush_lsn()")
        command = [f"{self.bindir}/pg_recvlogical", "-h", "127.0.0.1", "-p", str(self.source), "-U", "postgres", "-d", DATABASE,
                   "-S", "decode", "--start", "-E", end, "-f", "/dev/null", "-o", "proto_version=1", "-o",
                   "publication_names=decode", "-F", "0"]
        usage = []

        def begin():
            self.receiver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            return self.until_active(session, "slot_name = 'decode'")

        def wait():
            _, status, used = os.wait4(self.receiver.pid, 0)
            self.receiver.returncode = status
            usage.append(used.ru_utime + used.ru_stime)

        figures = self.measured(["source"], begin, wait, lambda: usage[0])
        session.close()
        return figures

    def run_native(self, end):
        source, target = self.session(self.source), self.session(self.native)

        def begin():
            answer(target, "ALTER SUBSCRIPTION native ENABLE")
            return self.until_active(source, "slot_name = 'native'")

        figures = self.measured(["source", "target-native"], begin, self.waiting(target, end))
        answer(target, "ALTER SUBSCRIPTION native DISABLE")
        while answer(source, "SELECT count(*) FROM pg_replication_slots WHERE active AND slot_name = 'native'") != "0":
            time.sleep(0.01)
        source.close()
        target.close()
        return figures

    def run_pgcutover(self, end):
        source, target = self.session(self.source), self.session(self.ours)

        def begin():
            self.daemon = self.run_daemon()
            return self.until_active(source, "slot_name LIKE 'pgcutover%'")

        def own():
            return proxy.Process(self.daemon.pid).cpu_seconds()

        figures = self.measured(["source", "target-pgcutover"], begin, self.waiting(target, end), own)
        self.stop_daemon()
        source.close()
        target.close()
        return figures

    # Changes that come while a backlog is applied

    def run_live(self):
        """What each peer applies, by what is written at the same time; ends with everything applied."""
        peers = {"native": "native", "pgcutover": "ours"}
        rows = {peer: [] for peer in self.args.peers if peer in peers}
        count = "SELECT count(*) FROM pgbench_history"
        for number in range(self.args.rounds):
            order = list(rows)
            for peer in order[number % len(order):] + order[:number % len(order)]:
                self.write_backlog("tpcb")
                port, written, applied = getattr(self, peers[peer]), [], []

                def wait():
                    for _ in range(2):
                        written.append(int(self.sql(self.source, count, DATABASE)))
                        applied.append(int(self.sql(port, count, DATABASE)))
                        if len(written) == 1:
                            self.pgbench("-c", "16", "-T", str(self.args.seconds), "-b", "tpcb-like", "-M", "prepared")
                    nonce = os.urandom(8).hex()
                    self.sql(self.source, f"UPDATE last SET nonce = '{nonce}'", DATABASE)
                    session = self.session(port)
                    self.until_applied(session, nonce)
                    session.close()

                getattr(self, f"run_{peer}")(wait)
                rows[peer].append([(was[1] - was[0]) / self.args.seconds for was in (written, applied)] + [written[1] - applied[1]])
        for peer, runs in rows.items():
            written, applied, behind = (statistics.median(column) for column in zip(*runs))
            print(f"{'live':<12}{peer:<11}{written:.0f} tx per second written, {applied:.0f} applied ({applied / written:.2f}x); "
                  f"{behind:.0f} behind at the end", flush=True)
        print(flush=True)

    def run(self):
        self.prepare()
        for case in self.args.cases:
            if case == "live":
                self.run_live()
                continue
            rows = {peer: [] for peer in self.args.peers}
            for number in range(self.args.rounds):
                changes, nonce = self.write_backlog(case)
                order = list(rows)
                for peer in order[number % len(order):] + order[:number % len(order)]:
                    run = getattr(self, f"run_{peer}")(nonce)
                    cpu = {name: 1e6 * run[name] / changes for name in ("source", "target", "own")}
                    rows[peer].append({"per second": changes / run["seconds"], "CPU us each": sum(cpu.values()), **cpu})
            self.report(case, rows)
        self.compare()

    def report(self, case, rows):
        medians = {peer: {name: statistics.median(run[name] for run in runs) for name in runs[0]} for peer, runs in rows.items()}
        unit = "rows" if case.endswith("1000") else "tx"
        for peer, figures in medians.items():
            cells = []
            for name, value in figures.items():
                if name in ("source", "target", "own"):
                    cells.append(f"{name} {value:.1f}")
                    continue
                base = medians.get("native", {}).get(name)
                cells.append(f"{value:.0f} {unit} {name}" if name == "per second" else f"{value:.1f} {name}")
                cells[-1] += f" ({value / base:.2f}x)" if base else ""
            print(f"{case:<12}{peer:<11}{'  '.join(f'{cell:<30}' for cell in cells[:2])}{'  '.join(cells[2:])}".rstrip(), flush=True)
        print(flush=True)

    def compare(self):
        """What was measured must have been right, too."""
        if "pgcutover" not in self.args.peers:
            return
        for table in ("single", "many", "pgbench_accounts", "pgbench_branches", "pgbench_history"):
            digest = f"SELECT count(*) || ' ' || coalesce(sum(hashtext(t::text)::bigint), 0) FROM {table} t"
            if self.sql(self.source, digest, DATABASE) != self.sql(self.ours, digest, DATABASE):
                sys.exit(f"{table} differs between source and target")
        print("the tables of source and target are equal")


def answer(session, sql):
    """The first value of the first row; None where there is no row."""
    session.sendall(b"Q" + wire.struct.pack("!I", len(sql) + 5) + sql.encode() + b"\0")
    value = None
    while True:
        tag, body = wire._message(session)
        if tag == b"E":
            raise wire.Refused(body.decode(errors="replace"))
        if tag == b"D" and value is None:
            length = wire.struct.unpack("!i", body[2:6])[0]
            value = body[6:6 + length].decode() if length >= 0 else None
        if tag == b"Z":
            return value


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--changes", type=int, default=100_000, help="transactions (of cases …1000: rows) in a backlog")
    parser.add_argument("--seconds", type=int, default=10, help="of pgbench in the case live")
    parser.add_argument("--scale", type=int, default=10, help="of pgbench's tables")
    parser.add_argument("--cases", default=CASES, type=lambda text: text.split(","))
    parser.add_argument("--peers", default=PEERS, type=lambda text: text.split(","))
    parser.add_argument("--fsync", choices=("on", "off"), default="off", help="on all servers; on: as operators run them")
    parser.add_argument("--binary", default="target/release/pgcutover")
    parser.add_argument("--bindir", help="where PostgreSQL's programs are")
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory with the logs")
    args = parser.parse_args()
    for case in args.cases:
        if case not in ("tpcb", "live", *SCRIPTS):
            parser.error(f"no such case: {case}")
    for peer in args.peers:
        if peer not in PEERS.split(","):
            parser.error(f"no such peer: {peer}")
    bench = Apply(args)
    # What was started must be stopped, however this ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        bench.run()
    finally:
        bench.stop()


if __name__ == "__main__":
    main()
