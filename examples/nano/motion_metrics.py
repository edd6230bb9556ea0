"""Measure the motion of a sprite video against its caption, or against its exact ground truth.

    python examples/nano/motion_metrics.py outputs/sprites/heldout --vae examples/nano/wan-nano/vae

The folder is a `videofolder` as `sprites.py` writes it (generated videos need no ground truth). Beside its scores
stand those of the same number of true clips, and with `--vae` of their round trips through the VAE: the ceiling that
no generator behind this VAE can pass.

How an object is found: the background's colours lie on one line (dark to light), a sprite's pixels between that line
and the sprite's own colour. So every pixel gets the best-fitting colour of the palette and an opacity by least
squares; opacity-weighted moments are position and area. Nothing is learned, and a video that is not like its caption
scores badly instead of being explained away.

All positions are in pixels, speeds in pixels per frame, angles in degrees.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
from sprites import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    PAN_SPEED,
    PERIODS,
    SHAPES,
    SIZES,
    SPEEDS,
    Sprite,
    caption,
    clip_spec,
    coverage,
    modulation,
    parse_caption,
    render_clip,
    trajectory,
)

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "scores")]  # examples/ is folders of scripts, not a package

from video_metrics import dis_dynamic_degree, temporal_flickering
from videos import read_video

OPACITY_SEEN = 0.35  # below it an object is not expected to be found
CONTRAST = 30.0  # distance from the background's colours, 0..441, that makes a pixel foreground
AREA_SEEN = 0.25  # share of the asked area that counts as being there
AMPLITUDES = {"flickering": 0.65, "pulsing": 0.5}  # peak to peak, of opacity and of relative radius


# ------------------------------------------------------------------------------------------------ what is asked


def asked_sprite(words, start=(48.0, 48.0)):
    """The `Sprite` in the middle of what a caption's words allow, for instance 2 px per frame for "quickly"."""
    velocity = np.zeros(2)
    if words["direction"]:
        unit = np.array(DIRECTIONS[words["direction"]]) / np.linalg.norm(DIRECTIONS[words["direction"]])
        velocity = unit * SPEEDS[words["speed"]]
    return Sprite(
        **words, radius=SIZES[words["size"]], start=tuple(start), velocity=tuple(velocity), angle=0.0,
        angular_speed=0.0, period=0.0, phase=0.0,
    )  # fmt: skip


def asked_colors(words):
    """Colours `(N, 3)` that belong to the sprite: one, or five from the first to the last when it turns."""
    first = np.array(COLORS[words["color"]], dtype=np.float64)
    if not words["to_color"]:
        return first[None]
    return first + np.linspace(0, 1, 5)[:, None] * (np.array(COLORS[words["to_color"]]) - first)


# ------------------------------------------------------------------------------------------------ finding objects


def background_colors(video, name):
    """The background colour `name` that is nearest to every pixel, `(F, H, W, 3)` float32."""
    dark, light = np.array(BACKGROUNDS[name], np.float32)
    pixels, line = video.astype(np.float32), light - dark
    # The line goes on a little beyond its ends, as the sum of several waves does.
    level = np.clip((pixels - dark) @ line / (line @ line), -0.6, 1.6)
    return np.clip(dark + level[..., None] * line, 0, 255)


def background_name(video):
    """Name of the background whose line of colours is nearest to most pixels; a sample of them tells."""
    video = video[::4, ::3, ::3]
    # The median is the background's even where sprites cover a third of the frame.
    distances = {name: np.median(((video - background_colors(video, name)) ** 2).sum(-1)) for name in BACKGROUNDS}
    return min(distances, key=distances.get)


def soft_masks(video, sprites):
    """Opacity with which each pixel shows each of `sprites`, `(S, F, H, W)` in 0..1, and the foreground `(F, H, W)`.

    A pixel belongs to one sprite at most, and to none if a colour that nobody asked for fits better.
    """
    pixels = video.astype(np.float32)
    behind = background_colors(video, background_name(video))
    difference = pixels - behind
    foreground = (difference**2).sum(axis=-1) > CONTRAST**2  # (F, H, W)
    # Away from the sprites the nearest background colour is the pixel's own; under them only the average is known.
    average = np.median(pixels[~foreground], axis=0) if (~foreground).any() else np.median(behind, axis=(0, 1, 2))
    points = pixels[foreground] - average  # (P, 3)
    owners, vectors = [], []
    for number, words in enumerate(sprites):
        for color in asked_colors(words):
            owners.append(number)
            vectors.append(color)
    wanted = {words["color"] for words in sprites} | {words["to_color"] for words in sprites}
    for color in COLORS:
        if color not in wanted:
            owners.append(-1)
            vectors.append(COLORS[color])
    vectors = np.array(vectors, np.float32) - average  # (V, 3)
    along, length = points @ vectors.T, (vectors**2).sum(axis=1)  # (P, V), (V,)
    opacity = np.clip(along / length, 0, 1)
    # |point - opacity * vector|^2 without the |point|^2 that all share
    best = (opacity * (opacity * length - 2 * along)).argmin(axis=1)
    masks = np.zeros((len(sprites), *video.shape[:3]), np.float32)
    owner = np.array(owners)[best]
    for number in range(len(sprites)):
        masks[number][foreground] = np.where(owner == number, opacity[np.arange(len(best)), best], 0)
    return masks, foreground


def locate(mask):
    """Centre `(2,)` and area in px of a soft mask `(H, W)`, without stray pixels far away; None if it is empty.

    The area counts a pixel by its opacity over the object's own, so that a faded object keeps its size.
    """
    ys, xs = np.nonzero(mask)
    if len(xs) < 4:
        return None
    weights = mask[ys, xs]
    middle = np.array([weighted_median(xs, weights), weighted_median(ys, weights)])
    spread = np.hypot(xs - middle[0], ys - middle[1])
    near = spread <= 2.5 * max(3.0, weighted_median(spread, weights))
    xs, ys, weights = xs[near], ys[near], weights[near]
    level = np.percentile(weights, 80)
    center = np.array([(xs * weights).sum(), (ys * weights).sum()]) / weights.sum() + 0.5
    return center, min(1.0, level), np.minimum(weights / level, 1).sum()


def weighted_median(values, weights):
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, total[-1] / 2)])


def track(masks):
    """Track one sprite through `masks` `(F, H, W)`: `position (F, 2)`, `opacity (F,)`, `radius (F,)`; NaN unseen."""
    frames = len(masks)
    position, opacity, radius = np.full((frames, 2), np.nan), np.full(frames, np.nan), np.full(frames, np.nan)
    for frame, mask in enumerate(masks):
        found = locate(mask)
        if found is not None:
            position[frame], opacity[frame] = found[0], found[1]
            radius[frame] = math.sqrt(found[2] / math.pi)
    return position, opacity, radius


# ------------------------------------------------------------------------------------------------ one sprite


def measure_sprite(masks, solid, video, words, truth=None):
    """Scores of one sprite, a flat dict; NaN where a question has no meaning (the direction of a still object).

    `masks` `(F, H, W)` is where its colour shows, `solid` the foreground that is no other asked sprite's.
    `truth` holds its exact arrays `position` `(F, 2)`, `velocity`, `radius`; without it the caption's nominal values
    are the reference, and the path starts where the object is first seen.
    """
    frames = len(masks)
    position, opacity, radius = track(masks)
    sprite = asked_sprite(words)
    _, expected_opacity, _ = modulation(sprite, frames)
    area = math.pi * sprite.radius**2
    present = np.nan_to_num(np.pi * radius**2) > AREA_SEEN * area
    # Flicker is a question of amplitude, not of existence; before it has faded in nothing needs to be there.
    due = expected_opacity >= OPACITY_SEEN
    scores = {"persistence": float(present[due].mean())}
    scores["size_error"] = abs(float(np.nanmean(radius[present])) / sprite.radius - 1) if present.any() else 1.0
    scores |= appearance(masks, solid, video, position, radius, present, words)
    scores |= motion(position, present, words, sprite, truth)
    scores |= change(video, masks, opacity, radius, present, words)
    return scores


def appearance(masks, solid, video, position, radius, present, words):
    """Whether colour and shape are right: shares of up to five frames spread over the clip."""
    frames = np.flatnonzero(present)
    if not len(frames):
        return {"color_right": 0.0, "shape_right": 0.0}
    frames = frames[np.unique(np.linspace(0, len(frames) - 1, 5).round().astype(int))]
    others = np.array([color for name, color in COLORS.items() if name not in (words["color"], words["to_color"])])
    axis = np.arange(masks.shape[-1]) + 0.5
    colors, shapes = [], []
    for frame in frames:
        # All of the object's inside, not only the pixels in which the asked colour was found.
        inside = np.hypot(axis - position[frame, 0], axis[:, None] - position[frame, 1]) < 0.8 * radius[frame]
        core = solid[frame] & inside
        mean = video[frame][core if core.any() else masks[frame] > 0].mean(axis=0)
        # A colour on its way from one to another is right anywhere on the way; a faded one is mixed with what is
        # behind it, and `soft_masks` has already told it from the rest.
        nearest = np.linalg.norm(asked_colors(words) - mean, axis=1).min()
        faded = np.nanmax(masks[frame]) < 0.7
        colors.append(faded or nearest <= np.linalg.norm(others - mean, axis=1).min())
        shapes.append(nearest_shape(masks[frame], position[frame], radius[frame]) == words["shape"])
    return {"color_right": float(np.mean(colors)), "shape_right": float(np.mean(shapes))}


def nearest_shape(mask, position, radius):
    """The shape and angle that overlap best with a soft mask `(H, W)`."""
    mask = np.clip(mask / np.percentile(mask[mask > 0], 80), 0, 1)
    best = (-1.0, "")
    for shape in SHAPES:
        turn = {"circle": 1, "square": 90, "cross": 90, "triangle": 120}[shape]
        angles = np.deg2rad(np.arange(0, turn, 10))
        count = len(angles)
        drawn = coverage(shape, np.tile(position, (count, 1)), np.full(count, radius), angles, len(mask))
        overlap = np.minimum(drawn, mask).sum(axis=(1, 2)) / np.maximum(drawn, mask).sum(axis=(1, 2))
        best = max(best, (float(overlap.max()), shape))
    return best[1]


def motion(position, present, words, sprite, truth):
    """Direction, speed and trajectory error, each against the truth or the caption's nominal values."""
    nan = float("nan")
    seen = np.flatnonzero(present)
    if len(seen) < 6:
        return {"direction_error": 180.0 if words["direction"] else nan, "speed_error": 1.0, "trajectory_error": nan}
    # Speed over four frames: the noise of single positions would look like motion.
    steps = ((position[4:] - position[:-4]) / 4)[present[4:] & present[:-4]]
    speed = float(np.linalg.norm(steps, axis=1).mean()) if len(steps) else 0.0
    if truth is None:
        # Centre the reference on the whole path, not on one measured frame.
        path = trajectory(asked_sprite(words, start=start_of(position, seen, words)), len(position))[0]
    else:
        path = truth["position"]
    reference_steps = (path[4:] - path[:-4]) / 4
    asked_speed = float(np.linalg.norm(reference_steps, axis=1).mean())
    # Before any bounce: within the first 30 % of the way (see `sample_start`).
    early = seen[seen <= 0.28 * (len(position) - 1)] if words["path"] == "bouncing" else seen
    scores = {
        "speed_error": abs(speed - asked_speed) / max(asked_speed, SPEEDS["slowly"]),
        "trajectory_error": float(np.linalg.norm(position[seen] - path[seen], axis=1).mean()),
        "direction_error": nan,
    }
    if words["direction"]:
        slope = np.polyfit(early, position[early], 1)[0] if len(early) >= 4 else np.zeros(2)
        scores["direction_error"] = angle_between(slope, DIRECTIONS[words["direction"]])
    return scores


def start_of(position, seen, words):
    """Start of the asked path such that it fits what was seen: least squares, or the first sight if it bounces."""
    path = trajectory(asked_sprite(words, start=(0.0, 0.0)), len(position))[0]
    if words["path"] == "bouncing":
        return position[seen[0]]
    return (position[seen] - path[seen]).mean(axis=0)


def angle_between(slope, direction):
    """Degrees between a measured mean velocity and the asked direction; 90, pure chance, for an object at rest."""
    length = np.linalg.norm(slope)
    if length < 0.05:
        return 90.0
    cosine = float(np.dot(slope, direction) / (length * np.linalg.norm(direction)))
    return math.degrees(math.acos(np.clip(cosine, -1, 1)))


def change(video, masks, opacity, radius, present, words):
    """Size drift of objects that should keep their size; amplitude and period of what should change.

    `modulation_amplitude` is measured over asked (1 is right, 0 is nothing happening), `modulation_period_error`
    relative. The period is looked for between 3 and 32 frames.
    """
    nan = float("nan")
    scores = {"size_drift": nan, "modulation_amplitude": nan, "modulation_period_error": nan}
    seen = np.flatnonzero(present)
    if len(seen) < 6:
        return scores | ({"modulation_amplitude": 0.0} if words["dynamics"] else {})
    if words["dynamics"] != "pulsing":
        scores["size_drift"] = float(np.std(radius[seen]) / np.mean(radius[seen]))
    dynamics = words["dynamics"]
    if dynamics in AMPLITUDES:
        series = np.nan_to_num(opacity) if dynamics == "flickering" else radius / np.nanmean(radius)
        times = np.arange(len(series))[np.isfinite(series)]
        amplitude, period = sinusoid(times, series[times])
        nominal = PERIODS[dynamics]
        scores["modulation_amplitude"] = amplitude / AMPLITUDES[dynamics]
        scores["modulation_period_error"] = abs(period - nominal) / nominal
    elif dynamics.startswith("fading"):
        change_of = np.nan_to_num(opacity[-4:]).mean() - np.nan_to_num(opacity[:4]).mean()
        scores["modulation_amplitude"] = float(change_of / (0.82 if dynamics == "fading in" else -0.82))
    elif dynamics == "turning":
        first, last = (np.array(COLORS[words[key]], np.float64) for key in ("color", "to_color"))
        ends = [video[f][masks[f] > 0.8 * masks[f].max()].mean(axis=0) for f in (seen[0], seen[-1])]
        whole = last - first
        scores["modulation_amplitude"] = float((ends[1] - ends[0]) @ whole / (whole @ whole))
    return scores


def sinusoid(times, values):
    """Peak-to-peak amplitude and period, in frames, of the sinusoid that fits best."""
    best = (math.inf, 0.0, math.nan)
    for period in np.linspace(3, 32, 117):
        phase = 2 * np.pi * times / period
        design = np.stack([np.ones(len(times)), np.cos(phase), np.sin(phase)], axis=1)
        solution = np.linalg.lstsq(design, values, rcond=None)[0]
        error = float(((design @ solution - values) ** 2).sum())
        best = min(best, (error, 2 * float(np.hypot(solution[1], solution[2])), float(period)))
    return best[1], best[2]


# ------------------------------------------------------------------------------------------------ the whole clip


def background_drift(video, foreground, pan):
    """Mean absolute change, in 0..255, of the background since the first frame, along the camera's asked pan."""
    step = np.zeros(2)
    if pan:
        step = -PAN_SPEED * np.array(DIRECTIONS[pan]) / np.linalg.norm(DIRECTIONS[pan])
    # Soft edges reach a little beyond what is found.
    covered = dilate(foreground, 2)
    drifts = []
    for frame in range(1, len(video)):
        dx, dy = step * frame
        moved, inside = shifted(video[frame].astype(np.float32), dx, dy)
        hidden, _ = shifted(covered[frame].astype(np.float32)[..., None], dx, dy)
        free = inside & (hidden[..., 0] == 0) & ~covered[0]
        if free.any():
            drifts.append(np.abs(moved - video[0])[free].mean())
    return float(np.mean(drifts)) if drifts else float("nan")


def dilate(masks, radius):
    """Grow boolean masks `(F, H, W)` by `radius` px along both axes."""
    padded = np.pad(masks, ((0, 0), (radius, radius), (radius, radius)))
    height, width = masks.shape[1:]
    shifts = range(2 * radius + 1)
    return np.any([padded[:, y : y + height, x : x + width] for y in shifts for x in shifts], axis=0)


def shifted(image, dx, dy):
    """`image` `(H, W, C)` read at (x + dx, y + dy), bilinear, and where that lies inside `(H, W)`."""
    height, width = image.shape[:2]
    x, y = np.arange(width) + dx, np.arange(height) + dy
    x0, y0 = np.clip(np.floor(x).astype(int), 0, width - 2), np.clip(np.floor(y).astype(int), 0, height - 2)
    wx, wy = (x - x0)[None, :, None].astype(np.float32), (y - y0)[:, None, None].astype(np.float32)
    rows = image[y0] * (1 - wy) + image[y0 + 1] * wy
    inside = ((y >= 0) & (y <= height - 1))[:, None] & ((x >= 0) & (x <= width - 1))[None, :]
    return rows[:, x0] * (1 - wx) + rows[:, x0 + 1] * wx, inside


def measure(video, text, truth=None):
    """All scores of a clip.

    `video` is uint8 `(F, H, W, 3)`, `text` its caption, `truth` optionally what `render_clip` returned with it.
    Returns a flat dict: those of its sprites averaged (NaN where they have no meaning), and those of the whole clip.
    """
    words = parse_caption(text)
    masks, foreground = soft_masks(video, words["sprites"])
    rows = []
    for number, sprite in enumerate(words["sprites"]):
        exact = None if truth is None else {key: truth[key][number] for key in ("position", "velocity", "radius")}
        others = np.delete(masks, number, axis=0).any(axis=0)
        rows.append(measure_sprite(masks[number], foreground & ~others, video, sprite, exact))
    scores = mean_scores(rows)
    scores["background_right"] = float(background_name(video) == words["background"])
    scores["background_drift"] = background_drift(video, foreground, words["pan"])
    scores["temporal_flickering"] = temporal_flickering(video)
    return scores


def mean_scores(rows):
    """Mean of every score over rows that have it; NaN if none has."""
    columns = {key: [row[key] for row in rows if np.isfinite(row[key])] for key in rows[0]}
    return {key: float(np.mean(values)) if values else float("nan") for key, values in columns.items()}


# ------------------------------------------------------------------------------------------------ command line


def round_trip(vae, video):
    """uint8 `(F, H, W, 3)` through the VAE and back."""
    import torch

    pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        restored = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0]
    return ((restored + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).numpy()


def references(count, mix, vae_path, measure_all):
    """Scores of true held-out clips, and of their VAE round trips: what can be reached at best."""
    specs = [clip_spec(mix, 0, "heldout", index) for index in range(count)]
    clips = [(render_clip(spec)[0], caption(spec)) for spec in specs]
    result = {"true clips": measure_all(clips)}
    if vae_path:
        from diffusers import AutoencoderKLWan

        vae = AutoencoderKLWan.from_pretrained(vae_path)
        result["VAE round trip"] = measure_all([(round_trip(vae, video), text) for video, text in clips])
    return result


def measure_clips(clips, with_flow=False):
    """Mean scores over `(video, caption)` pairs."""
    rows = []
    for video, text in clips:
        scores = measure(video, text)
        if with_flow:
            scores["dis_dynamic_degree"] = dis_dynamic_degree(video)
        rows.append(scores)
    return mean_scores(rows)


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("video_dir", help="videofolder: videos and metadata.jsonl with file_name and text")
    vae = Path(__file__).parent / "wan-nano" / "vae"
    parser.add_argument("--vae", default=vae, help="also score round trips through this VAE (default: the nano Wan's)")
    parser.add_argument("--mix", default="dynamic", choices=["calm", "dynamic"], help="of the true clips beside it")
    parser.add_argument("--flow", action="store_true", help="also the DIS dynamic degree (needs OpenCV)")
    parser.add_argument("--output", help="write the scores here as JSON")
    return parser.parse_args(input_args)


def main(args):
    folder = Path(args.video_dir)
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    clips = [(read_video(folder / line["file_name"]), line["text"]) for line in lines]
    table = {str(folder): measure_clips(clips, args.flow)}
    table |= references(len(clips), args.mix, args.vae, lambda them: measure_clips(them, args.flow))
    print(f"{'':24}" + "".join(f"{name[-20:]:>22}" for name in table))
    for key in table[str(folder)]:
        print(f"{key:24}" + "".join(f"{scores[key]:22.3f}" for scores in table.values()))
    if args.output:
        Path(args.output).write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main(parse_args())
