#!/usr/bin/env bash
# The virtual GPU's verdicts beside those of compute-sanitizer and ncu, on a machine with a GPU.
#
#   tests/virtual_gpu/against_a_gpu.sh BUILD_FOLDER OUTPUT_FOLDER      (a build with KATA_GPU=cuda)
#
# Writes OUTPUT_FOLDER/sanitizer.txt (kernel, our finding, the sanitizer's tool, what it says) and ncu.txt (kernel and its
# counts: sectors of global loads and stores, wavefronts of shared loads and stores).
set -u
build=${1:?BUILD_FOLDER}
out=${2:?OUTPUT_FOLDER}
run=$build/tests/virtual_gpu/virtual_gpu_run_fast
mkdir -p "$out"

tool_for() {
  case $1 in
    *race*) echo racecheck ;;
    uninitialised*) echo initcheck ;;
    *barrier* | *warp* | *lane* | deadlock) echo synccheck ;;
    *) echo memcheck ;;
  esac
}

one() {  # one NAME TOOL: what the tool says of the kernel
  local said
  said=$(timeout 40 compute-sanitizer --tool "$2" --error-exitcode 7 "$run" "$1" 2>&1)
  local code=$?
  if [ $code = 124 ]; then
    echo "hangs"
  elif [ $code = 7 ] || grep -qE 'ERROR SUMMARY: [1-9]|RACECHECK SUMMARY: [1-9]' <<< "$said"; then
    echo "reports: $(grep -oE 'Invalid [^.]*|Misaligned[^.]*|Uninitialized [^.]*|Barrier error[^.]*|(Error|Warning): Race[^.]*|Program hit [a-zA-Z]*|Divergent[^.]*|Race reported[^.]*' <<< "$said" | head -1 | cut -c1-70)"
  elif [ $code != 0 ]; then
    echo "ends with code $code"
  else
    echo "silent"
  fi
}
export -f one tool_for
export run

"$run" list | sed 's/  */ /' | while read -r name kind; do
  if [ "$kind" = clean ]; then
    for tool in memcheck racecheck initcheck synccheck; do echo "$name|$kind|$tool"; done
  else
    echo "$name|$kind|$(tool_for "$kind")"
  fi
done > "$out/jobs.txt"
xargs -a "$out/jobs.txt" -P 8 -d '\n' -I{} bash -c 'IFS="|" read -r name kind tool <<< "{}"; printf "%-36s %-34s %-10s %s\n" "$name" "$kind" "$tool" "$(one "$name" "$tool")"' |
  sort > "$out/sanitizer.txt"
rm "$out/jobs.txt"

metrics=l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum,l1tex__t_sectors_pipe_lsu_mem_global_op_st.sum
metrics+=,l1tex__data_pipe_lsu_wavefronts_mem_shared_op_ld.sum,l1tex__data_pipe_lsu_wavefronts_mem_shared_op_st.sum
for name in flash_forward flash_backward flash_tensor_core flash_tensor_core_with_bank_conflicts vector_loads_and_stores \
  partial_tile copy_pipeline narrow_shuffles; do
  ncu --metrics "$metrics" --csv "$run" "$name" 2> /dev/null | grep '^"[0-9]' |
    awk -F'","' -v name="$name" '{ kernel = $5; sub(/\(.*/, "", kernel); sub(/^"/, "", kernel); gsub(/,/, "", $NF); gsub(/"/, "", $NF)
      if (!(($1, kernel) in seen)) { order[++n] = $1 SUBSEP kernel; seen[$1, kernel] = 1 }
      count[$1, kernel] = count[$1, kernel] " " $NF }
      END { for (i = 1; i <= n; ++i) { split(order[i], part, SUBSEP); print "ncu", name, part[2] count[order[i]] } }'
done > "$out/ncu.txt"
echo "clean kernels that compute-sanitizer complains of: $(awk '$2 == "clean" && !/silent$/' "$out/sanitizer.txt" | wc -l)"
