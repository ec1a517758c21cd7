#!/usr/bin/env bash
# One tuning on several machines, by Slurm: sbatch --export=ALL,SETTINGS=run.yaml examples/cluster/slurm.sh
# Before its time is up the job writes a checkpoint, goes back into the queue, and goes on from there when it runs again.
#SBATCH --job-name=luthier
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
set -euo pipefail

export LUTHIER_RUNS=${LUTHIER_RUNS:-$SLURM_SUBMIT_DIR/runs}   # a directory that all machines see
name=${NAME:-job-$SLURM_JOB_ID}                               # a job that is requeued keeps its number
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

work=("${SETTINGS:-examples/cluster/run.yaml}")
if compgen -G "$LUTHIER_RUNS/$name/checkpoints/step-*" > /dev/null; then
  work=(--resume "run:$name")
else
  rm -rf "${LUTHIER_RUNS:?}/$name"   # a run that was cut off before its first checkpoint begins again
  work=(--name "$name" "${work[@]}")
fi

# TERM to torchrun reaches every process; they finish the step together and write one checkpoint.
requeue() {
  scancel --signal=TERM "$SLURM_JOB_ID.0"
  wait "$step" || true
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap requeue USR1

srun --kill-on-bad-exit=1 "${PYTHON:-python}" -m torch.distributed.run \
  --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "${PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}" \
  --rdzv-backend c10d --rdzv-endpoint "$head:${PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" \
  -m luthier tune "${work[@]}" &
step=$!
wait "$step"
