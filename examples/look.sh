#!/usr/bin/env bash
# How much do the clips of a folder move, and are there cuts in them? Draws LTD's report on them, without a GPU and without
# captions. Takes the folder, and flags of train_ltd.py, such as another model's --pretrained_model_name_or_path.
#
#   bash examples/look.sh my_clips
set -euo pipefail
[ -d "${1:-}" ] || {
  echo "error: '${1:-}' is no folder: give the folder that the clips are in, bash examples/look.sh my_clips" >&2
  exit 2
}
clips=$(realpath -- "$1")
shift
cd "$(dirname "$0")/.."
source examples/setup.sh
"$PYTHON" -c "import av, datasets, diffusers, matplotlib" 2> /dev/null || {
  echo "installing into .venv (a minute or two)"
  install -r requirements.txt
}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} OMP_WAIT_POLICY=passive  # a spinning thread starves a busy machine
out=$PWD/outputs/look/$(basename "$clips")
mkdir -p "$out"
data=$clips
# A folder without a table is listed here: a report needs no captions.
if ! compgen -G "$clips/metadata.*" > /dev/null; then
  ln -sfn "$clips" "$out/clips"
  data=$out/clips.jsonl
  "$PYTHON" - "$out" <<'PY'
import json, os, sys
from pathlib import Path

out = Path(sys.argv[1])
suffixes = {".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v", ".mpg", ".mpeg"}
lines = []
for folder, _, names in os.walk(out / "clips", followlinks=True):
    for name in sorted(names):
        if Path(name).suffix.lower() in suffixes and not name.startswith("."):
            file = Path(folder, name).relative_to(out).as_posix()
            lines.append(json.dumps({"file_name": file, "text": ""}) + "\n")
if not lines:
    print(f"error: {os.path.realpath(out / 'clips')} holds no video ({', '.join(sorted(suffixes))})", file=sys.stderr)
    sys.exit(2)
(out / "clips.jsonl").write_text("".join(lines), encoding="utf-8")
PY
fi
nano=yes
[[ " $* " != *" --pretrained_model_name_or_path"* ]] || nano=
model=()
[ -z "$nano" ] || model=(--pretrained_model_name_or_path examples/nano/wan-nano --height 96 --width 160 --num_frames 17 --fps 16)
"$PYTHON" examples/visualize_ltd.py report --train_data_dir "$data" --output_dir "$out" --mixed_precision no "${model[@]}" "$@"
cat <<MSG

Open
  $out/ltd_report.png
A clip that hardly moves has a low mean LTD, and teaches little motion; a jump of more than 4 times the median is probably
a cut, which training should not see. ltd_report.json beside it has every clip.
MSG
[ -z "$nano" ] || cat <<MSG

This was measured with the small video autoencoder that comes with the repository, which has seen nothing but drawn sprites, on
the first second of each clip at 160x96. Take the order of the clips and the jumps for a first look; the numbers, and a warning
on the latents' mean, are not those of Wan's own autoencoder, and --sizes is for that small size. With Wan's (0.5 GB to
download, slow without a GPU):
  bash examples/look.sh $(printf %q "$clips") --pretrained_model_name_or_path Wan-AI/Wan2.1-T2V-1.3B-Diffusers \\
      --height 240 --width 416 --num_frames 33
MSG
