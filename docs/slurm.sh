#!/bin/bash
# The paper's run on two nodes of eight GPUs: sbatch docs/slurm.sh, from the repository's root.
#
# All nodes must see the same --out. A rank that dies, or a network that fails for longer than
# --timeout, ends the step on all ranks; torchrun starts them again, at most --max-restarts times,
# and they continue from the newest checkpoint. A node that dies ends the job: Slurm puts it back
# in the queue, and the same command continues there. At the time limit it is requeued, too.
#SBATCH --job-name=rmt
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@1200

# torchrun's own store would hand the addresses of dead ranks to restarted ones (rmt/system/torchrun.py).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=8
# export NCCL_SOCKET_IFNAME=... GLOO_SOCKET_IFNAME=...   where the first interface is the wrong one

# 20 minutes before the time limit ranks are asked to save after their step. torchrun kills them 30
# seconds later, unless it is told to wait.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1000
trap 'kill -TERM $job; wait $job; scontrol requeue "$SLURM_JOB_ID"' USR1
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# A job that was requeued keeps its number, and with it --out.
srun --kill-on-bad-exit=1 torchrun \
	--nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 \
	--rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
	train.py --model qwen3-14b --out "runs/$SLURM_JOB_ID" --save-every 25 &
job=$!
wait $job
