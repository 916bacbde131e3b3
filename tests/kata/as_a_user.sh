#!/usr/bin/env bash
# Plays a student, then an instructor, on a scratch clone: fills stubs, breaks them, saves while ./kata watches, presses
# Ctrl-C, loses its state, hands out, grades. Prints "ok" or "not ok" for each expectation; exits 1 if any is not met.
# The clone has what lies in the working tree, committed or not.
set -u
unset KATA_PRESET KATA_COURSE NO_COLOR CXX
export LC_ALL=C # plain quotes in the compiler's words
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=safe.directory GIT_CONFIG_VALUE_0='*'

root=$(cd "$(dirname "$0")/../.." && pwd)
scratch=$(mktemp -d "${TMPDIR:-/tmp}/as_a_user.XXXXXX")
course=$scratch/course
watch_pid=
finish() {
  [ -z "$watch_pid" ] || kill -KILL "$watch_pid" 2> /dev/null
  mountpoint -q "$course/.kata" 2> /dev/null && umount "$course/.kata"
  rm -rf "$scratch"
}
trap finish EXIT
trap 'exit 130' INT TERM

passed=0 failed=0 started=$SECONDS
out='' code=0
# run COMMAND...: keeps what it prints in $out and its exit code in $code.
run() {
  out=$("$@" 2>&1 < /dev/null)
  code=$?
}
# check SENTENCE CONDITION...: one expectation about the last run.
check() {
  local sentence=$1
  shift
  if "$@"; then
    passed=$((passed + 1))
    echo "ok      $sentence"
  else
    failed=$((failed + 1))
    echo "not ok  $sentence  (wanted: $*; exit code $code)"
    sed 's/^/        | /' <<< "$out" | tail -n 30
  fi
}
skip() { echo "ok      $1  # skipped: $2"; }
flat() { printf %s "$1" | tr -s ' \n' ' '; } # lines are wrapped wherever they are too long
says() { grep -qF -e "$(flat "$1")" <<< "$(flat "$out")"; }
never_says() { ! says "$1"; }
exits() { [ "$code" -eq "$1" ]; }
same() { cmp -s "$1" "$2"; }
differ() { ! cmp -s "$1" "$2"; }
absent() { [ ! -e "$1" ]; }
section() { printf '\n# %s (%s s)\n' "$1" "$((SECONDS - started))"; }
# wait_for SECONDS FILE TEXT: until the text is in the file.
wait_for() {
  local i
  for ((i = 0; i < $1 * 10; i++)); do
    grep -qF -e "$3" "$2" && return 0
    sleep 0.1
  done
  return 1
}

hidden=solutions/hidden
softmax=phase1_eager/01_softmax/softmax.cpp
attention=phase1_eager/02_attention/attention.cpp
author=(-c user.name=Student -c user.email=student@localhost -c commit.gpgsign=false)

git clone -q "$root" "$course" 2> /dev/null || git init -q "$course"
(cd "$root" && git ls-files -z -co --exclude-standard | while IFS= read -r -d '' file; do
  if [ -e "$file" ]; then printf '%s\0' "$file"; fi
done | tar --null -T - -cf -) | tar -xf - -C "$course"
cd "$course" || exit 1
git add --all && git "${author[@]}" commit -qm 'as the working tree is' 2> /dev/null
cp "$softmax" "$scratch/softmax.stub"
cp "$attention" "$scratch/attention.stub"

section "the first minute"
run ./kata
check "the first page appears" exits 0
check "it names the first file to open" says "open       $softmax"
check "it says what to type" says "./kata test"
check "nothing is done yet" says "0 of "
check "and the question of the step is there" says "?"
run ./kata test
check "an unfilled stub is red" exits 1
check "and kindly so" says "not implemented"
check "with the file to open" says "$softmax"
run ./kata test all
check "so are all of them" exits 1
run ./kata list
check "list shows the steps" says "1.02 attention"

section "names, help and mistakes in typing"
for name in 1.01 1.1 softmax 01_softmax phase1.01_softmax phase1_eager/01_softmax "$softmax"; do
  run ./kata test "$name"
  check "a step may be called $name" says "phase1.01_softmax"
done
run ./kata test atention
check "a wrong step is refused" exits 2
check "and the near one is named" says "did you mean 1.02 (attention)?"
run ./kata wacth
check "a wrong command is refused" exits 2
check "and the near one is named" says "did you mean ./kata watch?"
run ./kata attention
check "a step without its command is understood" says "did you mean ./kata test 1.02?"
run ./kata test 1.02 --case none
check "a bad option value is refused" exits 2
check "and the help is named" says "./kata test --help"
for command in test bench next watch hint solution reset list doctor verify handout grade; do
  run "./kata" "$command" --help
  check "$command --help has an example" says "Example: ./kata $command"
done
run ./kata --preset nosuch list
check "a preset that does not exist is refused" exits 1

section "hints, and no solution before its time"
run ./kata hint softmax
check "the first hint comes first" says "Hint 1"
check "and only that" never_says "Hint 2"
run ./kata hint softmax
check "then the second" says "Hint 2"
run ./kata hint softmax
check "then the third" says "Hint 3"
run ./kata hint softmax
check "then no more" says "no more hints"
check "and still not the solution" never_says "+  "
run ./kata hint softmax --again
check "all three are there once more" says "Hint 1"
run ./kata solution softmax
check "the solution is refused before a pass" exits 1
check "and the way on is named" says "--i-give-up"
run ./kata solution softmax --i-give-up
check "giving up opens it" says "+++ b/$hidden/$softmax"
check "and it stands alone" never_says "which the answer includes"
run ./kata solution 2.04 --i-give-up
check "an answer that includes what others include, too, shows that as well" says "+++ b/$hidden/fp32_forward_tile.cuh"
check "and what that includes, and names them" says \
  "$hidden/fp32_forward_tile.cuh, $hidden/fp32_vector.cuh, which the answer includes from there"

section "filling, breaking, mending"
cp "$hidden/$softmax" "$softmax"
run ./kata test
check "a right answer is green" exits 0
check "the next command is named" says "./kata next"
run ./kata next
check "next names the next file" says "$attention"
run ./kata
check "the page has moved on" says "open       $attention"
check "and counts" says "1 of "
run ./kata solution softmax
check "after the pass the solution opens" exits 0
check "and is the same" says "no difference"

sed -i 's/return weights;/return 2.0f * weights;/' "$softmax"
check "(the answer was really broken)" differ "$softmax" "$hidden/$softmax"
run ./kata test 1.01
check "a wrong answer is red" exits 1
check "and says where" says "first at ["
check "and how to repeat it" says "./kata test 1.01 --"
run ./kata
check "the page goes back to it" says "open       $softmax"
check "and says how it stands" says "fail"
run ./kata solution softmax
check "its solution is closed again" exits 1
run ./kata test 1.01 --name 'no test is called this'
check "a test that does not exist is said" says "no test's name contains"
check "and is no pass" exits 2

cp "$hidden/$softmax" "$softmax"
touch -d 2001-01-01 "$softmax"
run ./kata test 1.01
check "a file put back with an old time is judged anew" exits 0

cp "$hidden/$softmax" "$softmax"
echo 'int broken = ;' >> "$softmax"
line=$(wc -l < "$softmax")
run ./kata test 1.01
check "what does not compile is red" exits 1
check "with file and line from the root" says "$softmax:$line:"
check "and without the compiler's command" never_says "-std="
run ./kata
check "the page says so too" says "does not compile"

sed 's/^Matrix softmax_rows(/Matrix softmax_row(/' "$hidden/$softmax" > "$softmax"
run ./kata test 1.01
check "a changed signature is the linker's complaint, in words" says "must be defined once"

sed 's/return weights;/for (volatile int i = 0;;) i = i + 1;/' "$hidden/$softmax" > "$softmax"
timeout --foreground -s INT 8 ./kata test 1.01 > "$scratch/loop.log" 2>&1
out=$(cat "$scratch/loop.log") code=0
check "an endless loop can be stopped" says "stopped"
check "and leaves no process behind" test -z "$(pgrep -f "$course/build/learn/.*01_softmax_test")"

sed 's/return weights;/return *static_cast<Matrix*>(nullptr);/' "$hidden/$softmax" > "$softmax"
run ./kata test 1.01
check "a crash is red" exits 1
check "and is named" says "crashed with SIG"

section "reset"
cp "$softmax" "$scratch/mine"
run ./kata reset softmax
check "reset ends well" exits 0
check "the stub is back" same "$softmax" "$scratch/softmax.stub"
check "mine is in the backup" same "$scratch/mine" "$(find .kata/backups/phase1.01_softmax -name softmax.cpp | tail -n 1)"
run ./kata reset softmax
check "a second reset has nothing to do" says "nothing to do"
cp "$hidden/$softmax" "$softmax"
git "${author[@]}" commit -qam 'my answer'
run ./kata reset softmax
check "an answer that was committed can be reset too" same "$softmax" "$scratch/softmax.stub"
check "and the stub's commit is named" says "from commit"
rm "$softmax"
run ./kata
check "a file that is gone is said" says "its file is gone"
run ./kata reset softmax
check "and comes back" same "$softmax" "$scratch/softmax.stub"

section "watch"
./kata watch > "$scratch/watch.log" 2>&1 < /dev/null &
watch_pid=$!
run wait_for 60 "$scratch/watch.log" "save $softmax for a verdict"
check "it watches the first step" exits 0
sed 's/return weights;/return 2.0f * weights;/' "$hidden/$softmax" > "$softmax"
run wait_for 30 "$scratch/watch.log" "tests pass"
out=$(cat "$scratch/watch.log")
check "a save brings a verdict" exits 0
check "a wrong one, here" says "first at ["
check "and it stays with the step" never_says "softmax passes"
echo 'int broken = ;' >> "$softmax"
run wait_for 30 "$scratch/watch.log" "does not compile"
check "an error of the compiler is shown" exits 0
before=$(date +%s%N)
cp "$hidden/$softmax" "$scratch/new" && mv "$scratch/new" "$softmax" # as editors save
run wait_for 30 "$scratch/watch.log" "1.01 softmax passes"
after=$(date +%s%N)
check "the right answer passes ($(((after - before) / 1000000)) ms after the save)" exits 0
run wait_for 30 "$scratch/watch.log" "save $attention for a verdict"
check "and it moves on to the next step" exits 0
kill -INT "$watch_pid"
wait "$watch_pid"
code=$?
watch_pid=
out=$(cat "$scratch/watch.log")
check "Ctrl-C ends it" exits 130
check "with a word" says "stopped watching"
check "and nothing half written" test -z "$(find . -name '*.kata-*')"
check "the answer is as it was saved" same "$softmax" "$hidden/$softmax"

cp "$hidden/$attention" "$attention"
./kata test 1.02 > "$scratch/test.log" 2>&1 < /dev/null &
watch_pid=$!
sleep 0.5
kill -INT "$watch_pid"
wait "$watch_pid"
watch_pid=
run ./kata test 1.02
check "a build that was interrupted goes on" exits 0

section "each hidden solution moves the page on"
labels=$(sed -n 's/.*"label": "\(phase1[^"]*\)".*/\1/p' build/learn/course.json)
total=$(grep -c '"label"' build/learn/course.json)
cp "$scratch/attention.stub" "$attention"
count=0
for label in $labels; do
  folder=$(sed -n "s/.*\"label\": \"$label\".*\"folder\": \"\([^\"]*\)\".*/\1/p" build/learn/course.json)
  cp -r "$hidden/$folder/." "$folder/"
  count=$((count + 1))
  run ./kata
  check "$label: $count of $total" says "$count of $total steps"
done
check "phase 1 is full" says "$count/$count"
run ./kata test phase1
check "and passes as a whole" exits 0

section "state that is lost, damaged or cannot be written"
rm -rf .kata
run ./kata
check "without .kata everything is found again" says "$count of $total steps"
echo '{"verdicts": {"learn/phase1.01_softmax": {"state": 7' > .kata/progress.json
run ./kata
check "a damaged memory is no problem" says "$count of $total steps"
before=$(date +%s%N)
run ./kata list
after=$(date +%s%N)
check "up to date, it answers at once ($(((after - before) / 1000000)) ms)" test $(((after - before) / 1000000)) -lt 1000
rm -rf .kata && touch .kata # also root cannot write below a file
run ./kata
check "an unwritable .kata does not hide the page" says "$count of $total steps"
check "but is said" says "cannot write .kata/progress.json"
run ./kata reset softmax
check "a reset without a backup is refused" exits 1
check "naming the path" says "$course/.kata/backups/phase1.01_softmax"
check "and nothing is lost" same "$softmax" "$hidden/$softmax"
rm .kata && mkdir .kata
if mount -t tmpfs -o size=16k tmpfs .kata 2> /dev/null; then
  head -c 100000 /dev/zero > .kata/full 2> /dev/null
  run ./kata reset softmax
  check "on a full disk, too" exits 1
  check "nothing is lost there" same "$softmax" "$hidden/$softmax"
  run ./kata
  check "and the page appears" says "$count of $total steps"
  umount .kata
else
  skip "on a full disk, too" "mount is not allowed here"
fi

section "colours"
if command -v script > /dev/null; then
  run env TERM=xterm script -qec ./kata /dev/null
  check "a terminal gets colours" says $'\033['
  run env TERM=xterm NO_COLOR=1 script -qec ./kata /dev/null
  check "unless NO_COLOR is set" never_says $'\033['
else
  skip "colours" "script is not installed"
fi
run ./kata
check "a pipe never gets them" never_says $'\033['

section "without tools"
git clone -q . "$scratch/bare"
mkdir "$scratch/bin"
for tool in sh cat sed tr grep id rm mktemp sleep tail readlink; do ln -s "$(command -v $tool)" "$scratch/bin/$tool"; done
printf '#!/bin/sh\necho "must not be called" >&2\nexit 1\n' > "$scratch/bin/apt-get"
chmod +x "$scratch/bin/apt-get"
run env PATH="$scratch/bin" "$scratch/bare/kata" --no-install
check "--no-install refuses" exits 1
check "with the command to type" says "apt-get install --no-install-recommends g++ cmake ninja-build git"
check "and installs nothing" never_says "must not be called"
mv "$scratch/bin/apt-get" "$scratch/bin/dnf"
run env PATH="$scratch/bin" "$scratch/bare/kata"
check "dnf's command is named" says "sudo dnf install gcc-c++ cmake ninja-build git doctest-devel"
mv "$scratch/bin/dnf" "$scratch/bin/brew"
run env PATH="$scratch/bin" "$scratch/bare/kata"
check "brew's command is named" says "brew install gcc cmake ninja git doctest"

section "bench"
run ./kata bench 1.02
check "there is nothing to measure in a step on one head" exits 2
check "which steps there are is said" says "2.03, 2.04"
run ./kata bench 2.05
check "kernels are not measured on the virtual GPU" exits 2
check "what to do instead is said" says "./kata profile 2.05"
run ./kata bench phase4
check "nor those of phase 4" exits 2
check "of a step on several machines that is no question" says "4.08: no attention over whole tensors"
run ./kata bench 2.05 --on cpu
check "a kernel on the CPU is no question" exits 2
check "why is said" says "nothing of it runs on the cpu"
run ./kata bench 2.03 --grid huge
check "a grid that does not exist is refused" exits 2
echo "mine" > results.csv
run ./kata bench 2.03 --csv results.csv
check "a file of something else is refused" exits 2
check "somebody else's file is not touched" [ "$(cat results.csv)" = mine ]
rm results.csv

section "doctor"
run ./kata doctor
check "the doctor is content" exits 0
check "and names what is optional" says "GPU"
git init -q --bare "$scratch/upstream.git"
git push -q "$scratch/upstream.git" HEAD:refs/heads/main
git remote add course "$scratch/upstream.git" && git fetch -q course && git branch -q --set-upstream-to=course/main
run ./kata doctor
check "no update, no clash" says "touches no file that you filled"
git clone -q "$scratch/upstream.git" --branch main "$scratch/author"
sed -i 's/TODO/TODO (new)/' "$scratch/author/$attention"
git -C "$scratch/author" "${author[@]}" commit -qam 'another stub' && git -C "$scratch/author" push -q
git fetch -q course
run ./kata doctor
check "a stub that the course changed is named" says "$attention was changed by the course"
git branch -q --unset-upstream

section "handing out"
cp "$scratch/softmax.stub" "$softmax" && cp "$scratch/attention.stub" "$attention"
git "${author[@]}" commit -qam 'the stubs again' 2> /dev/null
cp "$hidden/$softmax" "$softmax" # the instructor tries a step
run ./kata handout "$scratch/handout"
check "a handout is made" exits 0
check "without solutions" absent "$scratch/handout/solutions"
check "with the stub, not with the instructor's answer" same "$scratch/handout/$softmax" "$scratch/softmax.stub"
run ./kata handout "$scratch/handout"
check "a folder that is not empty is refused" exits 2
(
  cd "$scratch/handout" || exit 1
  ./kata > "$scratch/handout.log" 2>&1 < /dev/null || exit 1
  sed 's/ - row_max//' "$course/$hidden/$softmax" > "$softmax"
  ./kata test softmax >> "$scratch/handout.log" 2>&1 < /dev/null && exit 1
  ./kata solution softmax --i-give-up >> "$scratch/handout.log" 2>&1 < /dev/null && exit 1
  ./kata verify >> "$scratch/handout.log" 2>&1 < /dev/null && exit 1
  ./kata reset softmax >> "$scratch/handout.log" 2>&1 < /dev/null
)
code=$?
out=$(cat "$scratch/handout.log")
check "it builds, judges and resets on its own" exits 0
check "names the first file" says "open       $softmax"
check "asks the question that belongs to a known mistake" says "ask yourself"
check "and says that its solutions are not there" says "handed out without its solutions"
check "its reset finds the stub" same "$scratch/handout/$softmax" "$scratch/softmax.stub"

section "grading"
for student in right half broken; do
  mkdir -p "$scratch/students/$student"
  cp -r "$scratch/handout/"phase1* "$scratch/students/$student/"
done
cp -r "$hidden/"phase1* "$scratch/students/right/"
cp "$hidden/$softmax" "$scratch/students/half/$softmax"
sed 's/return weights;/return 2.0f * weights;/' "$hidden/$softmax" > "$scratch/students/broken/$softmax"
echo 'int broken = ;' >> "$scratch/students/broken/$softmax"
cp "$hidden/$attention" "$scratch/students/broken/$attention"
run ./kata grade "$scratch"/students/* --only phase1 --out "$scratch/scores.json"
check "three students are graded" exits 0
table=$out
student() { out=$(sed -n "/^  $1\$/,/ all /p" <<< "$table"); }
student right
check "the right one has it all" says "100.0 %"
check "and nothing less" never_says "  0.0 %"
student half
check "the one who did the first step has that" says "1.01 softmax"
check "as passed" says "100.0 %"
check "and the others as not filled" says "not filled"
student broken
check "the one who does not compile is told where" says "does not compile: softmax.cpp:"
check "and still has the step that does" says "100.0 %"
out=$(cat "$scratch/scores.json")
check "the score file has all three" test "$(grep -c '"student":' <<< "$out")" -eq 3
check "with a score each" test "$(grep -c '^   "score":' <<< "$out")" -eq 3
check "and the full one" says '"score": 1.0'
run ./kata grade "$scratch/bin"
check "a folder that is no submission is refused" exits 2

printf '\n%s passed, %s failed  (%s s)\n' "$passed" "$failed" "$((SECONDS - started))"
[ "$failed" -eq 0 ]
