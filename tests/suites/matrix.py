#!/usr/bin/env python3
"""Moves a database with one of every kind of object from every older PostgreSQL to the newest one, and compares.

    tests/suites/matrix.py [--sources 10,14,…] [--bindirs DIR:DIR…] [--binary FILE]

For each source: the objects of tests/support/objects.sql and a table that is written to while the migration runs; then the
migration, the cutover, and a comparison of both servers: definitions, every table's rows, every sequence. Exit status 1 where
one differs.

Majors print the same definitions differently. What the target has is therefore compared with what the newest server has after
the source's own dump was restored there with psql. Set apart is REPLICA IDENTITY FULL, which the migration gives to tables that
have no key.

Needs the servers to compare (PGCUTOVER_PG_BINDIRS or --bindirs, Debian's packages, target/servers), with pg_dump and psql of
the newest.
"""

import argparse
import contextlib
import difflib
import glob
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DATABASE = "things"
# Written to while it is moved.
BUSY = "CREATE TABLE public.busy (id serial PRIMARY KEY, v text); INSERT INTO public.busy (v) SELECT 'v' || g FROM generate_series(1, 5000) g"
WRITE = """INSERT INTO public.busy (v) SELECT 'new' FROM generate_series(1, 20);
UPDATE public.busy SET v = v || '+' WHERE id % 97 = 0; DELETE FROM public.busy WHERE id % 89 = 5;"""
TABLES = """SELECT format('%I.%I', n.nspname, c.relname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind IN ('r', 'm') AND c.relpersistence <> 't' AND c.relispopulated AND n.nspname NOT IN ('information_schema', 'pgcutover')
      AND n.nspname !~ '^pg_' ORDER BY 1"""
COLUMNS = """SELECT format('%I.%I', n.nspname, c.relname) || E'\t' || string_agg('t.' || quote_ident(a.attname), ', ' ORDER BY a.attname::text COLLATE "C")
    FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_attribute a ON a.attrelid = c.oid
    WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'm') AND n.nspname !~ '^pg_' GROUP BY n.nspname, c.relname"""
SEQUENCES = TABLES.replace("IN ('r', 'm')", "= 'S'").replace("AND c.relispopulated ", "")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def installations(bindirs):
    """Directory of the programs, by major; one with client programs is preferred."""
    places = (bindirs or os.environ.get("PGCUTOVER_PG_BINDIRS", "")).split(":")
    places += glob.glob("/usr/lib/postgresql/*/bin") + glob.glob("/usr/pgsql-*/bin") + glob.glob(f"{ROOT}/target/servers/*/bin")
    found = {}
    for place in places:
        if os.access(f"{place}/postgres", os.X_OK) and os.access(f"{place}/initdb", os.X_OK):
            version = subprocess.run([f"{place}/postgres", "--version"], capture_output=True, text=True).stdout
            major = int(re.search(r"\) (\d+)", version).group(1))
            if major not in found or not os.access(f"{found[major]}/pg_dump", os.X_OK):
                found[major] = os.path.realpath(place)
    return found


class Server:
    def __init__(self, directory, name, bindir, major, suite):
        self.suite, self.bindir, self.major, self.port = suite, bindir, major, free_port()
        self.data = f"{directory}/{name}"
        os.mkdir(self.data)
        if suite.as_user:
            shutil.chown(self.data, "postgres", "postgres")
        suite.run(suite.as_user + [f"{bindir}/initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "-N"])
        options = f"-p {self.port} -k {self.data} -c listen_addresses=127.0.0.1 -c fsync=off -c wal_level=logical"
        suite.run(suite.as_user + [f"{bindir}/pg_ctl", "-D", self.data, "-w", "-s", "-l", f"{self.data}/log", "-o", options, "start"])

    def sql(self, text, database=None, check=True):
        return self.suite.run([f"{self.suite.tools}/psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", self.port, "-U",
                               "postgres", database or DATABASE], stdin=text, check=check)

    def stop(self):
        self.suite.run(self.suite.as_user + [f"{self.bindir}/pg_ctl", "-D", self.data, "-m", "immediate", "-s", "stop"], check=False)


class Suite:
    def __init__(self, args):
        self.args = args
        self.found = installations(args.bindirs)
        self.newest = max(self.found, default=0)
        self.tools = self.found.get(self.newest, "")
        if not all(os.access(f"{self.tools}/{program}", os.X_OK) for program in ("pg_dump", "psql")):
            sys.exit(f"matrix: no pg_dump and psql beside the newest server ({self.newest} in {self.tools or 'no directory'})")
        self.as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []
        self.directory = tempfile.mkdtemp(prefix="pgcutover-matrix-")
        os.chmod(self.directory, 0o755)
        # Programs that were unpacked somewhere find their own libraries.
        self.environment = dict(os.environ, PGOPTIONS="-c client_min_messages=warning")

    def run(self, command, stdin=None, check=True):
        # Not a pipe for the server's own output: it would never end.
        out = subprocess.DEVNULL if any(str(word).endswith("/pg_ctl") for word in command) else subprocess.PIPE
        done = subprocess.run(list(map(str, command)), input=stdin, stdout=out, stderr=out, text=True, cwd="/", env=self.environment)
        if check and done.returncode != 0:
            raise RuntimeError(f"{' '.join(map(str, command))[:300]}:\n{(done.stderr or '')[-1500:]}")
        return (done.stdout or "").strip()

    def dump(self, server, database=None):
        return self.run([f"{self.tools}/pg_dump", "-s", "--no-publications", "--no-subscriptions", "-N", "pgcutover", "-h", "127.0.0.1",
                         "-p", server.port, "-U", "postgres", database or DATABASE])

    def definitions(self, server, database=None):
        text = self.dump(server, database)
        return [line for line in text.splitlines() if line and not line.startswith(("--", "\\restrict", "\\unrestrict"))]

    def rows(self, server):
        """A digest of each table and the place of each sequence."""
        found = {}
        # Columns by name: pg_dump puts those that a child has from its parents in the parents' order.
        columns = dict(line.split("\t") for line in server.sql(COLUMNS).splitlines())
        for table in server.sql(TABLES).splitlines():
            found[table] = server.sql(f"SET extra_float_digits = 0; SELECT count(*), md5(string_agg(t::text, E'\\n' ORDER BY t::text COLLATE \"C\"))"
                                      f" FROM (SELECT ROW({columns.get(table, '')}) AS t FROM ONLY {table} t) t")
        for sequence in server.sql(SEQUENCES).splitlines():
            found[sequence] = server.sql(f"SELECT last_value, is_called FROM {sequence}")
        found["large objects"] = server.sql("SELECT count(*), md5(string_agg(m.oid || md5(lo_get(m.oid)), ',' ORDER BY m.oid))"
                                            " FROM pg_largeobject_metadata m")
        return found

    @contextlib.contextmanager
    def daemon(self, directory, source, target):
        """pgcutover in front of the two, as long as the block runs: the command line as a function."""
        config = f"{directory}/pgcutover.toml"
        with open(config, "w") as out:
            out.write(f'[listen]\naddress = "127.0.0.1:{free_port()}"\n[admin]\naddress = "127.0.0.1:{free_port()}"\nusers = ["postgres"]\n'
                      f'[auth]\nmethod = "trust"\n[migration]\nbindir = "{self.tools}"\n'
                      + "".join(f'[{name}]\nhost = "127.0.0.1"\nport = {server.port}\nuser = "postgres"\nsslmode = "disable"\n'
                                for name, server in (("source", source), ("target", target))))
        binary = os.path.abspath(self.args.binary)
        with open(f"{directory}/log", "w") as log:
            process = subprocess.Popen([binary, "run", "-c", config], stdout=log, stderr=log, cwd=directory, env=self.environment)

        def pgcutover(*words, check=True):
            done = subprocess.run([binary, *words, "-c", config, "--output", "json"], capture_output=True, text=True, env=self.environment)
            if check and done.returncode != 0:
                raise RuntimeError(f"{' '.join(words)}: {done.stdout[-1500:]}{done.stderr[-1500:]}")
            return done

        try:
            for _ in range(600):
                if pgcutover("migration", "list", check=False).returncode == 0:
                    break
                time.sleep(0.1)
            yield pgcutover
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)

    def move(self, major):
        directory = f"{self.directory}/{major}"
        os.mkdir(directory)
        os.chmod(directory, 0o755)
        servers, daemon = [], contextlib.ExitStack()
        try:
            source = Server(directory, "source", self.found[major], major, self)
            servers.append(source)
            target = Server(directory, "target", self.found[self.newest], self.newest, self)
            servers.append(target)
            source.sql(f"CREATE DATABASE {DATABASE}", "postgres")
            with open(f"{ROOT}/tests/support/objects.sql") as objects:
                source.sql(objects.read())
            source.sql(BUSY)
            pgcutover = daemon.enter_context(self.daemon(directory, source, target))
            before = self.dump(source)
            pgcutover("migration", "create", "move", "--database", DATABASE)
            waiting = {"InProgress"}
            while True:
                source.sql(WRITE)
                shown = json.loads(pgcutover("migration", "show", "move").stdout)
                if shown["state"] not in waiting:
                    break
                time.sleep(0.2)
            if shown["state"] != "WaitingForUserAction":
                raise RuntimeError(f"{shown['state']} {shown['substate']}: {shown['error']}")
            source.sql(WRITE)
            pgcutover("migration", "cutover", "move")
            source.sql(f"ALTER DATABASE {DATABASE} ALLOW_CONNECTIONS true", "postgres")
            there, here = self.rows(source), self.rows(target)
            problems = self.differences(target, before, there, here)
            return len(here), problems
        finally:
            daemon.close()
            for server in servers:
                server.stop()

    def differences(self, target, before, there, here):
        """What differs: `before` is the source's dump, `there` and `here` are the rows of both."""
        target.sql("DROP DATABASE IF EXISTS reference", "postgres")
        target.sql("CREATE DATABASE reference TEMPLATE template0", "postgres")
        # A note of some minor versions to themselves, which other servers refuse.
        before = re.sub(r"^ALTER (?:FOREIGN )?TABLE .* SET \(pg_attver=\d+\);\n", "", before, flags=re.M)
        target.sql(re.sub(r"pg_attver=\d+, |, pg_attver=\d+", "", before), "reference")
        problems = [line for line in self.compare(self.definitions(target, "reference"), self.definitions(target))
                    if not (line.startswith("+ALTER TABLE ONLY ") and line.endswith(" REPLICA IDENTITY FULL;"))]
        return problems + [f"{name}: {there.get(name)} on the source, {here.get(name)} on the target"
                           for name in sorted(there.keys() | here.keys()) if there.get(name) != here.get(name)]

    def compare(self, before, after):
        return [line for line in difflib.unified_diff(before, after, "source", "target", lineterm="", n=0)
                if not line.startswith(("---", "+++", "@@"))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", help="majors, such as 10,14 (default: all that are found)")
    parser.add_argument("--bindirs", help="directories of servers, with colons between them")
    parser.add_argument("--binary", default=f"{ROOT}/target/debug/pgcutover")
    parser.add_argument("--keep", action="store_true", help="keep the temporary directory")
    args = parser.parse_args()
    suite = Suite(args)
    wanted = [int(major) for major in args.sources.split(",")] if args.sources else sorted(suite.found)
    failed = False
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        for major in wanted:
            try:
                compared, problems = suite.move(major)
                verdict = f"equal ({compared} tables, sequences, large objects)" if not problems else "DIFFERENT"
            except RuntimeError as error:
                verdict, problems = "FAILED", [str(error)]
            print(f"{major} to {suite.newest}: {verdict}", flush=True)
            for problem in problems[:40]:
                print(f"    {problem}", flush=True)
            failed |= bool(problems)
    finally:
        if args.keep:
            print(f"kept: {suite.directory}")
        else:
            shutil.rmtree(suite.directory, ignore_errors=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
