#!/bin/bash
# One run on two nodes of four GPUs. Five minutes before the time limit every process gets SIGTERM: it saves and ends with
# status 143, and the job is queued again; the same command then goes on where it stopped.
#SBATCH --job-name=diffem
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# srun starts what torchrun would; its processes get the signal once, and it returns their status
# shellcheck disable=SC2016 # each process expands these for itself
srun --kill-on-bad-exit=0 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' - \
    python -m diffem train "${PRESET:-cifar10-mask75}" --observations "${DATA:?a folder of observations}" --out "${OUT:?a folder that all nodes see}"
status=$?
if [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
