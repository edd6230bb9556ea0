#!/usr/bin/env bash
# Trains an LTD LoRA of the nano Wan on moving sprites, from nothing, on a CPU: sets up .venv, draws captioned clips, trains,
# samples before and after, measures the motion, writes the card. Everything lands in outputs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup.sh
out=outputs/quickstart
echo "[1/4] installing into .venv (a minute or two)"
install -r requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} OMP_WAIT_POLICY=passive  # a spinning thread starves a busy machine
echo "[2/4] drawing captioned clips of moving sprites"
[ -f $out/clips/metadata.jsonl ] || "$PYTHON" examples/nano/sprites.py $out/clips --mix dynamic --count 128 --seed 2
echo "[3/4] training an LTD LoRA of the nano Wan"
"$PYTHON" -m accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
  train_ltd.py --config examples/recipes/nano.yaml --pretrained_model_name_or_path examples/nano/wan-nano \
  --train_data_dir $out/clips --output_dir $out/lora \
  --validation_prompt "a large red circle moves quickly to the left over a blue gradient" \
  --validation_prompt "a medium yellow square moves quickly to the bottom right, bouncing over gray clouds" "$@"
"$PYTHON" examples/videos.py --output $out/lora/samples.png $out/lora/samples/*.mp4
echo "[4/4] measuring the motion of 16 generated videos, without and with the LoRA"
score() { "$PYTHON" examples/nano/score_model.py examples/nano/wan-nano --mix dynamic --single_sprite --count 16 "$@"; }
score --output_dir $out/before
score --output_dir $out/after --lora $out/lora
cat <<MSG

Done. Open
  $out/lora/curves.png            training and held-out error
  $out/lora/samples.png           frames of the sample videos before and after training
  $out/before/, $out/after/       the videos that were measured; the tables above are their scores.json
  $out/lora/README.md             the model card that --push_to_hub would publish
  $out/lora/pytorch_lora_weights.safetensors for diffusers, lora.safetensors for ComfyUI

The same script on the real Wan2.1-T2V-1.3B, on a machine with a GPU:
  accelerate launch train_ltd.py --config examples/recipes/lora_1.3b.yaml --train_data_dir my_clips \\
      --output_dir my_lora --validation_prompt "a dog jumps over a fence"
MSG
