#!/usr/bin/env python3
"""How much memory pgcutover needs for what it cannot apply at once; prints the peak of its resident memory.

    tests/bench/memory.py [--rows 5000000] [--stopped 300] [--value 400] [--cases CASE,CASE…] [--binary FILE]

large: one transaction of --rows rows, replayed. stalled: the backend that applies is stopped for --stopped seconds while
pgbench writes to the source, whose wal_sender_timeout is 10 s; the walsender must be the same process before and after.
stopped: the same with every process of the target; the engine cannot hold its lock then, and must take everything up again by
itself. These three must stay under 256 MB. value: one row with a value of --value MB, which has to be held whole, more than once.
Each case begins with a new daemon, and ends when the target has everything and is equal to the source.

Needs PostgreSQL's programs; everything runs on loopback in a temporary directory and is stopped at the end.
"""

import argparse
import os
import re
import signal
import sys
import time

import apply


LIMIT_MB = 256


class Memory(apply.Apply):
    """One source, one target, one daemon."""

    def peak_mb(self):
        with open(f"/proc/{self.daemon.pid}/status") as status:
            return int(re.search(r"^VmHWM:\s+(\d+) kB", status.read(), re.M)[1]) / 1024

    def finish(self, case, start, before, limit=LIMIT_MB):
        nonce = os.urandom(8).hex()
        self.sql(self.source, f"UPDATE last SET nonce = '{nonce}'", apply.DATABASE)
        session = self.session(self.ours)
        self.until_applied(session, nonce)
        session.close()
        peak = self.peak_mb()
        print(f"{case:<10}peak resident memory {peak:.0f} MB, {before:.0f} MB at the start; "
              f"{time.monotonic() - start:.0f} s in all", flush=True)
        self.stop_daemon()
        self.compare()
        if limit and peak > limit:
            sys.exit(f"that is more than {limit} MB")

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

    def value(self):
        before, start = self.start_case(), time.monotonic()
        self.sql(self.source, "INSERT INTO single SELECT nextval('ids'), 1, string_agg(md5(g::text), '') "
                 f"FROM generate_series(1, {self.args.value * 32768}) g", apply.DATABASE)
        self.finish("value", start, before, limit=None)

    def stalled(self):
        self.hold("stalled", "application_name LIKE 'pgcutover/%/apply'", lives=True)

    def stopped(self):
        self.hold("stopped", "true", lives=False)

    def hold(self, case, which, lives):
        self.sql(self.source, "ALTER SYSTEM SET wal_sender_timeout = '10s'")
        self.sql(self.source, "SELECT pg_reload_conf()")
        before, start = self.start_case(), time.monotonic()
        who = "SELECT active_pid FROM pg_replication_slots WHERE slot_name LIKE 'pgcutover%'"
        walsender = self.sql(self.source, who)
        # The session that asks has ended by then.
        pids = [int(pid) for pid in self.sql(self.ours, f"SELECT pid FROM pg_stat_activity WHERE {which} AND pid <> pg_backend_pid()").split()]
        if not pids:
            sys.exit("there is nothing to stop")
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            self.pgbench("-c", "4", "-T", str(self.args.stopped), "-R", str(self.args.rate), "-M", "prepared")
            same = self.sql(self.source, who) == walsender
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        if lives and not same:
            sys.exit("the walsender did not live through it")
        self.finish(case, start, before)

    def run(self):
        self.prepare()
        for case in self.args.cases_of_proxy:
            getattr(self, case)()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000_000)
    parser.add_argument("--stopped", type=int, default=300, help="seconds")
    parser.add_argument("--rate", type=int, default=1000, help="transactions per second written meanwhile")
    parser.add_argument("--value", type=int, default=400, help="MB")
    parser.add_argument("--scale", type=int, default=10, help="of pgbench's tables")
    parser.add_argument("--cases", default="large,stalled,stopped,value", type=lambda text: text.split(","))
    parser.add_argument("--binary", default="target/release/pgcutover")
    parser.add_argument("--bindir", help="where PostgreSQL's programs are")
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory with the logs")
    args = parser.parse_args()
    args.peers = ["pgcutover"]
    if not set(args.cases) <= {"large", "stalled", "stopped", "value"}:
        parser.error("cases are large, stalled, stopped and value")
    bench = Memory(args)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        bench.run()
    finally:
        bench.stop()


if __name__ == "__main__":
    main()
