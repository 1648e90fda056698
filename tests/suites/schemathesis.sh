#!/usr/bin/env bash
# Schemathesis against a running daemon: every call of the API's own description, with made-up input, right and wrong.
# An answer that is not described, of another shape, or a server error fails.
#
#   tests/suites/schemathesis.sh [ARGUMENT OF schemathesis run…]       such as --include-operation-id createMigration
#
# Left out: the live stream, which has no end; shutdown, which ends the daemon; waits for sessions and transactions.
#
# Needs: PostgreSQL's programs (MAJOR, 15 unless told otherwise), python3 with venv and pip, and the Python index, unless
# SCHEMATHESIS names the program.
#   EXAMPLES=25         for each call

set -uo pipefail
suite=schemathesis MAJOR=${MAJOR:-15}
. "$(dirname "$0")/stage.sh"
begin_stage
version=${SCHEMATHESIS_VERSION:-4.32.5}
cache=$root/target/suites/schemathesis-$version
program=${SCHEMATHESIS:-$cache/bin/schemathesis}
if [ ! -x "$program" ]; then
    python3 -m venv "$cache" && "$cache/bin/pip" install --quiet --disable-pip-version-check "schemathesis==$version" ||
        die "schemathesis $version could not be fetched: needs python3 with venv (Debian: python3-venv) and the Python index"
fi
start_server source
source=$port
start_server target
start_proxy "$source" "$port"
admin=$(sed -n '/^\[admin\]/,/^\[/s/^address = "\(.*\)"/\1/p' "$work/proxy.toml")
# It keeps files of its own where it runs.
cd "$work" || die "no place to run in"
say "running on $admin"
"$program" run "http://$admin/api/v1/openapi.json" \
    --exclude-operation-id live --exclude-operation-id shutdown \
    --exclude-operation-id waitClose --exclude-operation-id waitCloseAll \
    --max-examples "${EXAMPLES:-25}" --seed 1 --workers 1 --request-timeout 60 --phases examples,coverage,fuzzing \
    --checks not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance,unsupported_method \
    --no-color "$@"
outcome=$?
kill -0 "${started[-1]}" 2>/dev/null || die "the daemon has ended: $(tail -3 "$work/proxy.log")"
[ "$outcome" = 0 ] && say 'every answer was as described' || die "schemathesis found something (status $outcome)"
