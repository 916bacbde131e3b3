#!/usr/bin/env bash
# clang-tidy over the sources that a build folder of clang++ compiles, but for the corpora, which are wrong on purpose, and
# the virtual GPU, which does what it warns of: macros for keywords, and memory of its own.
#
#   tests/tidy.sh BUILD_FOLDER
set -euo pipefail
cd "$(dirname "$0")/.."
build=${1:?usage: tests/tidy.sh BUILD_FOLDER}
# Precompiled headers hold no sources of ours, and generated files are not ours to tidy.
sed -n 's/^ *"file": "\(.*\)",\?$/\1/p' "$build/compile_commands.json" |
  grep -v -e "^$PWD/build/" -e '/corpus/' -e '/virtual_gpu/' -e '\.cu$' | sort -u > "$build/tidy.txt"
xargs -a "$build/tidy.txt" -P 2 -n 4 clang-tidy --quiet -p "$build" 2> "$build/tidy.log"
echo "clang-tidy: $(wc -l < "$build/tidy.txt") files clean"
