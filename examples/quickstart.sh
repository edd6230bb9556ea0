#!/usr/bin/env bash
# Teaches the nano Wan a motion, from nothing, on a CPU: sets up .venv, draws captioned clips of sprites that go once around the
# middle, trains an LTD LoRA on them, samples before, during and after, and measures by how many degrees the sprites turn.
# Everything lands in outputs/quickstart; flags go to train_ltd.py. The same with plain MSE, to compare:
#
#   bash examples/quickstart.sh --loss mse
set -euo pipefail
cd "$(dirname "$0")/.."
source examples/setup.sh
out=outputs/quickstart
run=$out/lora
[[ ! " $* " =~ " --loss"[=\ ]"mse " ]] || run=$out/lora_mse
echo "[1/4] installing into .venv (a minute or two)"
install -r requirements.txt
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} OMP_WAIT_POLICY=passive  # a spinning thread starves a busy machine
echo "[2/4] drawing 128 captioned clips: orbit, a large red circle over a blue gradient"
[ -f $out/clips/metadata.jsonl ] || "$PYTHON" examples/nano/sprites.py $out/clips --mix orbit --count 128
echo "[3/4] training a LoRA of the nano Wan, which has never met the word orbit"
"$PYTHON" -m accelerate.commands.launch --quiet --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
  train_ltd.py --config examples/recipes/nano.yaml --pretrained_model_name_or_path examples/nano/wan-nano \
  --train_data_dir $out/clips --cache_dir $out/cache --output_dir $run \
  --validation_prompt "orbit, a large red circle over a blue gradient" \
  --validation_prompt "orbit, a medium yellow square over gray clouds" "$@"
echo "[4/4] generating from eight new captions, before and after, and measuring how far the sprites turn"
"$PYTHON" examples/nano/degrees_turned.py examples/nano/wan-nano $run | tee $run/in_words.txt
"$PYTHON" examples/visualize_ltd.py maps --ltd_only --video $out/clips/orbit-t0-00000.mp4 --output_dir $run \
  --pretrained_model_name_or_path examples/nano/wan-nano --height 96 --width 96 --num_frames 33 > /dev/null
{ read -r before; read -r after; } < $run/in_words.txt
"$PYTHON" examples/gallery.py $run --note "$before" --note "$after" > /dev/null
cat <<MSG

Open
  $PWD/$run/samples.html
to see it: each prompt before training, while it went on, and after. Beside it lie the LoRA for diffusers and for ComfyUI, the
curves, and the model card that --push_to_hub would publish.
The same script on the real Wan2.1-T2V-1.3B, on a machine with a GPU:
  accelerate launch -q train_ltd.py --config examples/recipes/lora_1.3b.yaml --train_data_dir my_clips \\
      --output_dir my_lora --validation_prompt "a dog jumps over a fence"
MSG
