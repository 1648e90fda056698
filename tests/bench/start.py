#!/usr/bin/env python3
"""How large the program is, and how long it takes from its start until it serves.

    tests/bench/start.py [--rounds 20] [--binary target/release/pgcutover]

Two servers are started in a temporary directory. Each round starts the program in front of them, waits until /readyz answers 200,
which it does when the program knows the active server and lets clients in, and stops it. Printed are the sizes of the file as it
is and without what debuggers read, and the median, the smallest and the largest time. Memory is what the process has then.
"""

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request

import proxy


def ready(port):
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).status == 200
    except OSError:
        return False


def measure(bench, binary, rounds):
    listen, admin = proxy.free_port(), proxy.free_port()
    config = f"{bench.directory}/pgcutover.toml"
    servers = [bench.start_server(name) for name in ("source", "target")]
    with open(config, "w", encoding="utf-8") as out:
        out.write(f'[listen]\naddress = "127.0.0.1:{listen}"\n[admin]\naddress = "127.0.0.1:{admin}"\n')
        for name, port in zip(("source", "target"), servers):
            out.write(f'[{name}]\nhost = "127.0.0.1"\nport = {port}\nuser = "postgres"\n')
    times, memory = [], []
    for _ in range(rounds):
        began = time.perf_counter()
        process = subprocess.Popen([binary, "run", "-c", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not ready(admin):
            if process.poll() is not None:
                sys.exit("it has ended: run it by hand to see why")
            time.sleep(0.001)
        times.append((time.perf_counter() - began) * 1000)
        with open(f"/proc/{process.pid}/status", encoding="utf-8") as status:
            memory += [int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS")]
        process.send_signal(signal.SIGTERM)
        process.wait()
    return times, memory


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--binary", default="target/release/pgcutover")
    parser.add_argument("--bindir", help="where PostgreSQL's programs are")
    args = parser.parse_args()
    args.cases, args.keep, args.verbose = [], False, False
    binary = os.path.abspath(args.binary)
    with tempfile.TemporaryDirectory() as place:
        bare = shutil.copy(binary, f"{place}/pgcutover")
        subprocess.run(["strip", bare], check=True)
        sizes = [os.path.getsize(path) / 2**20 for path in (binary, bare)]
    bench = proxy.Bench(args)
    try:
        times, memory = measure(bench, binary, args.rounds)
    finally:
        bench.stop()
    print(f"size: {sizes[0]:.1f} MB, stripped {sizes[1]:.1f} MB")
    print(f"start to ready: median {statistics.median(times):.0f} ms ({min(times):.0f} to {max(times):.0f}, {len(times)} starts)")
    print(f"resident then: {statistics.median(memory):.0f} MB")


if __name__ == "__main__":
    main()
