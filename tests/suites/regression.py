#!/usr/bin/env python3
"""Moves the database that PostgreSQL's own regression suite leaves behind to the newest PostgreSQL, and compares.

    tests/suites/regression.py [--source 15] [--bindirs DIR:DIR…] [--binary FILE]

The suite (see regress.sh, which fetches what it needs) runs in a server of the source's major. What a validation refuses in
that database is listed here, in MENDED, with what removes it: the rules must name it first, and a refusal that is not listed
ends the run. Then the migration, the cutover, and a comparison of both servers as in matrix.py: what the newest pg_dump says of
either, every table's rows, every sequence. Exit status 1 where one differs. It takes some minutes.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import matrix
from matrix import ROOT, Server, Suite

matrix.DATABASE = DATABASE = "regression"

# Rule of the validation, and what removes its reason on the source.
MENDED = {
    # Would act a second time on what is replicated.
    "always_triggers": """DO $$ DECLARE t record; BEGIN
        FOR t IN SELECT tgrelid::regclass AS relation, tgname FROM pg_trigger WHERE tgenabled IN ('A', 'R') AND NOT tgisinternal LOOP
            EXECUTE format('ALTER TABLE %s ENABLE TRIGGER %I', t.relation, t.tgname);
        END LOOP; END $$""",
    # What the source was built with and the target was not; the fix is the rule's own.
    "build_features": """DO $$ DECLARE a record; BEGIN
        FOR a IN SELECT c.oid::regclass AS relation, c.relkind, attname FROM pg_attribute JOIN pg_class c ON c.oid = attrelid
                  WHERE attcompression = 'l' AND NOT attisdropped AND c.relkind IN ('r', 'p', 'm') LOOP
            EXECUTE format('ALTER %s %s ALTER %I SET COMPRESSION pglz', CASE a.relkind WHEN 'm' THEN 'MATERIALIZED VIEW' ELSE 'TABLE' END,
                           a.relation, a.attname);
        END LOOP; END $$""",
    # PostgreSQL 16 and newer know no such tables.
    "generated_children": """DO $$ DECLARE t record; BEGIN
        FOR t IN SELECT DISTINCT c.oid::regclass AS name FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid
                  JOIN pg_attribute a ON a.attrelid = c.oid JOIN pg_attribute p ON p.attrelid = i.inhparent AND p.attname = a.attname
                  WHERE a.attgenerated <> p.attgenerated LOOP
            EXECUTE format('DROP TABLE %s CASCADE', t.name);
        END LOOP; END $$""",
    # The suite's own library is built for the source's major alone.
    "c_functions": """DO $$ DECLARE f record; BEGIN
        FOR f IN SELECT p.oid FROM pg_proc p JOIN pg_language l ON l.oid = p.prolang WHERE l.lanname = 'c' AND p.oid >= 16384 LOOP
            IF EXISTS (SELECT FROM pg_proc WHERE oid = f.oid) THEN
                EXECUTE format('DROP ROUTINE %s CASCADE', f.oid::regprocedure);
            END IF;
        END LOOP; END $$""",
}

REFRESH = """DO $$ DECLARE v record; BEGIN
    FOR v IN SELECT oid::regclass AS name FROM pg_class WHERE relkind = 'm' AND relispopulated ORDER BY oid LOOP
        EXECUTE format('REFRESH MATERIALIZED VIEW %s', v.name);
    END LOOP; END $$"""


def regression(suite, major):
    directory = suite.directory
    source = Server(directory, "source", suite.found[major], major, suite)
    target = Server(directory, "target", suite.found[suite.newest], suite.newest, suite)
    suite.servers += [source, target]
    libraries = f"{directory}/libraries"
    started = time.monotonic()
    environment = dict(os.environ, MAJOR=str(major), INTO_PORT=str(source.port), LIBRARIES=libraries, PG_BINDIR=suite.found[major])
    subprocess.run([f"{ROOT}/tests/suites/regress.sh"], check=True, env=environment)
    print(f"the suite ran in {time.monotonic() - started:.0f} s", flush=True)
    return source, target


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=int, default=15, help="major of the source")
    parser.add_argument("--bindirs", help="directories of servers, with colons between them")
    parser.add_argument("--binary", default=f"{ROOT}/target/debug/pgcutover")
    parser.add_argument("--keep", action="store_true", help="leave servers and the temporary directory")
    args = parser.parse_args()
    suite = Suite(args)
    suite.servers = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    status = 1
    try:
        status = run(suite, args)
    finally:
        if args.keep:
            print(f"kept: {suite.directory}, source {suite.servers[0].port}, target {suite.servers[1].port}", flush=True)
        else:
            for server in suite.servers:
                server.stop()
            shutil.rmtree(suite.directory, ignore_errors=True)
    sys.exit(status)


def named(view, outcomes):
    return {result["code"]: result for result in view["validation"] or [] if result["outcome"] in outcomes}


def run(suite, args):
    source, target = regression(suite, args.source)
    with suite.daemon(suite.directory, source, target) as pgcutover:
        pgcutover("migration", "create", "look", "--database", DATABASE, "--option", "validate", "--wait", check=False)
        view = json.loads(pgcutover("migration", "show", "look").stdout)
        found = named(view, ("Warning", "Failed"))
        for code, result in found.items():
            print(f"{result['outcome']}: {code}: {len(result['evidence'])} such as {result['evidence'][:3]}", flush=True)
        unknown = named(view, ("Failed",)).keys() - MENDED.keys()
        if unknown:
            print(f"not listed: {', '.join(sorted(unknown))}")
        pgcutover("migration", "cancel", "look")
        for code in found:
            source.sql(MENDED.get(code, ""))
        if args.keep and unknown:
            return 1
        # They show what they did when they were refreshed, and are refreshed by the migration.
        source.sql(REFRESH)
        before, dump = suite.rows(source), suite.dump(source)
        done = pgcutover("migration", "create", "move", "--database", DATABASE, "--wait", check=False)
        shown = json.loads(pgcutover("migration", "show", "move", check=False).stdout or "{}")
        if "state" not in shown:
            print(f"refused: {done.stdout}{done.stderr}")
            return 1
        if shown["state"] != "WaitingForUserAction":
            print(f"{shown['state']} {shown['substate']}: {json.dumps(shown['error'], indent=1)}\n{done.stderr[-3000:]}")
            return 1
        answer = pgcutover("migration", "cutover", "move", check=False)
        if answer.returncode != 0:
            print(f"cutover: {answer.stdout}{answer.stderr}")
            return 1
        source.sql(f"ALTER DATABASE {DATABASE} ALLOW_CONNECTIONS true", "postgres")
        after = suite.rows(target)
        problems = suite.differences(target, dump, before, after)
        print(f"{args.source} to {suite.newest}: {len(after)} tables and sequences, {len(problems)} differences", flush=True)
        for problem in problems[:80]:
            print(f"    {problem}", flush=True)
        return 1 if problems or unknown else 0


if __name__ == "__main__":
    main()
