#!/usr/bin/env bash
# Adds a step to a scratch copy by following CONTRIBUTING.md to the letter: each file named before a code block is written
# with that block, the manifest gets its line, and the commands of the last block must succeed.
set -eu
cd "$(dirname "$0")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
git ls-files -z | xargs -0 cp --parents -t "$scratch"
cd "$scratch"
git init -q . && git add -A

awk '
  /^`[^`]+`:$/ { file = substr($0, 2, length($0) - 3); next }
  /^```/ && writing { close(file); file = ""; writing = 0; next }
  /^```[a-z]+$/ && file != "" { system("mkdir -p $(dirname " file ")"); writing = 1; printf "" > file; next }
  writing { print > file }' CONTRIBUTING.md
sed -n '/^```cmake$/,/^```$/p' CONTRIBUTING.md | grep '^add_exercise' >> phase1_eager/CMakeLists.txt
echo '| [1.06](phase1_eager/06_row_mean/README.md) | row_mean.cpp | one number for many |' >> README.md
git add -A

for file in phase1_eager/06_row_mean/row_mean.{hpp,cpp} solutions/hidden/corpus/phase1_eager/06_row_mean.cpp; do
  [ -s "$file" ] || { echo "CONTRIBUTING.md did not produce $file"; exit 1; }
done
clang-format -i phase1_eager/06_row_mean/*.?pp solutions/hidden/{,corpus/}phase1_eager/06_row_mean*{.cpp,/*.cpp} 2> /dev/null || true

cmake --preset solutions -DKATA_PROGRAM=OFF > /dev/null
cmake --build --preset solutions --target phase1.06_row_mean_test > build/log 2>&1 ||
  { tail -n 30 build/log; exit 1; }
cmake --build --preset solutions --target record_phase1.06_row_mean | tail -n 1
[ -s common/testing/fingerprints/phase1.06_row_mean.json ]
ctest --test-dir build/solutions -R 'row_mean' --output-on-failure | tail -n 6
cmake --preset learn -DKATA_PROGRAM=OFF > /dev/null
cmake --build --preset learn --target phase1.06_row_mean_test > build/log 2>&1 || { tail -n 30 build/log; exit 1; }
if build/learn/phase1_eager/06_row_mean/phase1.06_row_mean_test > build/log; then
  echo "the new stub is not red"
  exit 1
fi
grep -q 'not implemented yet' build/log
echo "CONTRIBUTING.md adds a step that builds, is red unfilled and green filled"
