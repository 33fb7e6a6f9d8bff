#!/usr/bin/env bash
# LLaVA on all nodes of a Slurm job: slurm/multinode.sh with another recipe. Everything said there holds here.
#
#     sbatch slurm/llava_multinode.sh --data.train my.json
#
#SBATCH --nodes=2
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
DEFAULT_CONFIG=configs/llava7b_dora.json exec bash slurm/multinode.sh "$@"
