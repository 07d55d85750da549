#!/bin/sh
# What a newcomer does, timed: clone into an empty folder, new environment, make demo, make test.
#     sh tests/fresh_clone.sh [folder]
set -e
here=$(cd "$(dirname "$0")/.." && pwd)
to=${1:-$(mktemp -d)}/clone
git clone -q "$here" "$to"
cd "$to"
for target in demo test; do
    start=$(date +%s)
    make $target
    echo "make $target: $(($(date +%s) - start)) s"
done
