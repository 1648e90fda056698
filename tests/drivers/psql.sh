#!/usr/bin/env bash
# psql on one connection across a cutover: one process that reads commands from a pipe which is kept open.
# See README.md in this directory. PSQL names the program, if it is not in PATH.
set -u
DRIVER=psql
work_dir=$(mktemp -d)
trap 'exec 3>&-; kill "$psql_pid" 2>/dev/null; rm -rf "$work_dir"' EXIT
mkfifo "$work_dir/in"
PGAPPNAME=driver-psql "${PSQL:-psql}" -X -q -A -t -v ON_ERROR_STOP=1 <"$work_dir/in" >>"$work_dir/out" 2>"$work_dir/err" &
psql_pid=$!
exec 3>"$work_dir/in"

fail() {
    echo "FAIL $*"
    head -5 "$work_dir/err"
    exit 1
}

# Sends commands and waits for the line that psql prints after them.
serial=0
say() {
    serial=$((serial + 1))
    printf '%s\n\\echo done %s\n' "$1" "$serial" >&3
    local waited=0
    until grep -q "^done $serial\$" "$work_dir/out"; do
        kill -0 "$psql_pid" 2>/dev/null || fail "psql has ended"
        waited=$((waited + 1))
        [ "$waited" -lt 6000 ] || fail "no answer in a minute"
        sleep 0.01
    done
    [ -s "$work_dir/err" ] && fail "psql said something"
    # What it printed, without the marks; the file starts anew.
    answer=$(grep -v '^done ' "$work_dir/out")
    : >"$work_dir/out"
}

acknowledged=0
work() {
    local round n
    for ((round = 0; round < $1; round++)); do
        n=$acknowledged
        case $((n % 5)) in
        0)
            say "BEGIN; EXECUTE put($((n + 1)), 'glad'); EXECUTE put($((n + 2)), 'sad'); COMMIT;"
            acknowledged=$((n + 2))
            ;;
        3)
            say "COPY driver_writes (driver, n, mood, note) FROM STDIN;
$DRIVER	$((n + 1))	sad	copy
\\."
            acknowledged=$((n + 1))
            ;;
        *)
            say "BEGIN; EXECUTE put($((n + 1)), 'glad'); ROLLBACK;
EXECUTE put($((n + 1)), 'glad');"
            acknowledged=$((n + 1))
            ;;
        esac
        say "SELECT max(n) FROM driver_writes WHERE driver = '$DRIVER';"
        [ "$answer" = "$acknowledged" ] || fail "newest $answer, acknowledged $acknowledged"
    done
}

# check SQL EXPECTED
check() {
    say "$1"
    [ "$answer" = "$2" ] || fail "$1: expected $2, found $answer"
}

say "SELECT inet_server_port();"
port=$answer
say "SELECT pg_backend_pid();"
pid=$answer
say "SET search_path TO shop, \"\$user\", public; SET TimeZone TO 'Asia/Kolkata'; SET app.driver = 'it''s psql';
LISTEN driver_psql;
PREPARE put (int, mood) AS INSERT INTO driver_writes (driver, n, mood, note) VALUES ('$DRIVER', \$1, \$2, ';');"
work 10
touch "$DRIVER_DIR/ready"
until [ -e "$DRIVER_DIR/switched" ]; do work 2; done
work 20

expected_port=$(cat "$DRIVER_DIR/switched")
check "SELECT inet_server_port();" "$expected_port"
say "SELECT pg_backend_pid();"
[ "$expected_port" = "$port" ] || [ "$answer" != "$pid" ] || fail "still on the old backend"
check "SELECT current_setting('app.driver');" "it's psql"
check "SHOW search_path;" 'shop, "$user", public'
check "SHOW TimeZone;" "Asia/Kolkata"
check "SHOW application_name;" "driver-psql"
check "SELECT count(*) FROM pg_prepared_statements WHERE name = 'put' AND from_sql;" 1
say "NOTIFY driver_psql, 'still there';"
case $answer in *"still there"*) ;; *) fail "no notification arrived" ;; esac
check "SELECT count(*), min(n), max(n) FROM driver_writes WHERE driver = '$DRIVER';" "$acknowledged|1|$acknowledged"
exec 3>&-
wait "$psql_pid" || fail "psql ended badly"
[ -s "$work_dir/err" ] && fail "psql said something"
echo "ACKNOWLEDGED $acknowledged"
echo "PASS"
