#!/usr/bin/env python3
"""What a verification costs: how long it takes beside the copy, and what it takes from pgbench on the source; interleaved.

    tests/bench/verify.py [--rounds 5] [--seconds 10] [--scale 135] [--clients 2] [--rate TPS] [--load PERCENT] [--busy PERCENT] [--apart]
                          [--binary FILE]

pgbench's tables of the given scale (135: 2 GB) are migrated: the time from the first row to the last is the copy's. Then the
database is verified with nobody at work on it, as pgcutover does by default: that is set against the copy.

Then come rounds of pgbench's own transaction on the source, each once alone and once while a verification runs; the order
changes from round to round. Without --rate pgbench does what it can. Printed are medians of transactions a second and of their
latency, with the ratio.

With --apart the source and pgbench have the first half of the machine's cores and the target and pgcutover have the rest, as on
two machines. Needs PostgreSQL's programs. Everything runs on loopback in a temporary directory and is stopped at the end.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time

import apply
import proxy

DATABASE = apply.DATABASE


class Verify(apply.Apply):
    """Apply's servers and daemon, with a target that a migration has just filled."""

    def __init__(self, args):
        args.cases, args.peers = [], ["pgcutover"]
        super().__init__(args)
        cores = sorted(os.sched_getaffinity(0))
        half = max(1, len(cores) // 2)
        self.cores = {"source": cores[:half], "target": cores[half:] or cores} if args.apart else {}

    def start(self, name, command, port):
        cores = self.cores.get(name.split("-")[0])
        return super().start(name, (["taskset", "-c", ",".join(map(str, cores))] if cores else []) + command, port)

    def run_daemon(self):
        daemon = super().run_daemon()
        if self.cores:
            for thread in os.listdir(f"/proc/{daemon.pid}/task"):
                os.sched_setaffinity(int(thread), self.cores["target"])
        return daemon

    def prepare_pgcutover(self):
        started = time.monotonic()
        super().prepare_pgcutover()
        self.migrated = time.monotonic() - started
        with open(self.configuration) as text:
            self.plain = text.read()

    def again(self, load):
        """The daemon once more, with this load."""
        with open(self.configuration, "w") as out:
            out.write(self.plain + f"[migration]\nverify_load = {load}\nverify_load_busy = {self.args.busy}\n")
        self.daemon = self.run_daemon()
        deadline = time.monotonic() + 60
        while self.pgcutover("show", "bench").get("substate") != "WaitingForCutoverTrigger":
            if time.monotonic() > deadline:
                sys.exit("the migration is not ready again")
            time.sleep(0.1)

    def command(self, *words):
        return [self.binary, "migration", *words, "-c", self.configuration, "--output", "json"]

    def pgcutover(self, *words):
        done = subprocess.run(self.command(*words), capture_output=True, text=True)
        return json.loads(done.stdout) if done.stdout.startswith("{") else {}

    def verify(self):
        began = time.monotonic()
        report = self.pgcutover("verify", "bench")
        if report.get("differences") != 0:
            sys.exit(f"the verification found {report}")
        return time.monotonic() - began

    def copied(self):
        """Seconds from the first table's snapshot to the last row, from the log."""
        def at(line):
            clock = re.match(r"\S*T(\d+):(\d+):([\d.]+)Z", line).groups()
            return int(clock[0]) * 3600 + int(clock[1]) * 60 + float(clock[2])

        # What is written for people has colours.
        with open(f"{self.directory}/pgcutover.log") as log:
            lines = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in log]
        begun = [at(line) for line in lines if ": copying" in line]
        ended = [at(line) for line in lines if "rows copied" in line]
        return (max(ended) - min(begun)) if begun and ended else None

    def tpcb(self):
        flags = ["--rate", str(self.args.rate)] if self.args.rate else []
        command = [f"{self.bindir}/pgbench", "-h", "127.0.0.1", "-p", str(self.source), "-U", "postgres", "-n", "-M", "prepared",
                   "-c", str(self.args.clients), "-j", "1", "-T", str(self.args.seconds), *flags, DATABASE]
        cores = self.cores.get("source")
        if cores:
            command = ["taskset", "-c", ",".join(map(str, cores)), *command]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=self.environment)
        figure = lambda pattern: float(re.search(pattern, done.stdout, re.M).group(1))
        return {"tps": figure(r"^tps = ([\d.]+)"), "ms": figure(r"^latency average = ([\d.]+)")}

    def beside(self):
        """pgbench while a verification runs from its first second to its last."""
        verification = subprocess.Popen(self.command("verify", "bench"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(1)
        figures = self.tpcb()
        if verification.poll() is not None:
            print("  the verification ended before pgbench did: take a larger --scale or fewer --seconds", flush=True)
        # Ordered work goes on without its caller; the daemon's end ends it, and what was compared stays compared.
        self.stop_daemon()
        verification.wait(30)
        self.sql(self.ours, "DELETE FROM pgcutover.verification; UPDATE pgcutover.verification_run SET complete = true")
        self.again(self.args.load)
        return figures

    def run(self):
        self.prepare()
        size = int(self.sql(self.source, "SELECT sum(pg_table_size(oid)) FROM pg_class WHERE relname LIKE 'pgbench_%' AND relkind = 'r'", DATABASE))
        copied = self.copied()
        print(f"{size / 2**30:.2f} GB; copied in {copied:.1f} s, migrated in {self.migrated:.1f} s (indexes and start included)", flush=True)
        for load in [self.args.load]:
            self.again(load)
            seconds = self.verify()
            print(f"verified at load {load} % in {seconds:.1f} s: {seconds / copied:.2f} of the copy", flush=True)
            self.stop_daemon()
        self.again(self.args.load)
        rounds = {"alone": [], "beside": []}
        for number in range(self.args.rounds):
            order = [("alone", self.tpcb), ("beside", self.beside)]
            for name, measure in order if number % 2 == 0 else reversed(order):
                rounds[name].append(measure())
                figures = rounds[name][-1]
                print(f"  {name:<8}{figures['tps']:9.0f} tps {figures['ms']:8.3f} ms", flush=True)
        if self.args.rounds == 0:
            return
        medians = {name: {key: statistics.median(run[key] for run in runs) for key in ("tps", "ms")} for name, runs in rounds.items()}
        for key, better in (("tps", "of the transactions"), ("ms", "of the latency")):
            alone, beside = medians["alone"][key], medians["beside"][key]
            print(f"pgbench alone {alone:.3f} {key}, beside a verification {beside:.3f} {key}: "
                  f"{beside / alone:.3f} {better}", flush=True)
        self.stop_daemon()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=10, help="of pgbench in each round")
    parser.add_argument("--scale", type=int, default=135, help="of pgbench's tables")
    parser.add_argument("--clients", type=int, default=2)
    parser.add_argument("--rate", type=int, help="transactions a second that pgbench asks for")
    parser.add_argument("--load", type=int, default=100, help="verify_load, in percent")
    parser.add_argument("--busy", type=int, default=3, help="verify_load_busy, in percent")
    parser.add_argument("--apart", action="store_true", help="give each side half of the cores")
    parser.add_argument("--binary", default="target/release/pgcutover")
    parser.add_argument("--bindir", help="where PostgreSQL's programs are")
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory with the logs")
    args = parser.parse_args()
    bench = Verify(args)
    # What was started must be stopped, however this ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        bench.run()
    finally:
        bench.stop()


if __name__ == "__main__":
    main()
