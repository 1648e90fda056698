#!/usr/bin/env python3
"""Runs the same load direct, through HAProxy, through PgBouncer and through pgcutover, interleaved, and prints ratios.

    tests/bench/proxy.py [--rounds 5] [--seconds 5] [--cases CASE,CASE…] [--peers PEER,PEER…] [--binary FILE [--other FILE]]

Cases: prepared:N extended:N simple:N (pgbench, select only, N clients), tpcb:N (pgbench's own transaction, extended
protocol), result:SIZE (one value of 1MB or 10MB a transaction, 4 clients), churn:N (a new connection with SCRAM for each
transaction, N at a time), idle:N (N connections that have run one statement and say nothing).
Peers: direct, haproxy, pgbouncer, pgbouncer-tx, pgcutover, pgcutover-tx (-tx: transaction pooling).

--other adds a second build of the program, as peer "other", to compare two builds in one run.

Printed are medians over the rounds, and in brackets ratios to pgbouncer (for peers in transaction mode: to pgbouncer-tx): the
median of each round's own ratio, because machines grow slower and faster from minute to minute. CPU is the proxy process's own
user and system time, which is the most robust of the figures on a noisy machine; p99 is the median of the rounds' 99th
percentiles. Memory is the growth of the proxy's private memory.

Needs PostgreSQL's programs, and whichever of haproxy and pgbouncer are to be compared. Everything runs on loopback in a
temporary directory and is stopped at the end. Start it on a machine that does nothing else.
"""

import argparse
import glob
import os
import re
import resource
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import wire

CASES = ("prepared:1,prepared:16,prepared:64,extended:1,extended:16,extended:64,simple:1,simple:16,simple:64,"
         "tpcb:16,tpcb:64,result:1MB,result:10MB,churn:8,idle:1000,idle:5000")
PEERS = "direct,haproxy,pgbouncer,pgbouncer-tx,pgcutover,pgcutover-tx"
SELECT_ONLY = ("prepared", "extended", "simple")
RESULT_CLIENTS = 4
IDLE_SECONDS = 10
ROLE, PASSWORD, DATABASE = "bench", "bench-secret", "bench"
# Connections beyond those of the largest case.
SPARE_CONNECTIONS = 100
# Server connections of each peer in transaction mode.
TRANSACTION_POOL = 20


def find_program(name):
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def postgresql_bindir(wanted):
    places = [wanted] if wanted else [os.path.dirname(shutil.which("postgres") or "/nowhere/postgres")]
    places += sorted(glob.glob("/usr/lib/postgresql/*/bin") + glob.glob("/usr/pgsql-*/bin") + ["/usr/local/pgsql/bin"],
                     key=lambda place: [int(number) for number in re.findall(r"\d+", place)], reverse=True)
    for place in places:
        if all(os.access(f"{place}/{program}", os.X_OK) for program in ("postgres", "initdb", "pgbench", "psql")):
            return place
    sys.exit("postgres, initdb, pgbench and psql were not found in one directory; name it with --bindir")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Process:
    """A proxy under measurement."""

    def __init__(self, pid):
        self.pid = pid

    def cpu_seconds(self):
        """User and system time of all threads. The scheduler's own clock is finer than the ticks of stat."""
        spent = 0
        for task in os.listdir(f"/proc/{self.pid}/task"):
            try:
                with open(f"/proc/{self.pid}/task/{task}/schedstat") as stat:
                    spent += int(stat.read().split()[0])
            except FileNotFoundError:
                # A thread that has just ended.
                pass
        return spent / 1e9

    def private_kb(self):
        """Memory that nobody else shares."""
        with open(f"/proc/{self.pid}/smaps_rollup") as rollup:
            return sum(int(kb) for kb in re.findall(r"^Private_\w+:\s+(\d+) kB", rollup.read(), re.M))


class Unsupported(Exception):
    """This installation of a peer cannot do what a case asks for."""


class Bench:
    def __init__(self, args):
        self.args = args
        self.bindir = postgresql_bindir(args.bindir)
        self.directory = tempfile.mkdtemp(prefix="pgcutover-bench-")
        os.chmod(self.directory, 0o755)
        self.started = []
        self.as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
        self.environment = dict(os.environ, PGPASSWORD=PASSWORD, PGCONNECT_TIMEOUT="30")
        idle = [int(case.split(":")[1]) for case in args.cases if case.startswith("idle:")]
        self.max_clients = max([300, *idle]) + SPARE_CONNECTIONS
        # Pools of the peers before may not have been given up yet.
        self.max_connections = 2 * self.max_clients
        self.fsync = "off"
        wanted = 3 * self.max_clients
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if hard != resource.RLIM_INFINITY and hard < wanted:
            print(f"only {hard} open files are allowed; cases with more than {hard // 3} connections will fail", flush=True)
            wanted = hard
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

    # Servers and peers

    def start(self, name, command, port):
        log = open(f"{self.directory}/{name}.log", "w")
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.directory)
        self.started.append(process)
        user, database = (ROLE, DATABASE) if name.split("-")[0] not in ("source", "target") else ("postgres", "postgres")
        for _ in range(300):
            if process.poll() is not None:
                break
            # A port that listens proves little: only an answered query does.
            asked = subprocess.run([f"{self.bindir}/psql", "-XAtq", "-h", "127.0.0.1", "-p", str(port), "-U", user, "-d",
                                    database, "-c", "SELECT 1"], env=self.environment, capture_output=True, text=True)
            if asked.stdout.strip() == "1":
                return Process(process.pid)
            time.sleep(0.1)
        with open(f"{self.directory}/{name}.log") as log:
            tail = "".join(log.readlines()[-5:])
        raise Unsupported(f"{name} does not answer: {asked.stderr.strip() if process.poll() is None else ''}\n{tail}")

    def start_server(self, name):
        data, port = f"{self.directory}/{name}", free_port()
        os.mkdir(data)
        if self.as_user:
            shutil.chown(data, "postgres", "postgres")
        subprocess.run(self.as_user + [f"{self.bindir}/initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8",
                                       "--locale=C"], check=True, stdout=subprocess.DEVNULL, cwd="/")
        with open(f"{data}/pg_hba.conf", "w") as hba:
            hba.write(f"host all {ROLE} 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\nlocal all all trust\n")
        settings = ["listen_addresses=127.0.0.1", f"max_connections={self.max_connections}", f"fsync={self.fsync}", "wal_level=logical",
                    "shared_buffers=256MB", "password_encryption=scram-sha-256"]
        command = [f"{self.bindir}/postgres", "-D", data, "-p", str(port), "-k", data]
        self.start(name, self.as_user + command + [word for setting in settings for word in ("-c", setting)], port)
        return port

    def sql(self, port, text, database="postgres"):
        done = subprocess.run([f"{self.bindir}/psql", "-XAtq", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "-d",
                               database, "-c", text], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def start_haproxy(self, server, program):
        port, config = free_port(), f"{self.directory}/haproxy.cfg"
        with open(config, "w") as out:
            out.write(f"global\n maxconn {self.max_clients}\n nbthread {os.cpu_count()}\n"
                      f"defaults\n mode tcp\n option splice-auto\n timeout connect 5s\n timeout client 1h\n timeout server 1h\n"
                      f"listen pg\n bind 127.0.0.1:{port}\n server s 127.0.0.1:{server}\n")
        return port, self.start("haproxy", [program, "-db", "-f", config], port)

    def start_pgbouncer(self, name, server, program, mode):
        version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
        self.pgbouncer_version = tuple(map(int, re.search(r"(\d+)\.(\d+)", version).groups()))
        port, config, users = free_port(), f"{self.directory}/{name}.ini", f"{self.directory}/{name}.users"
        verifier = self.sql(server, f"SELECT rolpassword FROM pg_authid WHERE rolname = '{ROLE}'")
        with open(users, "w") as out:
            out.write(f'"{ROLE}" "{verifier}"\n')
        size = TRANSACTION_POOL if mode == "transaction" else self.max_clients
        statements = "max_prepared_statements=200\n" if mode == "transaction" and self.pgbouncer_version >= (1, 21) else ""
        with open(config, "w") as out:
            out.write(f"[databases]\n{DATABASE} = host=127.0.0.1 port={server}\n[pgbouncer]\nlisten_addr=127.0.0.1\n"
                      f"listen_port={port}\nauth_type=scram-sha-256\nauth_file={users}\npool_mode={mode}\n"
                      f"max_client_conn={self.max_clients}\ndefault_pool_size={size}\n"
                      f"server_idle_timeout=2\n"
                      f"server_reset_query=\nignore_startup_parameters=extra_float_digits\nunix_socket_dir=\n{statements}")
        return port, self.start(name, self.as_user + [program, config], port)

    def start_pgcutover(self, name, server, target, mode):
        port, config = free_port(), f"{self.directory}/{name}.toml"
        pool = f'[pool]\nmode = "transaction"\ndefault_pool_size = {TRANSACTION_POOL}\n' if mode == "transaction" else ""
        with open(config, "w") as out:
            out.write(f'[listen]\naddress = "127.0.0.1:{port}"\n[admin]\naddress = "127.0.0.1:{free_port()}"\n'
                      f'users = ["postgres"]\n{pool}'
                      f'[source]\nhost = "127.0.0.1"\nport = {server}\nuser = "postgres"\nsslmode = "disable"\n'
                      f'[target]\nhost = "127.0.0.1"\nport = {target}\nuser = "postgres"\nsslmode = "disable"\n')
        binary = os.path.abspath(self.args.other if name == "other" else self.args.binary)
        if not os.access(binary, os.X_OK):
            sys.exit(f"{binary} is not there: cargo build --release --locked")
        return port, self.start(name, [binary, "run", "-c", config], port)

    def start_peer(self, peer, server, target):
        mode = "transaction" if peer.endswith("-tx") else "session"
        if peer == "direct":
            return server, None
        if peer == "other" or peer.startswith("pgcutover"):
            return self.start_pgcutover(peer, server, target(), mode)
        name = peer.removesuffix("-tx")
        program = find_program(name)
        if program is None:
            raise Unsupported(f"{name} is not installed (looked in PATH, /usr/sbin and /usr/local/sbin)")
        return self.start_haproxy(server, program) if name == "haproxy" else self.start_pgbouncer(peer, server, program, mode)

    def start_peers(self):
        server = self.start_server("source")
        self.sql(server, f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'")
        self.sql(server, f"CREATE DATABASE {DATABASE} OWNER {ROLE}")
        subprocess.run([f"{self.bindir}/pgbench", "-h", "127.0.0.1", "-p", str(server), "-U", ROLE, "-i", "-q", "-s",
                        str(self.args.scale), DATABASE], check=True, stderr=subprocess.DEVNULL, env=self.environment)
        targets = []

        def target():
            if not targets:
                targets.append(self.start_server("target"))
            return targets[0]

        peers = {}
        for peer in self.args.peers:
            try:
                peers[peer] = self.start_peer(peer, server, target)
            except Unsupported as error:
                print(f"without {peer}: {error}", flush=True)
        return peers

    # Loads: each returns named figures of one run

    def pgbench(self, port, clients, flags, keep_log=True):
        prefix = f"{self.directory}/latency"
        log = ["-l", f"--log-prefix={prefix}"] if keep_log else []
        command = [f"{self.bindir}/pgbench", "-h", "127.0.0.1", "-p", str(port), "-U", ROLE, "-n", "-T",
                   str(self.args.seconds), "-c", str(clients), "-j", "1", *log, *flags, DATABASE]
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment)
        tps = re.search(r"^tps = ([\d.]+)", done.stdout, re.M)
        transactions = int((re.search(r"actually processed: (\d+)", done.stdout) or [0, 0])[1])
        if done.returncode != 0 or tps is None or transactions == 0:
            sys.exit(f"pgbench failed on port {port} (or --seconds is too short to connect {clients} clients):\n"
                     f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        latencies = []
        for path in glob.glob(prefix + ".*"):
            with open(path) as lines:
                latencies += [int(line.split()[2]) for line in lines]
            os.unlink(path)
        latencies.sort()
        return {"transactions": transactions,
                "tps": float(tps[1]),
                "ms": float(re.search(r"latency average = ([\d.]+)", done.stdout).group(1)),
                "p99 ms": latencies[int(len(latencies) * 0.99)] / 1000 if latencies else 0}

    def measured(self, process, load):
        before = process.cpu_seconds() if process else 0
        figures = load()
        used = process.cpu_seconds() - before if process else 0
        return figures, used

    def transactions(self, port, process, clients, flags):
        run, used = self.measured(process, lambda: self.pgbench(port, clients, flags))
        return {"tps": run["tps"], "ms": run["ms"], "p99 ms": run["p99 ms"],
                "CPU ms/1000tx": 1e6 * used / run["transactions"]}

    def result(self, port, process, size):
        megabytes = int(size.removesuffix("MB"))
        script = f"{self.directory}/result.sql"
        with open(script, "w") as out:
            out.write(f"SELECT repeat('x', {megabytes * 1024 * 1024});\n")
        run, used = self.measured(process, lambda: self.pgbench(port, RESULT_CLIENTS, ["-f", script]))
        moved = run["transactions"] * megabytes
        return {"MB/s": run["tps"] * megabytes, "ms": run["ms"], "p99 ms": run["p99 ms"], "CPU s/GB": used / (moved / 1024)}

    def churn(self, port, process, clients):
        run, used = self.measured(process, lambda: self.pgbench(port, clients, ["-S", "-C"]))
        return {"conn/s": run["tps"], "ms": run["ms"], "p99 ms": run["p99 ms"], "CPU ms/conn": 1e3 * used / run["transactions"]}

    def idle(self, port, process, count):
        before = process.private_kb() if process else 0
        sockets = []
        try:
            for _ in range(count):
                sockets.append(wire.connect(port, ROLE, PASSWORD, DATABASE))
                wire.query(sockets[-1], "SELECT 1")
            time.sleep(1)
            memory = process.private_kb() - before if process else 0
            _, used = self.measured(process, lambda: time.sleep(IDLE_SECONDS))
        finally:
            for sock in sockets:
                sock.close()
        # Until the server has let them go, so that the next peer finds the machine as this one did.
        time.sleep(4 + count / 1000)
        return {"kB/client": memory / count, "CPU ms/s": 1e3 * used / IDLE_SECONDS}

    def load(self, case, port, process):
        kind, amount = case.split(":")
        if kind in SELECT_ONLY:
            return self.transactions(port, process, int(amount), ["-S", "-M", kind])
        if kind == "tpcb":
            return self.transactions(port, process, int(amount), ["-M", "extended"])
        if kind == "result":
            return self.result(port, process, amount)
        return self.churn(port, process, int(amount)) if kind == "churn" else self.idle(port, process, int(amount))

    def can(self, peer, case):
        """What a peer cannot do is left out, not failed."""
        if case.startswith("prepared") and peer == "pgbouncer-tx":
            return self.pgbouncer_version >= (1, 21)
        return not (case.startswith("idle") and peer == "direct")

    def run(self):
        peers = self.start_peers()
        for case in self.args.cases:
            rows = {peer: [] for peer in peers if self.can(peer, case)}
            # Memory that a process has got once it does not ask for again, so only the first round tells.
            rounds = 1 if case.startswith("idle") else self.args.rounds
            for number in range(rounds):
                order = list(rows)
                for peer in order[number % len(order):] + order[:number % len(order)]:
                    rows[peer].append(self.load(case, *peers[peer]))
            report(case, rows)

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


def report(case, rows):
    for peer, runs in rows.items():
        bases = rows.get("pgbouncer-tx" if peer.endswith("-tx") else "pgbouncer", [])
        cells = []
        for name in runs[0]:
            value = statistics.median(run[name] for run in runs)
            ratios = [run[name] / base[name] for run, base in zip(runs, bases) if base[name]]
            ratio = f" ({statistics.median(ratios):.2f}x)" if ratios and (value or peer != "direct") else ""
            cells.append(f"{name} {value:.3g}{ratio}" if value < 1000 else f"{name} {value:.0f}{ratio}")
        print(f"{case:<13}{peer:<14}{'   '.join(f'{cell:<26}' for cell in cells)}".rstrip(), flush=True)
    print(flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5, help="length of one run")
    parser.add_argument("--scale", type=int, default=10, help="of pgbench's tables")
    parser.add_argument("--cases", default=CASES, type=lambda text: text.split(","))
    parser.add_argument("--peers", default=PEERS, type=lambda text: text.split(","))
    parser.add_argument("--binary", default="target/release/pgcutover")
    parser.add_argument("--other", help="another build of the program, measured beside it")
    parser.add_argument("--bindir", help="where PostgreSQL's programs are")
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory with the logs")
    args = parser.parse_args()
    for case in args.cases:
        kind, _, amount = case.partition(":")
        if kind not in (*SELECT_ONLY, "tpcb", "result", "churn", "idle") or not re.fullmatch(r"\d+(MB)?", amount):
            parser.error(f"no such case: {case}")
    for peer in args.peers:
        if peer not in PEERS.split(","):
            parser.error(f"no such peer: {peer}")
    if args.other:
        args.peers.append("other")
    bench = Bench(args)
    # What was started must be stopped, however this ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        bench.run()
    finally:
        bench.stop()


if __name__ == "__main__":
    main()
