#!/usr/bin/env bash
# Makes what config/docker/Dockerfile makes without a container engine, and starts it as the container would be started.
#
#   sudo tests/suites/image.sh PROGRAM [PACKAGE.deb]       needs debootstrap, unshare and the Debian archive
#   DEBIAN_BASE=FOLDER                                     keeps what debootstrap made, for the next time
#
# The last stage of the Dockerfile is carried out in a folder: its FROM by debootstrap, its RUN in there, PROGRAM for what the
# first stage builds. Then ENTRYPOINT runs as USER, on a read-only root with nothing but /tmp to write to. A Debian package,
# if there is one, is installed into a second such folder, its service's command is run as its user, and it is removed.
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
inside=(chroot "$work/debian" env DEBIAN_FRONTEND=noninteractive PATH=/usr/sbin:/usr/bin:/sbin:/bin)
in_debian() { "${inside[@]}" "$@"; }
# Slim images leave manual pages out; here they are what is looked for.
rm -f "$work/debian/etc/dpkg/dpkg.cfg.d/docker"
in_debian /bin/sh -ec 'apt-get update -q; apt-get install -y -q --no-install-recommends /package.deb' >"$work/log" 2>&1 || { tail -5 "$work/log"; exit 1; }
say "the package installs: $(in_debian pgcutover --version)"
for file in share/man/man1/pgcutover.1.gz share/bash-completion/completions/pgcutover share/zsh/vendor-completions/_pgcutover \
    share/fish/vendor_completions.d/pgcutover.fish share/doc/pgcutover/README.md share/doc/pgcutover/docs/runbook.md; do
    [ -s "$work/debian/usr/$file" ] || { say "the package has no /usr/$file"; exit 1; }
done

# What systemd would do with the unit, as far as it can be done without it: its command, as its user, without capabilities.
unit=$work/debian/usr/lib/systemd/system/pgcutover.service
setting() { sed -n "s/^$1=//p" "$unit" | tail -1; }
if command -v systemd-analyze >/dev/null; then
    # Outside, where the rest of systemd's units may be; the program is inside.
    mkdir "$work/units"
    for file in "$unit" "${unit%.service}.socket"; do sed "s#^ExecStart=#&$work/debian#" "$file" >"$work/units/${file##*/}"; done
    said=$(systemd-analyze verify --man=no "$work/units"/pgcutover.* 2>&1 | grep pgcutover || true)
    [ -z "$said" ] || { printf '%s\n' "$said"; exit 1; }
    exposure=$(systemd-analyze security --offline=true --threshold=20 "$work/units/pgcutover.service" 2>/dev/null) || { say "the unit leaves too much open"; exit 1; }
    say "systemd-analyze finds nothing wrong with the units$(sed -n 's/.*Overall exposure level for pgcutover.service: \([0-9.]*\).*/; exposure \1/p' <<<"$exposure")"
fi
service=$(setting User)
as_service=("${inside[@]}" setpriv --reuid="$service" --regid="$(setting Group)" --init-groups --no-new-privs --inh-caps=-all --bounding-set=-all)
"${as_service[@]}" test -r /etc/pgcutover/pgcutover.toml || { say "$service cannot read the configuration"; exit 1; }
in_debian setpriv --reuid=nobody --regid=nogroup --clear-groups test ! -r /etc/pgcutover/pgcutover.toml || { say "everybody can read the configuration"; exit 1; }
# As an administrator would: passwords in files of their own that only the group may read.
in_debian /bin/sh -ec 'cd /etc/pgcutover; umask 027; echo secret >source-password; chgrp pgcutover source-password
    cat >pgcutover.toml' <<TOML
[source]
host = "127.0.0.1"
port = 1
user = "u"
password_file = "source-password"
[target]
host = "127.0.0.1"
port = 2
user = "u"
[listen]
address = "127.0.0.1:0"
unix_socket_dir = "/run/pgcutover"
[admin]
address = "127.0.0.1:0"
TOML
[ "$(in_debian stat -c '%U:%G %a' /etc/pgcutover/pgcutover.toml)" = 'root:pgcutover 640' ] || { say "the configuration is not readable for the group alone"; exit 1; }
in_debian install -d -o "$service" -g "$(setting Group)" -m "$(setting RuntimeDirectoryMode)" "/run/$(setting RuntimeDirectory)"
in_debian mount -t proc none /proc
trap 'umount --lazy "$work/debian/proc" 2>/dev/null; rm -rf "$work"' EXIT
touch "$work/service"
"${as_service[@]}" $(setting ExecStart) >"$work/service" 2>&1 &
started=$!
failed() { say "$*"; tail -5 "$work/service"; kill -9 "$started" 2>/dev/null; exit 1; }
heard() { for _ in $(seq 600); do grep -q "$1" "$work/service" && return; kill -0 "$started" 2>/dev/null || break; sleep 0.1; done; failed "the service does not say: $1"; }
heard 'HTTP listens'
in_debian setpriv --reuid=nobody --regid=nogroup --clear-groups test -w "$(in_debian sh -c 'ls /run/pgcutover/.s.PGSQL.*')" ||
    failed "others cannot come in by the Unix socket"
# chroot, env and setpriv have become the program: it has their process id. ExecReload's signal, then that of a stop.
echo renewed >"$work/debian/etc/pgcutover/source-password"
kill -HUP "$started"
heard 'configuration.*read again'
kill -TERM "$started"
wait "$started" || failed "it ended with status $?"
say "its service starts as $service, reads its configuration again, is open to others by its Unix socket, and ends with 0"
umount "$work/debian/proc"

in_debian /bin/sh -ec 'apt-get purge -y -q pgcutover; test ! -e /usr/bin/pgcutover; test ! -e /etc/pgcutover/pgcutover.toml' >"$work/log" 2>&1 || { tail -5 "$work/log"; exit 1; }
say "the package goes"
