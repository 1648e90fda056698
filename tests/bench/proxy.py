#!/usr/bin/env python3
"""Runs the same load direct, through HAProxy, through PgBouncer and through pgcutover, interleaved, and prints ratios.

    tests/bench/proxy.py [--rounds 5] [--seconds 5] [--clients 1,16,64] [--modes prepared,extended,simple,tpcb]
                         [--peers direct,haproxy,pgbouncer,pgcutover] [--binary target/release/pgcutover]

Needs PostgreSQL (pgbench among it), and whichever of haproxy and pgbouncer are to be compared. Everything runs on
loopback in a temporary directory and is stopped at the end. CPU is the proxy process's own user and system time,
read from /proc before and after each run: the most robust of the figures on a noisy machine.
"""

import argparse
import glob
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

TICKS = os.sysconf("SC_CLK_TCK")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident_kb(pid):
    with open(f"/proc/{pid}/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read()).group(1))


def wait_port(port, process, name):
    for _ in range(200):
        if process.poll() is not None:
            sys.exit(f"{name} ended at once; see its log in the temporary directory")
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return
        except OSError:
            time.sleep(0.05)
    sys.exit(f"{name} does not listen on port {port}")


class Bench:
    def __init__(self, args):
        self.args = args
        self.directory = tempfile.mkdtemp(prefix="pgcutover-bench-")
        os.chmod(self.directory, 0o755)
        self.processes = []
        self.bindir = args.bindir or sorted(glob.glob("/usr/lib/postgresql/*/bin"))[-1]
        self.as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []

    def start(self, name, command, port):
        log = open(f"{self.directory}/{name}.log", "w")
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=self.directory)
        self.processes.append(process)
        wait_port(port, process, name)
        return process.pid

    def start_server(self, name):
        data = f"{self.directory}/{name}"
        os.mkdir(data)
        if self.as_user:
            shutil.chown(data, "postgres", "postgres")
        subprocess.run(self.as_user + [f"{self.bindir}/initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8",
                                       "--locale=C"], check=True, stdout=subprocess.DEVNULL, cwd="/")
        port = free_port()
        self.start(name, self.as_user + [f"{self.bindir}/postgres", "-D", data, "-p", str(port), "-k", data, "-c",
                                         "listen_addresses=127.0.0.1", "-c", "max_connections=300", "-c", "fsync=off",
                                         "-c", "shared_buffers=256MB", "-c", "wal_level=logical"], port)
        return port

    def start_haproxy(self, server):
        port = free_port()
        config = f"{self.directory}/haproxy.cfg"
        with open(config, "w") as out:
            out.write(f"global\n maxconn 2000\n nbthread 2\ndefaults\n mode tcp\n timeout connect 5s\n timeout client 1h\n"
                      f" timeout server 1h\nlisten pg\n bind 127.0.0.1:{port}\n server s 127.0.0.1:{server}\n")
        return port, self.start("haproxy", ["haproxy", "-db", "-f", config], port)

    def start_pgbouncer(self, server):
        port = free_port()
        config = f"{self.directory}/pgbouncer.ini"
        with open(config, "w") as out:
            out.write(f"[databases]\n* = host=127.0.0.1 port={server}\n[pgbouncer]\nlisten_addr=127.0.0.1\n"
                      f"listen_port={port}\nauth_type=any\npool_mode=session\nmax_client_conn=2000\n"
                      f"default_pool_size=200\nserver_reset_query=\nignore_startup_parameters=extra_float_digits\n"
                      f"unix_socket_dir=\n")
            out.write("[databases]\npostgres = host=127.0.0.1 port=%d user=postgres\n" % server)
        command = ["pgbouncer", config]
        if os.getuid() == 0:
            command = self.as_user + command
        return port, self.start("pgbouncer", command, port)

    def start_pgcutover(self, server, other):
        port = free_port()
        config = f"{self.directory}/pgcutover.toml"
        with open(config, "w") as out:
            out.write(f'[listen]\naddress = "127.0.0.1:{port}"\n[auth]\nmethod = "trust"\n'
                      f'[admin]\naddress = "127.0.0.1:{free_port()}"\nusers = ["postgres"]\n'
                      f'[source]\nhost = "127.0.0.1"\nport = {server}\nuser = "postgres"\nsslmode = "disable"\n'
                      f'[target]\nhost = "127.0.0.1"\nport = {other}\nuser = "postgres"\nsslmode = "disable"\n')
        return port, self.start("pgcutover", [os.path.abspath(self.args.binary), "run", "-c", config], port)

    def pgbench(self, port, mode, clients):
        flags = {"prepared": ["-S", "-M", "prepared"], "extended": ["-S", "-M", "extended"],
                 "simple": ["-S", "-M", "simple"], "tpcb": ["-M", "extended"]}[mode]
        command = [f"{self.bindir}/pgbench", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "-n", "-T",
                   str(self.args.seconds), "-c", str(clients), "-j", "1", *flags, "postgres"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0 or "number of failed transactions: 0" not in done.stdout:
            sys.exit(f"pgbench failed on port {port}:\n{done.stdout}{done.stderr}")
        transactions = int(re.search(r"actually processed: (\d+)", done.stdout).group(1))
        tps = float(re.search(r"tps = ([\d.]+)", done.stdout).group(1))
        latency = float(re.search(r"latency average = ([\d.]+)", done.stdout).group(1))
        return transactions, tps, latency

    def run(self):
        server = self.start_server("source")
        subprocess.run([f"{self.bindir}/pgbench", "-h", "127.0.0.1", "-p", str(server), "-U", "postgres", "-i", "-q", "-s",
                        "10", "postgres"], check=True, stderr=subprocess.DEVNULL)
        peers = {}
        for peer in self.args.peers.split(","):
            if peer == "direct":
                peers[peer] = (server, None)
            elif peer == "haproxy":
                peers[peer] = self.start_haproxy(server)
            elif peer == "pgbouncer":
                peers[peer] = self.start_pgbouncer(server)
            elif peer == "pgcutover":
                peers[peer] = self.start_pgcutover(server, self.start_server("target"))
        print(f"{'load':<14}{'peer':<11}{'tps':>9}{'ms':>9}{'CPU us/tx':>11}{'RSS MB':>8}   ratio to pgbouncer: tps, CPU")
        for mode in self.args.modes.split(","):
            for clients in map(int, self.args.clients.split(",")):
                rows = {peer: [] for peer in peers}
                for round_ in range(self.args.rounds):
                    order = list(peers)
                    order = order[round_ % len(order):] + order[:round_ % len(order)]
                    for peer in order:
                        port, pid = peers[peer]
                        before = cpu_seconds(pid) if pid else 0
                        transactions, tps, latency = self.pgbench(port, mode, clients)
                        used = (cpu_seconds(pid) - before) if pid else 0
                        rows[peer].append((tps, latency, 1e6 * used / transactions))
                self.report(mode, clients, peers, rows)

    @staticmethod
    def report(mode, clients, peers, rows):
        median = {peer: [statistics.median(column) for column in zip(*values)] for peer, values in rows.items()}
        base = median.get("pgbouncer")
        for peer, (tps, latency, cpu) in median.items():
            memory = resident_kb(peers[peer][1]) / 1024 if peers[peer][1] else 0
            ratio = f"   {tps / base[0]:.2f}  {cpu / base[2]:.2f}" if base and base[2] else ""
            print(f"{mode + ' ' + str(clients):<14}{peer:<11}{tps:>9.0f}{latency:>9.3f}{cpu:>11.1f}{memory:>8.1f}{ratio}", flush=True)

    def stop(self):
        for process in reversed(self.processes):
            process.send_signal(signal.SIGINT)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
        if not self.args.keep:
            shutil.rmtree(self.directory, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=5)
    parser.add_argument("--clients", default="16,64")
    parser.add_argument("--modes", default="prepared,extended,simple,tpcb")
    parser.add_argument("--peers", default="direct,haproxy,pgbouncer,pgcutover")
    parser.add_argument("--binary", default="target/release/pgcutover")
    parser.add_argument("--bindir")
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory with the logs")
    bench = Bench(parser.parse_args())
    try:
        bench.run()
    finally:
        bench.stop()


if __name__ == "__main__":
    main()
