#!/usr/bin/env bash
# Runs every fuzz target of the repository for the given time (default 60s), one after another.
set -euo pipefail
time=${1:-60s}
n=0
while IFS=: read -r file name; do
  dir=./$(dirname "$file")
  echo "== $dir $name ($time)"
  go test -run "^$" -fuzzminimizetime 10x -fuzz "^$name\$" -fuzztime "$time" "$dir"
  n=$((n + 1))
done < <(grep -roE --include='*_test.go' '^func (Fuzz[A-Za-z0-9_]+)' . | sed -E 's|^\./||; s|func ||')
echo "$n fuzz targets ran clean for $time each"
