# What the suites share: a throw-away server, a proxy in front of it, and their end. Sourced, never run.
#
# Needs: PostgreSQL programs of major version $MAJOR (PG_BINDIR, or where Debian and `make servers` put them), and the
# proxy's binary (PGCUTOVER, or target/debug/pgcutover, which is built where it is missing).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
started=()

say() { printf '%s: %s\n' "$suite" "$*"; }
die() { say "$*" >&2; exit 1; }

# Servers refuse to run as root.
as_server() {
    if [ "$(id -u)" != 0 ]; then "$@"; else
        setpriv --reuid="$account" --regid="$(id -g "$account")" --clear-groups -- "$@"
    fi
}

end_stage() {
    local pid data
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null; done
    for pid in "${started[@]}"; do wait "$pid" 2>/dev/null; done
    for data in "$work"/server-*/; do
        [ -f "$data/postmaster.pid" ] && as_server "$bindir/pg_ctl" -D "$data" -m immediate stop >/dev/null 2>&1
    done
    [ -n "${KEEP_WORK:-}" ] && say "kept: $work" || rm -rf "$work"
}

begin_stage() {
    local candidate
    account=$(id -un)
    if [ "$account" = root ]; then account=postgres; id "$account" >/dev/null 2>&1 || account=nobody; fi
    for candidate in "${PG_BINDIR:-}" "/usr/lib/postgresql/$MAJOR/bin" "/usr/pgsql-$MAJOR/bin" "$root/target/servers/$MAJOR/bin"; do
        [ -x "$candidate/initdb" ] && bindir=$candidate && break
    done
    [ -n "${bindir:-}" ] || die "needs PostgreSQL $MAJOR (Debian: postgresql-$MAJOR), or PG_BINDIR"
    proxy_program=${PGCUTOVER:-$root/target/debug/pgcutover}
    [ -x "$proxy_program" ] || cargo build --quiet --manifest-path "$root/Cargo.toml" || die 'the proxy could not be built'
    work=$(mktemp -d /tmp/pgcutover-suite-XXXXXX) && chmod 755 "$work"
    trap end_stage EXIT
    trap 'exit 130' INT TERM
}

free_port() {
    python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# start_server NAME [SETTING…]: sets $port. Data in $work/server-NAME.
start_server() {
    local name=$1 data=$work/server-$1
    shift
    port=$(free_port)
    install -d -m 700 -o "$account" "$data"
    as_server "$bindir/initdb" -D "$data" -U postgres -A trust --no-locale -E UTF8 --no-sync >/dev/null || die 'initdb failed'
    {
        printf '%s\n' "port = $port" "listen_addresses = '127.0.0.1'" "unix_socket_directories = '$data'" 'fsync = off' \
            'wal_level = logical' 'max_connections = 200' 'max_prepared_transactions = 2' "$@"
    } >>"$data/postgresql.conf"
    as_server "$bindir/pg_ctl" -D "$data" -l "$data/log" -w -s start || die "the server did not start: $(tail -3 "$data/log")"
}

# start_proxy SERVER_PORT TARGET_PORT [TOML…]: sets $port. Session mode; believes clients, as the servers here do.
start_proxy() {
    local source=$1 target=$2 admin
    shift 2
    port=$(free_port) admin=$(free_port)
    cat >"$work/proxy.toml" <<TOML
[listen]
address = "127.0.0.1:$port"
[admin]
address = "127.0.0.1:$admin"
users = ["postgres"]
[source]
host = "127.0.0.1"
port = $source
user = "postgres"
[target]
host = "127.0.0.1"
port = $target
user = "postgres"
[auth]
method = "trust"
TOML
    printf '%s\n' "$@" >>"$work/proxy.toml"
    "$proxy_program" run -c "$work/proxy.toml" >"$work/proxy.log" 2>&1 &
    started+=($!)
    local waited=0
    until "$bindir/psql" -XAtq -h 127.0.0.1 -p "$port" -U postgres -c 'SELECT 1' postgres >/dev/null 2>&1; do
        waited=$((waited + 1))
        [ "$waited" -lt 300 ] || die "the proxy does not serve: $(tail -3 "$work/proxy.log")"
        kill -0 "${started[-1]}" 2>/dev/null || die "the proxy has ended: $(tail -3 "$work/proxy.log")"
        sleep 0.1
    done
}
