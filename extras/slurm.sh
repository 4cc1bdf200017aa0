#!/usr/bin/env bash
# Trains under Slurm on the GPUs of one node, and goes on in another job until the run is finished:
#
#     sbatch extras/slurm.sh --run=out/paper --batch_size=64
#
# Two minutes before its time is over, the job passes SIGTERM on; train_vlm.py ends its step and saves,
# and the job is put back into the queue. A job that fails by itself is not.
#SBATCH --job-name=nanomedq
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -u

stopped=no
trap 'stopped=yes; kill -TERM "$trainer"' TERM
torchrun --standalone --nproc_per_node="$SLURM_GPUS_ON_NODE" -- train_vlm.py --resume=true "$@" &
trainer=$!
wait "$trainer"
status=$?
if [ "$stopped" = yes ]; then
    wait "$trainer"  # the first wait ended with the signal
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
