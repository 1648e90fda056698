#!/usr/bin/env python3
"""Does what the README's "Ten minutes" says, word for word, as somebody who knows nothing else.

    tests/suites/readme.py [--dump FILE.sql[.gz]] [--binary FILE]

Its blocks of commands are run in their order, with other ports and another directory in place of those that are written
there, so that nothing on this machine is in the way; building is left out. Each terminal that it speaks of is a shell of its
own, which knows of nothing that another one has set. Beside pgbench an application of our own
writes through the proxy on one connection from step 3 to the end: numbered rows, each of which must arrive once. With --dump,
the contents of that file are moved as well. Exit status 1 where a command fails, a row is missing, or the servers differ.

Needs psql, pgbench and initdb of one PostgreSQL version, and a built pgcutover.
"""

import argparse
import glob
import gzip
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SECTION = "## Ten minutes"


def blocks():
    """Language and text of each block of the section."""
    text = open(f"{ROOT}/README.md", encoding="utf-8").read()
    section = text[text.index(SECTION):]
    section = section[: section.index("\n## ", 1)]
    return re.findall(r"^```(\w+)\n(.*?)^```$", section, re.S | re.M)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def fresh_environment():
    """What a terminal starts with: a PATH on which there is no pgcutover, and nothing that configures one or a client."""
    path = [folder for folder in os.environ["PATH"].split(":") if not os.path.exists(f"{folder}/pgcutover")]
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG", "LC_ALL", "TERM", "USER", "LOGNAME")}
    return {**kept, "PATH": ":".join(path)}


class Shell:
    """A bash whose directory and variables stay from one block to the next."""

    def __init__(self, directory):
        begun = ["bash", "--noprofile", "--norc"]
        self.process = subprocess.Popen(begun, cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=fresh_environment())

    def run(self, text):
        """Runs the commands one after another and stops at the first that fails; returns what they print."""
        mark = f"done-{os.urandom(8).hex()}"
        # In the same shell, so that `cd` and `export` last; -e would end it without a word.
        guarded = f"trap 'echo {mark} $?; exit' ERR; set -E\n{text}\ntrap - ERR; echo {mark} 0\n"
        self.process.stdin.write(guarded)
        self.process.stdin.flush()
        said = []
        for line in self.process.stdout:
            if line.startswith(mark):
                if line.split()[1] != "0":
                    sys.exit(f"readme: this failed:\n{text}\n{''.join(said)}")
                return "".join(said)
            said.append(line)
        sys.exit(f"readme: the shell ended in:\n{text}\n{''.join(said)}")

    def variable(self, name):
        return self.run(f"echo ${name}").strip()


class Application:
    """Writes numbered rows on one connection, and remembers which were acknowledged."""

    def __init__(self, port, path):
        self.acknowledged, self.number, self.stopping = [], 0, False
        command = ["psql", "-X", "-h", "127.0.0.1", "-p", port, "-U", "postgres", "-At", "-q", "-v", "ON_ERROR_STOP=1", "bench"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PATH": path})
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def work(self):
        while not self.stopping:
            self.number += 1
            try:
                self.process.stdin.write(f"INSERT INTO note VALUES ({self.number}) RETURNING id;\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
            except OSError:
                return
            if not line:
                return
            self.acknowledged.append(int(line))
            time.sleep(0.01)

    def stop(self):
        self.stopping = True
        self.thread.join()
        _, errors = self.process.communicate()
        if self.process.returncode or errors:
            sys.exit(f"readme: the application had an error: {errors}")


def as_ordinary_user():
    """PostgreSQL refuses root: everything is done by the user postgres, from copies that it can read."""
    if os.geteuid() != 0:
        return
    place = tempfile.mkdtemp(prefix="pgcutover-readme-")
    try:
        arguments = sys.argv[1:]
        for name in ("tests/suites/readme.py", "README.md"):
            os.makedirs(os.path.dirname(f"{place}/{name}"), exist_ok=True)
            shutil.copy(f"{ROOT}/{name}", f"{place}/{name}")
        shutil.copy(binary(arguments), f"{place}/pgcutover")
        if "--dump" in arguments:
            at = arguments.index("--dump") + 1
            shutil.copy(arguments[at], place)
            arguments[at] = f"{place}/{os.path.basename(arguments[at])}"
        subprocess.run(["chown", "-R", "postgres", place], check=True)
        # This one may be in a home directory that is closed to others.
        python = shutil.which("python3", path="/usr/local/bin:/usr/bin:/bin") or sys.executable
        command = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups", "env", "HOME=/tmp", python]
        # Later wins: the binary is the copy.
        sys.exit(subprocess.run([*command, f"{place}/tests/suites/readme.py", *arguments, "--binary", f"{place}/pgcutover"], cwd=place).returncode)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def binary(arguments):
    if "--binary" in arguments:
        return arguments[arguments.index("--binary") + 1]
    for profile in ("release", "debug"):
        if os.access(f"{ROOT}/target/{profile}/pgcutover", os.X_OK):
            return f"{ROOT}/target/{profile}/pgcutover"
    sys.exit("readme: build pgcutover first: cargo build --release --locked")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dump", help="SQL to load into the database of server A beside what the README makes there")
    parser.add_argument("--binary", help="pgcutover (default: target/release, else target/debug)")
    options = parser.parse_args()
    as_ordinary_user()

    began = time.monotonic()
    place = tempfile.mkdtemp(prefix="pgcutover-readme-")
    # What the build leaves behind.
    clone = f"{place}/clone"
    os.makedirs(f"{clone}/target/release")
    os.symlink(os.path.abspath(options.binary or binary([])), f"{clone}/target/release/pgcutover")
    elsewhere = {"/tmp/try": f"{place}/try", **{port: free_port() for port in ("5511", "5512", "6432", "8432")}}

    def here(text):
        for written, used in elsewhere.items():
            text = text.replace(written, used)
        return text

    taken = iter([(language, here(text)) for language, text in blocks()])

    def block(what, language="sh"):
        found, text = next(taken)
        assert found == language and what in text, f"the README's next block is not the one with {what}:\n{text}"
        return text

    shell = Shell(clone)
    daemon = application = pgbench = None
    try:
        build, prepare = block("cargo build").split("\n", 1)
        assert build.startswith("cargo build"), f"the first line does not build: {build}"
        shell.run(prepare)
        shell.run(block("initdb"))
        path, port_of_a = shell.variable("PATH"), elsewhere["5511"]
        client = f"psql -X -q -v ON_ERROR_STOP=1 -h 127.0.0.1 -U postgres bench -p"
        if options.dump:
            reader = gzip.open if options.dump.endswith(".gz") else open
            with reader(options.dump, "rt", encoding="utf-8") as dump:
                loaded = subprocess.run(client.split() + [port_of_a], input=dump.read(), capture_output=True, text=True, env={**os.environ, "PATH": path})
            if loaded.returncode:
                sys.exit(f"readme: {options.dump} cannot be loaded: {loaded.stderr}")
        shell.run(f"{client} {port_of_a} -c 'CREATE TABLE public.note (id int PRIMARY KEY)'")
        with open(f"{place}/try/pgcutover.toml", "w", encoding="utf-8") as config:
            config.write(block("[listen]", "toml"))
        check, run = block("pgcutover check").strip().splitlines()
        print(shell.run(check))
        with open(f"{place}/daemon.log", "w", encoding="utf-8") as log:
            # The first terminal is taken from now on.
            there, path = shell.run("pwd").strip(), shell.variable("PATH")
            daemon = subprocess.Popen(["bash", "-c", f"exec {run}"], cwd=there, stdout=log, stderr=log, env={**fresh_environment(), "PATH": path})
        opening = block("terminal")

        def terminal():
            opened = Shell("/")
            assert not opened.run("command -v pgcutover || true"), "a new terminal knows pgcutover already"
            opened.run(opening)
            return opened

        shell = terminal()
        shell.run(f"until pg_isready -q -h 127.0.0.1 -p {elsewhere['6432']}; do sleep 0.1; done")
        application = Application(elsewhere["6432"], path)
        with open(f"{place}/pgbench.log", "w", encoding="utf-8") as log:
            # The second terminal: pgbench stays in its foreground.
            pgbench = subprocess.Popen(["bash", "-c", f"exec {block('pgbench')}"], stdout=log, stderr=log, env={**fresh_environment(), "PATH": shell.variable("PATH")})
        shell = terminal()
        print(shell.run(block("migration create")))
        print(shell.run(block("migration cutover move --dry-run")))
        said = shell.run(block("SHOW port"))
        assert elsewhere["5512"] in said, f"the application is not on B:\n{said}"
        finish = block("migration rollback")
        compare = block("pg_dump")
        before, complete = finish.split("pgcutover migration complete move")
        print(shell.run(before))
        # "Stop the application, wait until A is no bytes behind, complete".
        application.stop()
        pgbench.send_signal(signal.SIGINT)
        pgbench.wait()
        shell.run("until pgcutover migration show move --output json | grep -q '\"latency_bytes\": 0,'; do sleep 0.2; done")
        print(shell.run("pgcutover migration complete move" + complete))
        said = shell.run(compare)
        assert "equal" in said, f"A and B differ:\n{said[-4000:]}"
        rows = shell.run(f"{client} {elsewhere['5512']} -At -c 'SELECT id FROM public.note ORDER BY id'").split()
        assert [int(row) for row in rows] == application.acknowledged, "B has other rows than the application was told of"
        errors = [line for line in open(f"{place}/pgbench.log", encoding="utf-8") if "error" in line.lower() or "aborted" in line]
        assert not errors, f"pgbench had errors: {errors}"
        shell.run("pgcutover shutdown")
        daemon.wait(30)
        print(f"readme: every command worked; {len(rows)} rows of an application that never reconnected; A and B equal; {time.monotonic() - began:.0f} s")
    except AssertionError as error:
        sys.exit(f"readme: {error}")
    finally:
        if application and application.process.poll() is None:
            application.stopping = True
            application.process.kill()
        for process in (pgbench, daemon):
            if process and process.poll() is None:
                process.kill()
        for server in glob.glob(f"{place}/try/[AB]/postmaster.pid"):
            os.kill(int(open(server, encoding="utf-8").readline()), signal.SIGQUIT)
        time.sleep(0.5)
        if sys.exc_info()[0] and os.path.exists(f"{place}/daemon.log"):
            print(open(f"{place}/daemon.log", encoding="utf-8").read()[-4000:], file=sys.stderr)
        shutil.rmtree(place, ignore_errors=True)


main()
