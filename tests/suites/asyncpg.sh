#!/usr/bin/env bash
# asyncpg's own suite, direct and through the proxy in session mode: the same tests fail in both, or exit 1.
#
#   tests/suites/asyncpg.sh [PYTEST ARGUMENT…]       such as -k test_copy
#
# Each run has a new server. Tests that start a server of their own (and so never meet the proxy) run or fail alike in
# both. Reports stay in target/suites/asyncpg/{direct,proxy}.
#
# Needs: PostgreSQL's programs (MAJOR, 15 unless told otherwise), python3 with venv and pip, a C compiler, the Python index.
#   ASYNCPG=0.32.0      version; its source distribution has the tests

set -uo pipefail
suite=asyncpg MAJOR=${MAJOR:-15}
. "$(dirname "$0")/stage.sh"
begin_stage
version=${ASYNCPG:-0.32.0}
cache=$root/target/suites/asyncpg-$version
results=$root/target/suites/asyncpg
mkdir -p "$cache" "$results"

if [ ! -f "$cache/ready" ]; then
    say "fetching and building asyncpg $version"
    python3 -m venv "$cache/python" || die 'needs python3 with venv (Debian: python3-venv)'
    "$cache/python/bin/pip" download --quiet --disable-pip-version-check --no-deps --no-binary :all: -d "$cache" "asyncpg==$version" &&
        "$cache/python/bin/pip" install --quiet --disable-pip-version-check pytest uvloop 'distro~=1.9' "$cache/asyncpg-$version.tar.gz" ||
        die "asyncpg $version could not be fetched or built: needs the Python index and a C compiler"
    tar -xzf "$cache/asyncpg-$version.tar.gz" -C "$cache" && touch "$cache/ready"
fi

# run NAME PORT [ARGUMENT…]
run() {
    local name=$1 port=$2
    shift 2
    rm -rf "${results:?}/$name" "$work/tests" && mkdir -p "$results/$name"
    # Apart from the source, so that the package that was built is imported.
    mkdir "$work/tests" && cp -r "$cache/asyncpg-$version/tests" "$work/tests/tests"
    say "running $name"
    (cd "$work/tests" && env -u PGPASSWORD -u PGDATABASE PGHOST=127.0.0.1 PGPORT="$port" PGUSER=postgres PGDATABASE=postgres PGINSTALLATION="$bindir" \
        HOME="$work" timeout 1800 "$cache/python/bin/python" -m pytest tests -q -p no:cacheprovider --junitxml="$results/$name/report.xml" "$@" \
        >"$results/$name/log" 2>&1)
    python3 - "$results/$name/report.xml" >"$results/$name/verdicts" <<'PYTHON'
import sys
from xml.etree import ElementTree

for case in ElementTree.parse(sys.argv[1]).iter("testcase"):
    kinds = {child.tag for child in case} & {"failure", "error", "skipped"}
    print(case.get("classname"), case.get("name"), "+".join(sorted(kinds)) or "passed")
PYTHON
    sort -o "$results/$name/verdicts" "$results/$name/verdicts"
    say "$name: $(awk '{n[$NF]++} END {for (verdict in n) printf "%d %s ", n[verdict], verdict}' "$results/$name/verdicts")"
}

start_server direct
run direct "$port" "$@"
as_server "$bindir/pg_ctl" -D "$work/server-direct" -m immediate -s stop

start_server source && source_port=$port
start_server target && target_port=$port
start_proxy "$source_port" "$target_port"
run proxy "$port" "$@"

[ -s "$results/direct/verdicts" ] || die "no test has run: see $results/direct/log"
if diff -u "$results/direct/verdicts" "$results/proxy/verdicts"; then
    say 'the same through the proxy as direct'
else
    say "DIFFERENT through the proxy; see $results"
    exit 1
fi
