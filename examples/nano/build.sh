#!/usr/bin/env bash
# Builds the nano Wan from nothing: VAE, text encoder, transformer, float16 export, scores. A night on two CPU cores. Every
# stage goes on where it stopped, so it may be interrupted at any time: the same command goes on.
#
#   source .venv/bin/activate && bash examples/nano/build.sh outputs/nano
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-outputs/nano}
# Two processes of one thread are faster here than one process of two.
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive ACCELERATE_USE_CPU=true

[ -f "$out/vae/done" ] || {
  OMP_NUM_THREADS=2 python examples/nano/train_vae.py --output_dir "$out/vae" --checkpoint_dir "$out/vae-training" --steps 2150
  touch "$out/vae/done"
}
[ -f "$out/base/model_index.json" ] || python examples/nano/build.py base --vae "$out/vae" --output_dir "$out/base"
[ -f "$out/calm/metadata.jsonl" ] || python examples/nano/sprites.py "$out/calm" --mix calm --count 2304 --seed 0
[ -f "$out/lesson/metadata.jsonl" ] || python examples/nano/sprites.py "$out/lesson" --mix lesson --count 1024 --seed 0
train() {  # folder, clips, flags
  python -m accelerate.commands.launch --num_processes 2 --multi_gpu --num_machines 1 --main_process_port 0 \
    --mixed_precision no --dynamo_backend no train_ltd.py --config examples/recipes/nano_base.yaml \
    --pretrained_model_name_or_path "$out/base" --output_dir "$out/$1" --train_data_dir "$out/$2" --cache_dir "$out/cache" \
    --report_to none --resume_from_checkpoint latest "${@:3}"
}
# Looks first, then directions, which calm clips alone did not teach, then calm clips again: what a base model is for.
train words calm --max_train_steps 5500
train words calm --max_train_steps 9500 --flow_shift 6
train directions lesson --transformer_path "$out/words" --max_train_steps 1500 --flow_shift 8
train final calm --transformer_path "$out/directions" --max_train_steps 2500 --flow_shift 4 --lr_scheduler cosine
python examples/nano/build.py export --base "$out/base" --trained "$out/final" --output_dir "$out/wan-nano"
python examples/nano/score_model.py "$out/wan-nano" --mix calm --count 64
