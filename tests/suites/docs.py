#!/usr/bin/env python3
"""Runs the commands that docs/ shows, against a daemon and two servers of its own, in the states that the pages speak of.

    tests/suites/docs.py [--binary FILE] [--strict]

Every command of pgcutover, every call by curl and every statement of the console on these pages is run, or stands in ELSEWHERE
with what runs it instead; one that does neither is named at the end, and fails with --strict. What the runbook
says of failures is done to a real migration: the failure is caused, its code is looked for, and what mends it is run.

Needs psql, initdb and pg_dump of one PostgreSQL version (PGCUTOVER_PG_BINDIRS, or where it usually is), and curl. Takes a minute or two. The README's own commands: readme.py.
"""

import argparse
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
# What is not run here, and why: nothing so far.
ELSEWHERE = {}
SAMPLES = {"NAME": "named", "RULE": "always_triggers", "always_triggers": "always_triggers"}
PATIENCE = 120


def shown():
    """Page, and command or statement, in the order of the pages."""
    found = []
    for path in sorted(glob.glob(f"{ROOT}/docs/**/*.md", recursive=True)):
        language = None
        for line in open(path, encoding="utf-8"):
            if line.startswith("```"):
                language = line.strip()[3:] if language is None else None
                continue
            parts = re.findall(r"`([^`]+)`", line) if language is None else [line.strip()]
            for part in parts:
                if language == "console" and part:
                    found.append((os.path.relpath(path, ROOT), f"console: {part}"))
                elif re.match(r"(pgcutover|curl) ", part) and language in (None, "sh"):
                    found.append((os.path.relpath(path, ROOT), re.split(r" *[>|#]", part)[0].strip()))
    return found


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def program(name):
    places = sorted(glob.glob("/usr/lib/postgresql/*/bin") + glob.glob("/usr/pgsql-*/bin") + glob.glob(f"{ROOT}/target/servers/*/bin"))
    for place in [*os.environ.get("PGCUTOVER_PG_BINDIRS", "").split(":"), *places, *os.environ["PATH"].split(":")]:
        if all(os.access(f"{place}/{needed}", os.X_OK) for needed in ("initdb", "postgres", "psql", "pg_dump")):
            return f"{place}/{name}"
    sys.exit("docs: needs PostgreSQL's programs (Debian: postgresql)")


class World:
    """Two servers with databases shop and crm on the first, and a daemon before them."""

    def __init__(self, binary):
        self.place = tempfile.mkdtemp(prefix="pgcutover-docs-")
        os.chmod(self.place, 0o755)
        os.symlink(os.path.abspath(binary), f"{self.place}/pgcutover")
        self.as_server = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
        self.processes, self.done = [], set()
        self.ports = {name: free_port() for name in ("source", "target", "proxy", "admin")}
        for name in ("source", "target"):
            data = f"{self.place}/{name}"
            os.mkdir(data, 0o700)
            if self.as_server:
                shutil.chown(data, "postgres")
            run([*self.as_server, program("initdb"), "-D", data, "-U", "postgres", "-A", "trust", "--no-sync"], cwd="/")
            settings = {"port": self.ports[name], "unix_socket_directories": data, "wal_level": "logical", "fsync": "off", "listen_addresses": "127.0.0.1"}
            words = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
            self.start([*self.as_server, program("postgres"), "-D", data, *words], name, cwd="/")
            self.until(f"{name} answers", lambda name=name: self.sql(name, "SELECT 1", check=False) == "1")
        for database in ("shop", "crm"):
            self.sql("source", f"CREATE DATABASE {database}")
            self.sql("source", "CREATE TABLE item (id int PRIMARY KEY, name text); INSERT INTO item SELECT g, 'x' FROM generate_series(1, 1000) g", database)

    def start(self, command, name, cwd):
        log = open(f"{self.place}/{name}.log", "a", encoding="utf-8")
        self.processes.append(subprocess.Popen(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
        return self.processes[-1]

    def configure(self, user):
        with open(f"{self.place}/pgcutover.toml", "w", encoding="utf-8") as out:
            # A busy machine is no reason to give a cutover up.
            out.write('[cutover]\nmax_pause = "60s"\ndrain_timeout = "30s"\n')
            out.write(f'[listen]\naddress = "127.0.0.1:{self.ports["proxy"]}"\n[auth]\nmethod = "trust"\n')
            out.write(f'[admin]\naddress = "127.0.0.1:{self.ports["admin"]}"\nusers = ["postgres"]\n[migration]\nbindir = "{os.path.dirname(program("pg_dump"))}"\n')
            for name in ("source", "target"):
                out.write(f'[{name}]\nhost = "127.0.0.1"\nport = {self.ports[name]}\nuser = "{user}"\n')
        self.daemon = self.start([f"{self.place}/pgcutover", "run"], "daemon", cwd=self.place)
        self.until("the daemon is ready", lambda: subprocess.run(["curl", "-sf", f"http://127.0.0.1:{self.ports['admin']}/readyz"], capture_output=True).returncode == 0)

    def until(self, what, holds):
        deadline = time.monotonic() + PATIENCE
        while not holds():
            ended = [process.args for process in self.processes if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                sys.exit(f"docs: waited in vain until {what}; ended: {ended}\n{self.log()}")
            time.sleep(0.1)

    def sql(self, server, text, database="postgres", check=True):
        port = self.ports[server]
        command = [program("psql"), "-XAtq", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-p", str(port), "-U", "postgres", "-d", database, "-c", text]
        asked = subprocess.run(command, capture_output=True, text=True)
        if check and asked.returncode:
            sys.exit(f"docs: {text}: {asked.stderr}")
        return asked.stdout.strip()

    def run(self, command, statuses=(0,), wrapper=""):
        """As it stands on a page, but for ports and placeholders; noted as run. Returns what it prints."""
        self.done.add(command)
        if command.startswith("console: "):
            return self.sql("proxy", command.removeprefix("console: "), "pgcutover")
        text = wrapper + command.replace("8432", str(self.ports["admin"]))
        for placeholder, sample in SAMPLES.items():
            text = re.sub(rf"\b{placeholder}\b", sample, text)
        environment = {**os.environ, "PATH": f"{self.place}:{os.environ['PATH']}"}
        asked = subprocess.run(["bash", "-c", text], cwd=self.place, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=PATIENCE * 2)
        print(f"docs: {command}: {asked.returncode}", flush=True)
        if asked.returncode not in statuses:
            sys.exit(f"docs: {command} ended with {asked.returncode}:\n{asked.stdout}{asked.stderr}\n{self.log()}")
        return asked.stdout + asked.stderr

    def migration(self, name):
        command = [f"{self.place}/pgcutover", "migration", "show", name, "--output", "json"]
        return json.loads(subprocess.run(command, cwd=self.place, capture_output=True, text=True, check=True).stdout)

    def fails_with(self, name, code):
        self.until(f"{name} has failed with {code}", lambda: self.migration(name)["state"] == "Failed")
        error = self.migration(name)["error"]
        if error["code"] != code:
            sys.exit(f"docs: {name} has failed with {error}, not {code}")

    def log(self):
        try:
            return "".join(open(f"{self.place}/daemon.log", encoding="utf-8").readlines()[-15:])
        except OSError:
            return ""

    def end(self):
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGQUIT if process is not getattr(self, "daemon", None) else signal.SIGTERM)
                process.wait()
        shutil.rmtree(self.place, ignore_errors=True)


def run(command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"docs: {' '.join(command)}: {done.stderr}")


def block(page, language, holding):
    text = open(f"{ROOT}/docs/{page}", encoding="utf-8").read()
    return next(part for part in re.findall(rf"^```{language}\n(.*?)^```$", text, re.S | re.M) if holding in part)


def guides(world):
    """The role and the steps of the guide for servers of one's own; the other guides have the same steps."""
    for server in ("source", "target"):
        world.sql(server, block("guides/self-managed.md", "sql", "CREATE ROLE"))
    world.configure("pgcutover")
    steps = block("guides/self-managed.md", "sh", "rehearsal")
    for provider in ("rds", "azure", "cloud-sql"):
        if block(f"guides/{provider}.md", "sh", "rehearsal") != steps:
            sys.exit(f"docs: the steps of {provider}.md are others than those that are run")
    for command in steps.strip().splitlines():
        world.run(command)


def runbook(world):
    """Goes on where the guide ends: the application is on the target. There and back, then one failure after the other."""
    # There is something to resume.
    run(["curl", "-sf", "-X", "POST", f"http://127.0.0.1:{world.ports['admin']}/api/v1/pause"])
    for command in ("status", "show blockers", "migration show move", "migration history move", "migration tables move", "show databases",
                    "show pools", "show clients", "show config", "resume", "reload", "migration rollback move"):
        world.run(f"pgcutover {command}")
    for command in ("migration cutover move --stragglers terminate", "migration complete move"):
        world.run(f"pgcutover {command}")
    world.run("curl http://127.0.0.1:8432/readyz")
    # Nobody has this process id: the answer says so.
    world.run("pgcutover kill 4711", statuses=(1,))


def failures(world):
    """A failed migration: its code, and what the runbook says under it."""
    world.run("pgcutover migration create rehearsal --option validate --database shop")
    world.until("it is validated", lambda: world.migration("rehearsal")["state"] == "Succeeded")
    world.run("pgcutover migration validation rehearsal")
    world.run("pgcutover migration validation rehearsal --fix RULE", statuses=(0, 1))
    world.run("pgcutover migration create move --database shop --wait")
    world.run("pgcutover migration cutover move --dry-run")
    # `schema_differs`: make the same change of definition on the target, retry.
    change = "ALTER TABLE item ADD COLUMN price int"
    world.sql("source", f"{change}; INSERT INTO item VALUES (2000, 'y', 3)", "shop")
    world.fails_with("move", "schema_differs")
    world.sql("target", change, "shop")
    world.run("pgcutover migration retry move")
    world.until("the row has arrived", lambda: world.sql("target", "SELECT price FROM item WHERE id = 2000", "shop") == "3")
    # A row that somebody has changed on the target: found, and mended.
    world.sql("target", "UPDATE item SET name = 'wrong' WHERE id = 7", "shop")
    said = world.run("pgcutover migration verify move", statuses=(1,))
    if "item" not in said:
        sys.exit(f"docs: the verification does not name the table:\n{said}")
    world.run("pgcutover migration verify move --repair")
    world.run("pgcutover migration verify move")
    # `target_differs`: anew.
    world.sql("target", "DELETE FROM item WHERE id = 8", "shop")
    world.sql("source", "UPDATE item SET name = 'changed' WHERE id = 8", "shop")
    world.fails_with("move", "target_differs")
    world.run("pgcutover migration cancel move")
    world.until("it is cancelled", lambda: world.migration("move")["state"] == "Cancelled")
    world.run("pgcutover migration create again --database shop --overwrite-target --wait")
    # `slot_missing`: somebody has dropped it.
    drop = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active; SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active"
    world.until("the slot is dropped", lambda: world.sql("source", drop, check=False) is not None and world.sql("source", "SELECT count(*) FROM pg_replication_slots") == "0")
    world.fails_with("again", "slot_missing")


def plain(world):
    world.configure("postgres")


def references(world):
    """The console's statements in an order in which they have a place, the forms of JSON, and the page on validation."""
    world.run("pgcutover migration create NAME --option validate")
    world.until("it is validated", lambda: world.migration("named")["state"] == "Succeeded")
    for words in ("", " --fix always_triggers", " --fix always_triggers --yes"):
        # Where there is nothing to mend, the answer says so.
        world.run(f"pgcutover migration validation NAME{words}", statuses=(0, 1) if words else (0,))
    world.run("console: CREATE MIGRATION move DATABASES shop, crm MODE online")
    world.until("it is ready", lambda: world.migration("move")["substate"] == "WaitingForCutoverTrigger")
    for statement in ("SHOW MIGRATIONS", "SHOW MIGRATION move", "SHOW HISTORY move", "SHOW EVENTS", "CHECK", "VERIFY move REPAIR", "SHOW VERIFICATION move", "FIX move always_triggers APPLY", "CUTOVER move DRY RUN"):
        world.run(f"console: {statement}")

    def switched():
        # Two seconds may be too few on a busy machine: aborted, then, and tried again.
        world.run("console: CUTOVER move MAX PAUSE 2s STRAGGLERS terminate")
        return world.migration("move")["state"] == "Succeeded"

    world.until("it is cut over", switched)
    world.run("console: SHOW CUTOVER move")
    for command in ("pgcutover migration verification move --output json", "pgcutover migration cutover-report move --output json",
                    "curl -s http://127.0.0.1:8432/api/v1/migrations", "pgcutover migration show move --output json", "pgcutover status --output json", "pgcutover openapi"):
        json.loads(world.run(command))
    # Has no end: stopped after its first events.
    if "event: live" not in world.run("curl -N http://127.0.0.1:8432/api/v1/live", statuses=(124,), wrapper="timeout 10 "):
        sys.exit("docs: the live stream says nothing")
    world.run("pgcutover migration rollback move")
    world.run("console: CANCEL move")


def upgrade(world):
    """The guide to a new major version, and what an installed program is asked."""
    world.configure("postgres")
    for command in ("--version", "--help", "man", "completions bash"):
        if not world.run(f"pgcutover {command}").strip():
            sys.exit(f"docs: pgcutover {command} says nothing")
    for command in ("create upgrade --wait", "cutover upgrade --dry-run", "cutover upgrade"):
        world.run(f"pgcutover migration {command}")


def properties(world):
    """The file of Azure's service, with servers that are ours."""
    with open(f"{world.place}/move.json", "w", encoding="utf-8") as out:
        json.dump({"properties": {"SourceDBServerResourceId": f"127.0.0.1:{world.ports['source']}@postgres", "DBsToMigrate": ["shop"], "MigrationMode": "Online",
                                  "MigrationOption": "Validate"}}, out)
    world.configure("postgres")
    world.run("pgcutover migration create move --properties move.json")
    world.until("it is validated", lambda: world.migration("move")["state"] == "Succeeded")
    world.run("pgcutover migration validation move")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=f"{ROOT}/target/debug/pgcutover")
    parser.add_argument("--strict", action="store_true", help="fail where a command on a page was not run")
    options = parser.parse_args()
    began, done = time.monotonic(), set()
    stories = [(guides, runbook), (plain, failures), (plain, references), (upgrade,), (properties,)]
    for story in stories:
        world = World(options.binary)
        try:
            for part in story:
                part(world)
            done |= world.done
        finally:
            world.end()
    commands = shown()
    # What is spoken of without its arguments has run with them.
    spoken = {" ".join(command.split()[:length]) for command in done for length in range(2, len(command.split()) + 1)}
    missing = [f"docs: NOT RUN {page}: {command}" for page, command in commands if command not in spoken and command not in ELSEWHERE]
    print("".join(f"{line}\n" for line in missing), end="")
    if missing and options.strict:
        sys.exit("docs: on a page, and not run")
    stale = [command for command in sorted(done | set(ELSEWHERE)) if command not in {command for _, command in commands}]
    if stale:
        sys.exit("docs: run, and on no page:\n  " + "\n  ".join(stale))
    print(f"docs: {len(done)} commands and statements of docs/ were run; {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
