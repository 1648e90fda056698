#!/usr/bin/env bash
# Makes what config/docker/Dockerfile makes without a container engine, and starts it as the container would be started.
#
#   sudo tests/suites/image.sh PROGRAM [PACKAGE.deb]       needs debootstrap, unshare and the Debian archive
#   DEBIAN_BASE=FOLDER                                     keeps what debootstrap made, for the next time
#
# The last stage of the Dockerfile is carried out in a folder: its FROM by debootstrap, its RUN in there, PROGRAM for what the
# first stage builds. Then ENTRYPOINT runs as USER, on a read-only root with nothing but /tmp to write to. A Debian package,
# if there is one, is installed into a second such folder, asked for its version, and removed.
# Exit status: 0 when everything works.
set -euo pipefail
cd "$(dirname "$0")/../.."

program=$(realpath "$1")
package=${2:+$(realpath "$2")}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
say() { printf 'image: %s\n' "$*"; }

# The last stage, a line for each instruction.
stage=$(sed -e ':a' -e '/\\$/{N;s/ *\\\n */ /;ba' -e '}' config/docker/Dockerfile | grep -v '^#' | tac | sed '/^FROM/q' | tac)
instruction() { sed -n "s/^$1 //p" <<<"$stage" | tail -1; }
release=$(instruction FROM | sed 's/^debian:\(.*\)-slim$/\1/')

base=${DEBIAN_BASE:-$work/base}
[ -e "$base/etc/debian_version" ] || debootstrap --variant=minbase "$release" "$base" >"$work/log" 2>&1 || { tail -5 "$work/log"; exit 1; }
cp -a "$base" "$work/image"
cp /etc/resolv.conf "$work/image/etc/resolv.conf"
chroot "$work/image" env DEBIAN_FRONTEND=noninteractive /bin/sh -ec "$(instruction RUN)" >"$work/log" 2>&1 || { tail -5 "$work/log"; exit 1; }
install -m 755 "$program" "$work/image$(instruction COPY | awk '{print $NF}')"
say "the last stage is made: $(du -sm "$work/image" | cut -f1) MB"

# ENTRYPOINT and CMD are lists of words in JSON.
entrypoint=$(instruction ENTRYPOINT | tr -d '[]",')
user=$(instruction USER)
contained() { # WORDS…: in the image, as its user, on a read-only root
    unshare --mount --pid --fork --ipc bash -ec '
        mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"; mount -t tmpfs none "$0/tmp"; mount -t proc none "$0/proc"
        cp "$1" "$0/tmp/pgcutover.toml" 2>/dev/null || true
        user=$2; shift 2
        exec chroot --userspec="$user" "$0" "$@"' "$work/image" "$config" "$user" "$@"
}
config=$work/pgcutover.toml
printf '[source]\nhost = "127.0.0.1"\nport = 1\nuser = "u"\n[target]\nhost = "127.0.0.1"\nport = 2\nuser = "u"\n[listen]\naddress = "127.0.0.1:0"\n[admin]\naddress = "127.0.0.1:0"\n' >"$config"

contained $entrypoint --version
contained pg_dump --version
contained /bin/sh -c 'test "$(id -u)" != 0 && ! touch /etc/x 2>/dev/null && touch /tmp/x'
say "it runs as $user, and can write to /tmp alone"
# Until both servers answer it serves and says what is missing; a container is stopped by the signal that STOPSIGNAL names.
stop=$(instruction STOPSIGNAL | sed s/^SIG//)
said=$(contained /bin/sh -c "$entrypoint run -c /tmp/pgcutover.toml & sleep 2; kill -s $stop \$!; wait \$!" 2>&1) ||
    { printf '%s\n' "$said" | tail -5; exit 1; }
grep -q 'HTTP listens' <<<"$said" || { printf '%s\n' "$said" | tail -5; exit 1; }
say "it starts, and ends by SIG$stop with exit status 0"

[ -n "$package" ] || exit 0
cp -a "$base" "$work/debian"
cp /etc/resolv.conf "$work/debian/etc/resolv.conf"
cp "$package" "$work/debian/package.deb"
chroot "$work/debian" env DEBIAN_FRONTEND=noninteractive /bin/sh -ec '
    apt-get update -q; apt-get install -y -q --no-install-recommends /package.deb; pgcutover --version
    dpkg -L pgcutover | grep -E "systemd|pgcutover.toml|man1"; apt-get purge -y -q pgcutover; test ! -e /usr/bin/pgcutover' >"$work/log" 2>&1 ||
    { tail -5 "$work/log"; exit 1; }
say "the package installs, runs and goes: $(grep -m1 '^pgcutover ' "$work/log")"
