#!/bin/bash
# Many nodes under SLURM: one torchrun per node, FSDP2 over all GPUs.
#
#   sbatch --nodes 4 recipes/slurm.sh --config recipes/sft_folder_of_documents.yaml --sequence_parallel_size 8
#
# Keep `sequence_parallel_size` at the GPUs of a node or a divisor of them. Ranks are laid out with the sequence axis innermost, so
# a row then stays inside one node and different nodes hold different rows. Why: the processes that share a row trade heads for
# tokens in every layer, forward and backward, and wait for it, so they need the fast link inside a node; between nodes only
# weights and gradients travel, which FSDP overlaps with compute.
#SBATCH --job-name=long-context
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --output=%x-%j.log

set -euo pipefail
cd "${SLURM_SUBMIT_DIR}"
first_node=$(scontrol show hostnames "${SLURM_JOB_NODELIST}" | head -n 1)
gpus=${SLURM_GPUS_ON_NODE:-8}
export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-$gpus} / gpus))

srun --kill-on-bad-exit=1 torchrun \
  --nnodes "${SLURM_NNODES}" --nproc_per_node "${gpus}" \
  --rdzv_id "${SLURM_JOB_ID}" --rdzv_backend c10d --rdzv_endpoint "${first_node}:29500" \
  recipes/sft.py "$@" --fsdp true
