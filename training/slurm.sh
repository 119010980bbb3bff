#!/usr/bin/env bash
# Pretrain on a SLURM cluster, one task for each GPU. It continues by itself after a preemption or a time limit:
#
#   sbatch --nodes 8 training/slurm.sh imagenet_mae --output_dir runs/mae --dataset /data/imagenet
#
# All arguments are those of `hf-mim pretrain`; --output_dir is needed, on a file system that all nodes share.
# SLURM sends SIGTERM two minutes before it ends the job. The run then saves a checkpoint and exits with status 75, and
# the job goes back into the queue. PYTHON, MASTER_PORT and srun's own options (SRUN_OPTIONS) come from the environment.
#
#SBATCH --job-name=hf-mim
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

set -uo pipefail

folder=
arguments=("$@")
for ((i = 0; i < $#; i++)); do
    case ${arguments[i]} in
        --output_dir=* | --output-dir=*) folder=${arguments[i]#*=} ;;
        --output_dir | --output-dir) folder=${arguments[i + 1]-} ;;
    esac
done
if [[ -z $folder ]]; then
    echo "error: --output_dir must be given: the folder in which a requeued job finds its run" >&2
    exit 2
fi
# Only a run that has begun gets --resume.
if [[ -f $folder/recipe.yaml ]]; then
    arguments+=(--resume)
fi

export PYTHON=${PYTHON:-python} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # srun does not read it from the job

trap : TERM # on preemption this shell gets the signal too, and must live longer than the tasks
# Each task is one rank. torchrun is not used: it would catch the signals and turn status 75 into 1. A task that ends
# early does not kill the others while they save; they have two minutes. srun's status is the highest of all.
# shellcheck disable=SC2016,SC2086
srun --kill-on-bad-exit=0 --wait=120 ${SRUN_OPTIONS-} bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    export LOCAL_WORLD_SIZE=${SLURM_NTASKS_PER_NODE:-$SLURM_NTASKS}
    exec "$PYTHON" -m hf_mim.cli pretrain "$@"' rank "${arguments[@]}"
status=$?

if ((status == 75)); then
    echo "saved and interrupted: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
