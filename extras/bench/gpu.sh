#!/usr/bin/env bash
# Eight minutes on one GPU, most valuable first. Weights, images and questions are random: nothing is downloaded.
#
#     bash extras/bench/gpu.sh                      into out/gpu; the same again goes on with what is missing
#     bash extras/bench/gpu.sh --device=cpu --tiny  a rehearsal, two minutes on a core, into out/gpu_tiny
#
# Each part is a process with a time limit of its own, and up to twice that where the parts behind it have theirs all
# the same. Behind each table.md, which holds all that was measured, is written anew, and so it is where this script is
# ended by a signal. A part whose .md is there is passed over; what was cut or failed comes last the next time, when
# torch.compile need not compile it again. That, and the datasets, are in --scratch. The json files are training.py's,
# for several.py --measured. Numbers of --computed_gb are extras/bench/memory.py's in docs/speed.md, for as many tokens
# of a micro-batch; MedMO's 4,096 lie between two of its rows.
#
# What a GPU alone runs, but for extras/bench itself, and the test of tests/ that rehearses it on a CPU:
#   asking.py:rate                      test_pretended_gpu.py::test_a_vlm_has_the_cpu_s_numbers
#   model.py:attend                     test_batches.py::test_no_batch_is_compiled_for_anew_once_each_kind_has_been
#   model.py:packed_mask                test_batches.py::test_without_compile_attention_is_not_compiled_either
#   model.py:block_mask                 test_packing.py::test_attention_of_packed_groups_is_the_dense_one_either_way
#   zoo/gpt_oss.py:near_masks           test_gpt_oss.py::test_flex_attention_with_sinks_and_windows_is_that_of_groups
#   zoo/gpt_oss.py:ClampedSwiGLU.forward test_pretended_gpu.py::test_a_vlm_has_the_cpu_s_numbers
#   plumbing/kernels.py:top             nothing: Triton's kernels, first in part 1
#   plumbing/kernels.py:call_compiled  nothing: FlexAttention's kernels, first in part 1
#   plumbing/kernels.py:linear          test_pretended_gpu.py::test_a_vlm_has_the_cpu_s_numbers
#   run.py:make_trainable               test_pretended_gpu.py::test_blocks_are_compiled_on_a_gpu_alone
#   run.py:make_optimizer               test_pretended_gpu.py::test_a_vlm_has_the_cpu_s_numbers, but for CUDA's kernel
#   plumbing/devices.py:describe_machine nothing: the GPU's name, first in part 1
#   plumbing/devices.py:find_device     test_devices.py::test_a_gpu_past_the_last_one_is_named
#   plumbing/devices.py:pick_device     test_devices.py::test_bfloat16_only_where_the_gpu_has_it
#   plumbing/devices.py:join_group      test_devices.py::test_more_processes_than_gpus_are_told_so, but for nccl
#   plumbing/devices.py:to_device       test_pretended_gpu.py::test_a_vlm_has_the_cpu_s_numbers
#   train_vlm.py:open_data              test_packing.py::test_attention_of_packed_groups_is_the_dense_one_either_way
#   train_grpo.py:open_prompts          nothing: batches padded to 128, in the part grpo
# Autocast and LossScale are the CPU's own (test_devices.py), but for CUDA's kernels under them: parts 1 and 4.
set -u
device=cuda tiny="" out="" scratch="${TMPDIR:-/tmp}/nanomedq_gpu" total=480
for flag in "$@"; do
    case "$flag" in
        --device=cpu | --device=cuda) device="${flag#*=}" ;;
        --tiny | --tiny=true) tiny=_tiny ;;
        --out=?*) out="${flag#*=}" ;;
        --scratch=?*) scratch="${flag#*=}" ;;
        --seconds=*[!0-9]* | --seconds=) echo "$flag: no whole number" >&2; exit 2 ;;
        --seconds=*) total="${flag#*=}" ;;
        *) echo "$flag: --device=cpu or cuda, --tiny, --out=, --scratch= or --seconds=" >&2; exit 2 ;;
    esac
done
out="${out:-out/gpu$tiny}"  # never into one folder: what is there is not measured again
cd "$(dirname "$0")/../.." && mkdir -p "$out" "$scratch" || exit 2
[ -w "$out" ] && [ -w "$scratch" ] || { echo "$out or $scratch: cannot be written to" >&2; exit 2; }
export PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR="$scratch/compiled"
[ -z "$tiny" ] || export OMP_NUM_THREADS=1  # tiny products gain nothing from a second thread, and wait for it
trl=$(python3 -c 'from importlib.util import find_spec; print(str(find_spec("trl") is not None).lower())')
run="--device=$device --shards_dir=$scratch/shards$tiny" half="--dtype=bfloat16" rl="--model=llama_1b"
step="training.py $run --beside=false --rounds=1 --out=$scratch/step.md"
alone="--ladder=false --peer=false --recompute=1" low="--base_bits=4 --memory_gb=24"
paper=paper medmo=qwen3_vl_8b medgpt=medgpt
few="--rounds=2" many="" eight="--batch_size=8" smaller=1 some=all  # steps of eight where 64 take ten seconds or more
if [ -n "$tiny" ]; then
    paper=sample medmo=qwen_sample medgpt=medgpt_sample smaller=64 some=sample
    few="--rounds=1 --batch_size=8 --steps=2 --workers=1" many="--batch_size=4" eight="--batch_size=4"
    rl="--model=sample --prompts=2 --answers=4 --prompt_tokens=20 --new_tokens=4 --peer_batch_size=4 --threads=1"
fi
[ "$device" != cpu ] || half=""
parts=(  # name | seconds | what it runs
    "checks|90|gpu_checks.py --device=$device"
    "limits|15|limits.py --device=$device --smaller=$smaller"
    "openmedq|90|$step $many --data=vqa --model=$paper --micro_batch_tokens=8192 --computed_gb=54.4"
    "checks_bfloat16|60|gpu_checks.py --device=$device --dtype=bfloat16 --only=$some"
    "answers|45|answering.py $run --data=vqa --model=$paper --new_tokens=4 --rounds=1 --limit=3000 --peer_limit=1000"
    "medmo_448|40|$step $many --data=vqa_448 --model=$medmo --micro_batch_tokens=4096 --ladder=false --computed_gb=48.4"
    "medmo_1280|25|$step $eight --data=vqa_1280 --model=$medmo --micro_batch_tokens=4096 --ladder=false"
    "medmo_24gb|30|$step $many --data=vqa_448 --model=$medmo --micro_batch_tokens=8192 $alone $low"
    "medgpt|35|$step $eight --data=vqa_tiles --model=$medgpt --micro_batch_tokens=4096 $alone --computed_gb=22.2"
    "grpo|30|grpo.py $rl --device=$device $half --peer=$trl --rounds=1 --steps=2"
    "classifying|20|classifying.py $run --data=labelled --raw_dir= --model=$paper $few"
)

write_table() {
    local number=0 part name base
    for part in "${parts[@]}"; do
        name="${part%%|*}" number=$((number + 1)) base="$out/$((number))_${part%%|*}"
        printf '\n## %s. %s\n\n' "$number" "$name"
        if [ -f "$base.md" ]; then
            cat "$base.md"
        elif [ -f "$base.why" ]; then
            cat "$base.why" "$base.partial"
            printf '\n```\n%s\n```\n' "$(tr '\r' '\n' < "$base.log" | tail -n 25)"
        else
            echo "not begun"
        fi
    done > "$out/table.partial" && mv "$out/table.partial" "$out/table.md"
}

run_part() {  # number|part, its most seconds
    local number name seconds=$2 command base begun=$SECONDS status
    IFS='|' read -r number name _ command <<< "$1"
    base="$out/${number}_$name"
    echo "$number. $name, at most $seconds s" >&2
    echo "**ended from outside**" > "$base.why"  # as long as nothing else is known
    rm -f "$scratch/step.json"
    timeout -k 5 "$seconds" python3 extras/bench/$command > "$base.partial" 2> "$base.log" &
    child=$!
    wait "$child"
    status=$? child=""
    case $status in
        0)
            [ ! -f "$scratch/step.json" ] || mv "$scratch/step.json" "$base.json"
            mv "$base.partial" "$base.md"
            rm -f "$base.why" "$base.log" ;;
        124) echo "**cut after $seconds s**" > "$base.why" ;;
        137) echo "**killed after $((SECONDS - begun)) s**" > "$base.why" ;;
        *) echo "**failed, exit code $status**" > "$base.why" ;;
    esac
    write_table
}

end() {  # by a signal: timeout hands it on, and kills what does not heed it
    [ -z "$child" ] || kill "$child"
    write_table
    exit 143
}

child=""
trap end TERM INT HUP
made="extras/bench/made_up.py --shards_dir=$scratch/shards$tiny${tiny:+ --tiny=true}"
if [ ! -f "$scratch/made$tiny" ]; then  # without datasets some parts run all the same
    timeout -k 5 "$total" python3 $made & child=$!
    wait "$child" && touch "$scratch/made$tiny"
    child=""
fi
queue=() tried=() number=0
for part in "${parts[@]}"; do
    number=$((number + 1)) base="$out/$((number))_${part%%|*}"
    if [ -f "$base.why" ]; then tried+=("$number|$part"); elif [ ! -f "$base.md" ]; then queue+=("$number|$part"); fi
done
fresh=${#queue[@]}
queue+=(${tried[@]+"${tried[@]}"})
for at in "${!queue[@]}"; do
    IFS='|' read -r _ _ seconds _ <<< "${queue[at]}"
    left=$((total - SECONDS)) behind=0
    for part in "${queue[@]:at + 1}"; do
        IFS='|' read -r _ _ more _ <<< "$part"
        behind=$((behind + more))
    done
    spare=$((left - behind))
    if [ -n "$tiny" ]; then  # a rehearsal may be on a slow machine
        seconds=$left
    elif [ "$spare" -gt "$seconds" ]; then
        seconds=$((spare < 2 * seconds ? spare : 2 * seconds))
    elif [ "$at" -ge "$fresh" ] && [ "$left" -lt "$seconds" ]; then
        continue  # what was there of it would be less
    fi
    seconds=$((seconds < left ? seconds : left))
    [ "$seconds" -lt 5 ] || run_part "${queue[at]}" "$seconds"
done
write_table
echo "$out/table.md"
for part in "${parts[@]}"; do
    compgen -G "$out/*_${part%%|*}.md" > /dev/null || exit 1
done
