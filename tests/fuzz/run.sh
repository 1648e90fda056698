#!/usr/bin/env bash
# Runs every fuzz target so many executions, one at a time, and says what came of each.
#
#   tests/fuzz/run.sh [EXECUTIONS] [TARGET…]        10000000 of all targets unless told otherwise
#
# Needs a nightly toolchain and cargo-fuzz (`cargo install cargo-fuzz --locked`).
#   SANITIZER=address     with AddressSanitizer; without it inputs run several times faster
#   KEEP=1                afterwards, add to tests/fuzz/corpus what found new code, minimised
#
# Inputs found are in tests/fuzz/target/found/TARGET and are where the next run goes on; an input that breaks a promise is
# in tests/fuzz/artifacts/TARGET: move it to tests/fuzz/corpus/TARGET once it is mended, and `cargo test` replays it.
# Exit status: 0 when no target failed.

set -uo pipefail
cd "$(dirname "$0")" || exit 1

executions=${1:-10000000}
shift || true
sanitizer=${SANITIZER:-none}
# The corpus in the repository stays small: inputs no longer than this, so many for a target.
kept_bytes=1024 kept_inputs=60

# Texts that people write are short, and their readers slow.
longest() { case $1 in config | console | dump | ledger | properties) echo 512 ;; *) echo 4096 ;; esac }

say() { printf 'fuzz: %s\n' "$*"; }

if ! cargo +nightly --version >/dev/null 2>&1; then
    say 'a nightly toolchain is needed: rustup toolchain install nightly' >&2
    exit 1
fi
if ! cargo +nightly fuzz --version >/dev/null 2>&1; then
    say 'cargo-fuzz is needed: cargo install cargo-fuzz --locked' >&2
    exit 1
fi

targets=("$@")
[ ${#targets[@]} -gt 0 ] || for file in targets/*.rs; do targets+=("$(basename "$file" .rs)"); done

# A target folder for each sanitizer: the whole dependency tree is built differently.
built=$PWD/target/$sanitizer
(cd ../.. && cargo +nightly fuzz build --fuzz-dir tests/fuzz --target-dir "$built" -s "$sanitizer") || exit 1
programs=$(dirname "$(find "$built" -path '*/release/startup' -type f -perm -u+x | head -1)")

failed=0
for target in "${targets[@]}"; do
    mkdir -p "target/found/$target" "artifacts/$target"
    log=target/found/$target.log
    if "$programs/$target" -runs="$executions" -max_len="$(longest "$target")" -timeout=10 -rss_limit_mb=1024 -print_final_stats=1 \
        -artifact_prefix="artifacts/$target/" "target/found/$target" "corpus/$target" >"$log" 2>&1; then
        done_in=$(sed -n 's/^Done \([0-9]*\) runs in \([0-9]*\) second.*/\1 executions in \2 s/p' "$log")
        coverage=$(grep -o 'cov: [0-9]* ft: [0-9]* corp: [^ ]*' "$log" | tail -1)
        say "$target: $done_in, no failure ($coverage)"
    else
        say "$target: FAILED, see tests/fuzz/$log and tests/fuzz/artifacts/$target"
        failed=1
        continue
    fi
    [ -n "${KEEP:-}" ] || continue
    # The fewest and smallest inputs that reach all that was reached, those of the repository first.
    rm -rf "target/kept/$target" && mkdir -p "target/kept/$target"
    "$programs/$target" -merge=1 -max_len="$kept_bytes" "target/kept/$target" "corpus/$target" "target/found/$target" \
        >/dev/null 2>&1 || continue
    find "target/kept/$target" -type f -size -"$((kept_bytes + 1))"c -printf '%s %p\n' | sort -n | head -"$kept_inputs" |
        while read -r _ input; do
            # Seeds are there already, under their own names.
            sum=$(sha1sum <"$input")
            sha1sum "corpus/$target"/* | grep -q "^${sum%% *}" || cp "$input" "corpus/$target/"
        done
done
exit "$failed"
