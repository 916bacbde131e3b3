#!/usr/bin/env bash
# The teaching contract, checked: stubs are red for the right reason, solutions only add to them, nothing that a student
# needs is missing.
#
#   tests/teaching_contract.sh        from the root; configures and builds the preset learn
set -u
cd "$(dirname "$0")/.." || exit 2
passed=0
failed=0
ok() {
  if [ "$1" = 0 ]; then
    passed=$((passed + 1))
  else
    failed=$((failed + 1))
    echo "not ok: $2"
  fi
}
check() {  # check "what must hold" command...
  local what=$1
  shift
  "$@"
  ok $? "$what"
}
quietly() { "$@" > /dev/null 2>&1; }

cmake --preset learn -DKATA_WERROR=ON > /dev/null && cmake --build --preset learn > build/learn/contract.log 2>&1
ok $? "every stub compiles without a warning (build/learn/contract.log)"

# The manifest, one line a step: label folder files...
manifest() {
  sed -n 's/.*"label": "\([^"]*\)".*"folder": "\([^"]*\)".*"files": \[\([^]]*\)\].*/\1 \2 \3/p' build/learn/course.json |
    tr -d '",'
}
idea() { sed -n "s/.*\"label\": \"$1\".*\"idea\": \"\([^\"]*\)\".*/\1/p" build/learn/course.json; }
steps=$(manifest | wc -l)
check "the manifest lists steps" [ "$steps" -gt 0 ]

# What a stub's lines become in its solution: the TODO and the throw go, everything else stays, in order.
only_adds() {
  diff <(grep -v -e '// TODO' -e 'throw NotImplemented' "$1" | awk '
           /^ *\/\// && todo { next }  # the rest of a TODO comment
           { todo = 0; print }') "$2" | grep '^<' | grep -v '^< *\(//.*\)\?$'
  [ "${PIPESTATUS[2]}" != 0 ]
}

# Does an answer find in its own folder what it includes? The stub's folder may not have it.
includes_nothing_beside() {
  local name
  for name in $(sed -n 's/^ *# *include *"\([^"]*\)".*/\1/p' "$1"); do
    if [ -e "$(dirname "$1")/$name" ]; then return 1; fi
  done
}

tests=0
red=0
while read -r label folder files; do
  readme=$folder/README.md
  check "$label has a README" [ -f "$readme" ]
  check "$readme begins with a title" quietly grep -q '^# [1-4]\.[0-9][0-9] ' <(head -1 "$readme")
  check "$readme asks a question" quietly grep -q '^> .*?' "$readme"
  for level in 1 2 3; do
    check "$readme has hint $level" quietly grep -q "<summary>Hint $level: " "$readme"
  done
  check "$readme closes its hints" [ "$(grep -c '<details>' "$readme")" = "$(grep -c '</details>' "$readme")" ]
  check "$readme says what to think about when it passes" quietly grep -q '^## When it passes' "$readme"
  check "README.md lists $label with its file and idea" quietly grep -qF "($folder/README.md) | \`$folder/${files%% *}\` | $(idea "$label") |" README.md

  for file in $files; do
    stub=$folder/$file
    solution=solutions/hidden/$folder/$file
    check "$stub says how much is to be done" quietly grep -qE '// TODO, about [0-9]+ lines' "$stub"
    check "$stub is loud about being unfilled" quietly grep -q 'throw NotImplemented(__FILE__);' "$stub"
    check "$solution exists" [ -f "$solution" ]
    check "$solution is filled" quietly grep -vq 'NotImplemented' "$solution"
    check "$solution only adds to $stub" only_adds "$stub" "$solution"
    check "$solution can be copied over $stub: what it includes is not beside it" includes_nothing_beside "$solution"
  done

  summary=$(mktemp)
  "build/learn/$folder/${label}_test" "--summary=$summary" > /dev/null 2>&1
  [ $? != 0 ]
  ok $? "the stub of $label fails"
  check "the stub of $label fails as not implemented" quietly grep -q '"not_implemented": true' "$summary"
  of_step=$(grep -c '"status": ' "$summary")
  red_of_step=$(grep -c '"status": "failed"' "$summary")
  skipped=$(grep -c '"status": "skipped"' "$summary")
  check "every test of $label is red on the stub ($red_of_step of $of_step)" [ "$((red_of_step + skipped))" = "$of_step" ]
  check "$label has tests that are not skipped" [ "$red_of_step" -gt 0 ]
  check "$label has tests" [ "$of_step" -gt 0 ]
  tests=$((tests + of_step))
  red=$((red + red_of_step))
  rm -f "$summary"
done < <(manifest)

# clang-format 14 or newer agrees with every file.
if command -v clang-format > /dev/null; then
  unformatted=$(git ls-files '*.cpp' '*.hpp' '*.cu' '*.cuh' | xargs clang-format --dry-run 2>&1 | grep -c 'warning:')
  check "every file is formatted ($unformatted places are not)" [ "$unformatted" = 0 ]
else
  echo "skipped: formatting, because clang-format is not installed"
fi

echo "$steps steps, $tests tests, $red of them red on the stubs"
echo "teaching contract: $passed passed, $failed failed"
[ "$failed" = 0 ] && [ "$tests" -gt 0 ]
