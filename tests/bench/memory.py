#!/usr/bin/env python3
"""How much memory pgcutover needs for what it cannot apply at once; prints the peak of its resident memory.

    tests/bench/memory.py [--rows 5000000] [--stopped 300] [--cases large,stopped] [--binary FILE]

large: one transaction of --rows rows, replayed. stopped: every process of the target is stopped for --stopped seconds while
pgbench writes to the source, whose wal_sender_timeout is 10 s; the walsender must be the same process before and after.
Each case begins with a new daemon, and ends when the target has everything and is equal to the source.

Needs PostgreSQL's programs; everything runs on loopback in a temporary directory and is stopped at the end.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time

import apply


class Memory(apply.Apply):
    """One source, one target, one daemon."""

    def peak_mb(self):
        with open(f"/proc/{self.daemon.pid}/status") as status:
            return int(re.search(r"^VmHWM:\s+(\d+) kB", status.read(), re.M)[1]) / 1024

    def finish(self, case, start, before):
        nonce = os.urandom(8).hex()
        self.sql(self.source, f"UPDATE last SET nonce = '{nonce}'", apply.DATABASE)
        session = self.session(self.ours)
        self.until_applied(session, nonce)
        session.close()
        print(f"{case:<10}peak resident memory {self.peak_mb():.0f} MB, {before:.0f} MB at the start; "
              f"{time.monotonic() - start:.0f} s in all", flush=True)
        self.stop_daemon()
        self.compare()

    def start_case(self):
        self.daemon = self.run_daemon()
        session = self.session(self.source)
        self.until_active(session, "slot_name LIKE 'pgcutover%'")
        session.close()
        return self.peak_mb()

    def large(self):
        before, start = self.start_case(), time.monotonic()
        self.sql(self.source, "INSERT INTO single SELECT nextval('ids'), g, 'a note of some length, number ' || g "
                 f"FROM generate_series(1, {self.args.rows}) g", apply.DATABASE)
        self.finish("large", start, before)

    def target_processes(self):
        pid = self.trees["target-pgcutover"].pid
        with open(f"/proc/{pid}/task/{pid}/children") as children:
            return [int(child) for child in children.read().split()]

    def stopped(self):
        self.sql(self.source, "ALTER SYSTEM SET wal_sender_timeout = '10s'")
        self.sql(self.source, "SELECT pg_reload_conf()")
        before, start = self.start_case(), time.monotonic()
        who = "SELECT active_pid FROM pg_replication_slots WHERE slot_name LIKE 'pgcutover%'"
        walsender = self.sql(self.source, who)
        processes = self.target_processes()
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        try:
            subprocess.run([f"{self.bindir}/pgbench", "-h", "127.0.0.1", "-p", str(self.source), "-U", "postgres", "-n", "-c", "4",
                            "-T", str(self.args.stopped), "-M", "prepared", apply.DATABASE], check=True,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=self.environment)
            same = self.sql(self.source, who) == walsender
        finally:
            for pid in processes:
                os.kill(pid, signal.SIGCONT)
        if not same:
            sys.exit("the walsender did not live through it")
        self.finish("stopped", start, before)

    def run(self):
        self.prepare()
        for case in self.args.cases_of_proxy:
            getattr(self, case)()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--stopped", type=int, default=300, help="seconds")
    parser.add_argument("--scale", type=int, default=10, help="of pgbench's tables")
    parser.add_argument("--cases", default="large,stopped", type=lambda text: text.split(","))
    parser.add_argument("--binary", default="target/release/pgcutover")
    parser.add_argument("--bindir", help="where PostgreSQL's programs are")
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory with the logs")
    args = parser.parse_args()
    args.peers = ["pgcutover"]
    if not set(args.cases) <= {"large", "stopped"}:
        parser.error("cases are large and stopped")
    bench = Memory(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        bench.run()
    finally:
        bench.stop()


if __name__ == "__main__":
    main()
