#!/usr/bin/env bash
# Builds the last commit twice, in folders and with a Cargo home of different names, and compares the two programs.
#
#   tests/suites/reproducible.sh          needs some minutes, 3 GB of disk, and nothing but what `make release` needs
#
# Exit status: 0 when they are the same, byte for byte.
set -euo pipefail
cd "$(dirname "$0")/../.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
known_home=${CARGO_HOME:-$HOME/.cargo}

build() { # FOLDER CARGO_HOME
    mkdir -p "$1"
    git archive HEAD | tar -x -C "$1"
    make --silent -C "$1" release CARGO_HOME="$2" >&2
    sha256sum <"$1/target/release/pgcutover"
    mv "$1/target/release/pgcutover" "$work/$(basename "$1").program"
    rm -rf "$1"
}

# What is downloaded already serves both.
other_home=$work/another-cargo-home
mkdir -p "$other_home"
for part in registry git config.toml; do
    [ ! -e "$known_home/$part" ] || ln -s "$known_home/$part" "$other_home/$part"
done

one=$(build "$work/one" "$known_home")
two=$(CARGO_HOME=$other_home build "$work/somewhere/quite/else" "$other_home")
size=$(stat -c %s "$work/one.program")
if [ "$one" = "$two" ]; then
    printf 'the same twice: %s, %s bytes\n' "${one%% *}" "$size"
else
    printf 'different: %s and %s\n' "${one%% *}" "${two%% *}"
    cmp "$work/one.program" "$work/else.program" | head -1
    exit 1
fi
