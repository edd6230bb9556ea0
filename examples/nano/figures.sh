#!/usr/bin/env bash
# Draws the README's pictures of the nano Wan again, into examples/images: 3 minutes on two cores, after the quickstart.
#
#   source .venv/bin/activate && bash examples/nano/figures.sh
set -euo pipefail
cd "$(dirname "$0")/../.."
out=outputs/figures images=examples/images
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} OMP_WAIT_POLICY=passive
lora=outputs/quickstart/lora  # what the quickstart trains
[ -d $lora ] || { echo "error: first run bash examples/quickstart.sh" >&2; exit 2; }
[ -f $out/heldout/metadata.jsonl ] ||
  python examples/nano/sprites.py $out/heldout --mix orbit --count 64 --seed 0 --split heldout
[ -f $out/dynamic/metadata.jsonl ] ||
  python examples/nano/sprites.py $out/dynamic --mix dynamic --count 64 --seed 0 --split heldout
draw() {  # command, flags
  python examples/visualize_ltd.py "$1" --pretrained_model_name_or_path examples/nano/wan-nano --height 96 --width 96 \
    --num_frames 33 --fps 16 --output_dir $out "${@:2}"
}
draw report --train_data_dir $out/dynamic  # these differ in how much they move
draw curves --train_data_dir $out/heldout --max_eval_clips 64 --lora $lora
caption() { python -c "import json; print(json.loads(open('$out/$1/metadata.jsonl').readlines()[$2])['text'])"; }
draw maps --video $out/dynamic/dynamic-h0-00007.mp4 --prompt "$(caption dynamic 7)"
for i in 3 4 5 7; do caption heldout $i; done > $out/prompts.txt
generate() { python examples/generate.py --preset nano --prompt_file $out/prompts.txt --output_dir $out/videos/"$1" "${@:2}"; }
generate base
generate ltd --lora $lora
python examples/generate.py --compare $out/videos/{base,ltd} --labels base LTD --output_dir $out/compare
python examples/nano/ablation.py --output_dir examples/nano/ablation --report_only > /dev/null
python examples/nano/tilt.py --record_dir examples/nano/tilt --report_only > /dev/null
mv examples/nano/ablation/ablation.png examples/nano/tilt/tilt.png $images
strips=()
for number in 0 1 2; do strips+=($lora/measured/samples/step-000{000,150}-$number.mp4); done
python examples/videos.py --output $images/quickstart_strips.jpg --columns 9 "${strips[@]}"
cp $out/ltd_report.png $out/ltd_curves.png $out/ltd_maps.{png,webp} $images
cp "$out/compare/strips/$(caption heldout 3)-0.jpg" $images/compare_strip.jpg
