#!/usr/bin/env bash
# PostgreSQL's own regression suite, direct and through the proxy in session mode: the same differences in both, or exit 1.
#
#   tests/suites/regress.sh
#
# Each run has a new server, so both begin alike. What is compared: the verdict of every test and the whole of
# regression.diffs (without times and paths). Results stay in target/suites/regress/{direct,proxy}.
#
# Needs: PostgreSQL 15's programs, its source (PG_SOURCE, or Debian's source package is fetched), its server headers
# (installed, PG_HEADERS, or Debian's package is fetched and unpacked), gcc, python3. Nothing is installed.
#   MAJOR=16        another major version, where its source and headers are at hand
#   TESTS="a b"     these tests only, in this order (test_setup first) instead of the parallel schedule
#   INTO_PORT=5432  only run the suite once, in the server at this port, and leave the database `regression` there; LIBRARIES=DIR
#                   is where the C functions are put that it uses (the server's account must be able to read it)

set -uo pipefail
shopt -s extglob
suite=regress MAJOR=${MAJOR:-15}
. "$(dirname "$0")/stage.sh"
begin_stage
cache=$root/target/suites/regress-$MAJOR
results=$root/target/suites/regress
mkdir -p "$cache" "$results"

# Debian's own client, with lists and caches of ours, so that the machine's configuration stays as it is.
apt() {
    local release
    release=$(. /etc/os-release 2>/dev/null && echo "${VERSION_CODENAME:-}")
    [ -n "$release" ] && command -v apt-get >/dev/null || return 1
    mkdir -p "$cache/apt/lists/partial" "$cache/apt/archives/partial"
    cat >"$cache/apt/sources.list" <<LIST
deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $release main
deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $release main
LIST
    local own=(-o "Dir::Etc::sourcelist=$cache/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null -o "Dir::State::lists=$cache/apt/lists"
        -o "Dir::Cache=$cache/apt" -o APT::Sandbox::User=root -qq)
    [ -n "$(ls "$cache/apt/lists" | grep _Sources)" ] || apt-get "${own[@]}" update >/dev/null 2>&1
    (cd "$cache" && apt-get "${own[@]}" "$@" >/dev/null 2>&1)
}

find_source() {
    source_tree=${PG_SOURCE:-$(ls -d "$cache"/postgresql-"$MAJOR".*/ 2>/dev/null | head -1)}
    [ -f "$source_tree/src/test/regress/pg_regress.c" ] && return
    say "fetching the source of PostgreSQL $MAJOR"
    # Without a version apt takes the newest that it knows of; here only one is known.
    local version
    apt --help
    version=$(apt-cache -o "Dir::Etc::sourcelist=$cache/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o "Dir::State::lists=$cache/apt/lists" showsrc "postgresql-$MAJOR" 2>/dev/null | sed -n 's/^Version: //p' | head -1)
    apt source --download-only "postgresql-$MAJOR${version:+=$version}"
    tar -xf "$cache"/postgresql-"$MAJOR"_*.orig.tar.* -C "$cache" 2>/dev/null
    source_tree=$(ls -d "$cache"/postgresql-"$MAJOR".*/ 2>/dev/null | head -1)
    [ -f "$source_tree/src/test/regress/pg_regress.c" ] ||
        die "needs the source of PostgreSQL $MAJOR: unpack it and name it with PG_SOURCE"
}

find_headers() {
    local prefix
    for prefix in "${PG_HEADERS:-}" "" "$cache/dev"; do
        headers=$prefix/usr/include/postgresql/$MAJOR/server ports=$prefix/usr/lib/postgresql/$MAJOR/lib
        [ -f "$headers/postgres.h" ] && return
    done
    say 'fetching the server headers'
    apt download "postgresql-server-dev-$MAJOR" && dpkg-deb -x "$cache"/postgresql-server-dev-"$MAJOR"_*.deb "$cache/dev"
    [ -f "$headers/postgres.h" ] ||
        die "needs PostgreSQL's server headers (Debian: postgresql-server-dev-$MAJOR), or PG_HEADERS, the folder that has usr/include in it"
}

# psql of the source's own minor version: a later one may treat the tests' scripts differently: what follows a refused COPY,
# for example, is data to some and statements to others.
find_client() {
    local version source_version
    source_version=$(sed -n "s/^PACKAGE_VERSION='\\(.*\\)'/\\1/p" "$source_tree/configure")
    for client in "${PG_CLIENT_BINDIR:-}" "$bindir" "$cache/client/usr/lib/postgresql/$MAJOR/bin"; do
        [[ "$("$client/psql" --version 2>/dev/null)" == *" $source_version"?( *) ]] && return
    done
    say "fetching psql $source_version"
    version=$(sed -n "s/^Version: //p" "$cache"/postgresql-"$MAJOR"_*.dsc 2>/dev/null | head -1)
    apt download "postgresql-client-$MAJOR${version:+=$version}" &&
        dpkg-deb -x "$cache"/postgresql-client-"$MAJOR"_*.deb "$cache/client" && [ -x "$client/psql" ] && return
    client=$bindir
    say "no psql $source_version to be had, taking $("$client/psql" --version): some tests may differ, direct too"
}

# The library of C functions that the tests call, and the driver of the suite.
build() {
    local tests=$source_tree/src/test/regress
    built=$cache/built
    mkdir -p "$built"
    printf '#define PGBINDIR "%s"\n#define PKGLIBDIR "%s"\n' "$bindir" "$built" >"$built/pg_config_paths.h"
    local include=(-w -O1 -I"$built" -I"$tests" -I"$headers" -I"${headers%/*/server}/internal" -I/usr/include/postgresql)
    [ -x "$built/regress.so" ] ||
        gcc -fPIC -shared -o "$built/regress.so" "$tests/regress.c" "${include[@]}" || die 'regress.so could not be built'
    [ -x "$built/pg_regress" ] ||
        gcc -o "$built/pg_regress" "$tests/pg_regress.c" "$tests/pg_regress_main.c" "${include[@]}" -DFRONTEND -DHOST_TUPLE="\"$(gcc -dumpmachine)\"" \
            -DSHELLPROG='"/bin/sh"' -DDLSUFFIX='".so"' -L"$ports" -lpgcommon -lpgport -lpq -lm ||
        die 'pg_regress could not be built (Debian: libpq-dev, and the static libraries of postgresql-server-dev)'
}

# run NAME PORT
run() {
    local name=$1 port=$2 schedule=(--schedule="$inputs/parallel_schedule")
    [ -z "${TESTS:-}" ] || schedule=(test_setup $TESTS)
    rm -rf "${results:?}/$name" && mkdir -p "$results/$name"
    # The server writes files there too.
    rm -rf "$work/out" && install -d -o "$account" "$work/out"
    say "running $name"
    (cd "$work/out" && as_server "$libraries/pg_regress" --use-existing --inputdir="$inputs" --outputdir="$work/out" --dlpath="$libraries" \
        --bindir="$client" --host=127.0.0.1 --port="$port" --user=postgres --dbname=regression "${schedule[@]}" >"$results/$name/log" 2>&1)
    cp -r "$work/out/." "$results/$name/"
    # Verdicts without times; differences without times and paths.
    sed -n 's/^ *\(test \)\{0,1\} *\([a-z_0-9]*\) *\.\.\. *\([a-zA-Z]*\).*/\2 \3/p' "$results/$name/log" | sort >"$results/$name/verdicts"
    sed 's/^\(---\|+++\) \([^\t]*\)\t.*/\1 \2/; s/^diff .* \([^ ]*\)$/diff \1/' "$results/$name/regression.diffs" 2>/dev/null \
        >"$results/$name/diffs"
    say "$name: $(wc -l <"$results/$name/verdicts") tests, $(grep -vc ' ok$' "$results/$name/verdicts") with differences"
}

find_source
find_headers
find_client
build
# The server reads the tests' data, and its account may not walk to where this repository is.
inputs=$work/inputs libraries=${LIBRARIES:-$work/libraries}
cp -r "$source_tree/src/test/regress" "$inputs"
mkdir -p "$libraries" && cp "$built/regress.so" "$built/pg_regress" "$libraries/"
# Libraries of other modules that the tests load.
for module in autoinc refint; do
    found=$("$bindir/pg_config" --pkglibdir 2>/dev/null)/$module.so
    [ -f "$found" ] || found=$(dirname "$bindir")/lib/$module.so
    [ -f "$found" ] && cp "$found" "$libraries/"
done
chmod -R a+rX "$inputs" "$libraries"

new_database() {
    "$bindir/psql" -XAtq -h 127.0.0.1 -p "$1" -U postgres postgres <<'SQL' || die 'the database could not be made'
CREATE DATABASE regression TEMPLATE template0;
ALTER DATABASE regression SET lc_messages TO 'C';
ALTER DATABASE regression SET lc_monetary TO 'C';
ALTER DATABASE regression SET lc_numeric TO 'C';
ALTER DATABASE regression SET lc_time TO 'C';
ALTER DATABASE regression SET bytea_output TO 'hex';
ALTER DATABASE regression SET timezone_abbreviations TO 'Default';
SQL
}

if [ -n "${INTO_PORT:-}" ]; then
    new_database "$INTO_PORT"
    run direct "$INTO_PORT"
    [ -s "$results/direct/verdicts" ] || die "no test has run: see $results/direct/log"
    exit 0
fi

start_server direct
new_database "$port"
run direct "$port"
as_server "$bindir/pg_ctl" -D "$work/server-direct" -m immediate -s stop

start_server source && source_port=$port
start_server target && target_port=$port
new_database "$source_port"
start_proxy "$source_port" "$target_port"
run proxy "$port"

status=0
[ -s "$results/direct/verdicts" ] || die "no test has run: see $results/direct/log"
for part in verdicts diffs; do
    diff -u "$results/direct/$part" "$results/proxy/$part" >"$work/difference" || status=1
    cut -c 1-200 "$work/difference" | head -60
done
if [ "$status" = 0 ]; then say 'the same through the proxy as direct'; else say "DIFFERENT through the proxy; see $results"; fi
exit "$status"
