#!/usr/bin/env bash
# Builds the last commit twice, in folders and with a Cargo home of different names, and compares the two programs.
#
#   tests/suites/reproducible.sh [FOLDER]     needs some minutes, 3 GB of disk, and nothing but what `make release` needs;
#                                             both programs stay in FOLDER, if it is given
#
# Exit status: 0 when they are the same, byte for byte. Otherwise the sections that differ are named.
set -euo pipefail
cd "$(dirname "$0")/../.."

# One commit for both, whatever is committed meanwhile.
commit=$(git rev-parse HEAD)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
keep=${1:-$work}
mkdir -p "$keep"
known_home=${CARGO_HOME:-$HOME/.cargo}

build() { # FOLDER CARGO_HOME
    mkdir -p "$1"
    git archive "$commit" | tar -x -C "$1"
    make --silent -C "$1" release CARGO_HOME="$2" >&2
    sha256sum <"$1/target/release/pgcutover"
    mv "$1/target/release/pgcutover" "$keep/$(basename "$1").program"
    rm -rf "$1"
}

# What is downloaded already serves both, here by way of a link.
other_home=$work/another-cargo-home
mkdir -p "$other_home"
for part in registry git config.toml; do
    [ ! -e "$known_home/$part" ] || ln -s "$known_home/$part" "$other_home/$part"
done

one=$(build "$work/one" "$known_home")
two=$(CARGO_HOME=$other_home build "$work/somewhere/quite/else" "$other_home")
size=$(stat -c %s "$keep/one.program")
if [ "$one" = "$two" ]; then
    printf 'the same twice: %s, %s bytes, of commit %s\n' "${one%% *}" "$size" "$commit"
    exit
fi

sections() { # PROGRAM: the name and the digest of each section
    readelf --sections --wide "$1" | sed -n 's/^ *\[ *[0-9]*\] \(\.[^ ]*\).*/\1/p' | while read -r section; do
        printf '%s %s\n' "$section" "$(objcopy --dump-section "$section=/dev/stdout" "$1" /dev/null 2>/dev/null | sha256sum)"
    done
}
printf 'different: %s and %s, of commit %s\n' "${one%% *}" "${two%% *}" "$commit"
cmp "$keep/one.program" "$keep/else.program" | head -1 || true
diff <(sections "$keep/one.program") <(sections "$keep/else.program") | sed -n 's/^[<>] \([^ ]*\).*/differs: \1/p' | sort -u
exit 1
