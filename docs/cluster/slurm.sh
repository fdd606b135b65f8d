#!/usr/bin/env bash
# sbatch docs/cluster/slurm.sh quickstart
#
# A study on Slurm: one Ray node per Slurm node for the time of the job, the driver on the first one. Set partition, time
# and sizes. STUDY_HOME is a folder that all nodes see. A job that ends too early is submitted again: what is done is kept.
#SBATCH --job-name=study
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --output=study-%j.log
#SBATCH --signal=TERM@120
set -euo pipefail

plan=${1:?name a plan: sbatch docs/cluster/slurm.sh PLAN [OPTIONS of study run]}
shift
home=${STUDY_HOME:-$SLURM_SUBMIT_DIR/runs}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p) # head would end the pipe before scontrol has written
port=$((20000 + SLURM_JOB_ID % 20000)) # another job may run on the same node
gpus=${SLURM_GPUS_ON_NODE:-0}

# TMPDIR of a job is often too long for Ray's sockets, and /tmp/ray may be another user's.
export RAY_TMPDIR=/tmp/ray-$SLURM_JOB_ID
# Whoever reaches the port could run code, so Ray asks for a token.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN
export RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT=600

# The same command on every node: Ray starts everywhere, the study on the head, and all ends with it.
srun --kill-on-bad-exit=1 mkdir -p "$RAY_TMPDIR"
srun --kill-on-bad-exit=1 ray symmetric-run --address "$head:$port" --min-nodes "$SLURM_JOB_NUM_NODES" \
  --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="$gpus" -- \
  study run "$plan" --address auto --home "$home" "$@"
