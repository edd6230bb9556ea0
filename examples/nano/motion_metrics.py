"""Measure the motion of a sprite video against its caption, or against its exact ground truth.

    python examples/nano/motion_metrics.py outputs/sprites/heldout --vae examples/nano/wan-nano/vae

The folder is a `videofolder` as `sprites.py` writes it (generated videos need no ground truth). Beside its scores
stand those of the same number of true clips, and with `--vae` of their round trips through the VAE: the ceiling that
no generator behind this VAE can pass.

How an object is found: the background's colors lie on one line (dark to light), a sprite's pixels between that line
and the sprite's own color. So every pixel gets the best-fitting color of the palette and an opacity by least
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
    ORBIT,
    ORBIT_RATE,
    PAN_SPEED,
    PERIODS,
    SHAPES,
    SIZE,
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
    unit_vector,
)

EXAMPLES = Path(__file__).resolve().parents[1]
# examples/ is folders of scripts, not a package.
sys.path.insert(0, str(EXAMPLES / "scores"))
sys.path.insert(0, str(EXAMPLES))

from mistakes import run_script
from video_metrics import dis_dynamic_degree, temporal_flickering
from videos import read_video

OPACITY_SEEN = 0.35  # below it an object is not expected to be found
CONTRAST = 30.0  # distance from the background's colors, 0..441, that makes a pixel foreground
AREA_SEEN = 0.25  # share of the asked area that counts as being there
AMPLITUDES = {"flickering": 0.65, "pulsing": 0.5}  # peak to peak, of opacity and of relative radius
FADED_BELOW = 0.7  # opacity: a paler object shows what is behind it, and its mean color tells nothing
FEWEST_SIGHTS = 6  # frames in which an object must be seen before its motion and its changes are measured
NAN = float("nan")


# ------------------------------------------------------------------------------------------------ what is asked


def asked_sprite(words, start=(48.0, 48.0)):
    """Return the `Sprite` in the middle of what a caption's words allow, for instance 2 px per frame for "quickly"."""
    velocity = np.zeros(2)
    if words["direction"]:
        velocity = unit_vector(words["direction"]) * SPEEDS[words["speed"]]
    elif words["path"] == ORBIT:
        x, y = np.array(start) - SIZE / 2
        velocity = ORBIT_RATE * np.array([-y, x])  # clockwise: the words leave that open
    return Sprite(
        **words,
        radius=SIZES[words["size"]],
        start=tuple(start),
        velocity=tuple(velocity),
        angle=0.0,
        angular_speed=0.0,
        period=0.0,
        phase=0.0,
    )


def asked_colors(words):
    """Return the colors `(N, 3)` of the sprite: one, or five from the first to the last when it turns."""
    first = np.array(COLORS[words["color"]], dtype=np.float64)
    if not words["to_color"]:
        return first[None]
    way = np.array(COLORS[words["to_color"]]) - first
    shares = np.linspace(0, 1, 5)
    return first + shares[:, None] * way


# ------------------------------------------------------------------------------------------------ finding objects


def background_colors(video, name):
    """Return the color of background `name` that is nearest to every pixel, `(F, H, W, 3)` float32."""
    dark, light = np.array(BACKGROUNDS[name], np.float32)
    line = light - dark
    pixels = video.astype(np.float32)
    level = (pixels - dark) @ line / (line @ line)  # (F, H, W)
    # The line goes on a little beyond its ends, as the sum of several waves does.
    level = np.clip(level, -0.6, 1.6)
    return np.clip(dark + level[..., None] * line, 0, 255)


def background_name(video):
    """Return the name of the background whose line of colors is nearest to most pixels; a sample of them tells."""
    sample = video[::4, ::3, ::3]
    distances = {}
    for name in BACKGROUNDS:
        difference = sample - background_colors(sample, name)
        squared = (difference**2).sum(-1)
        # The median is the background's even where sprites cover a third of the frame.
        distances[name] = np.median(squared)
    return min(distances, key=distances.get)


def palette(sprites):
    """Return the colors to tell apart, a list of `V`, and for each the number of its sprite, -1 if nobody asked."""
    colors = []
    owners = []
    wanted = set()
    for number, words in enumerate(sprites):
        wanted.add(words["color"])
        wanted.add(words["to_color"])
        for color in asked_colors(words):
            colors.append(color)
            owners.append(number)
    for name, color in COLORS.items():
        if name not in wanted:
            colors.append(color)
            owners.append(-1)
    return colors, owners


def soft_masks(video, sprites):
    """Find each of `sprites` in `video`, by color.

    Return the opacity with which each pixel shows each sprite, `(S, F, H, W)` in 0..1, and the foreground, boolean
    `(F, H, W)`. A pixel belongs to one sprite at most, and to none if a color that nobody asked for fits better.
    """
    pixels = video.astype(np.float32)
    behind = background_colors(video, background_name(video))
    difference = pixels - behind
    foreground = (difference**2).sum(axis=-1) > CONTRAST**2  # (F, H, W)
    free = pixels[~foreground]
    # Away from the sprites the nearest background color is the pixel's own; under them only the average is known.
    if len(free):
        average = np.median(free, axis=0)
    else:
        average = np.median(behind, axis=(0, 1, 2))
    colors, owners = palette(sprites)
    points = pixels[foreground] - average  # (P, 3)
    vectors = np.array(colors, np.float32) - average  # (V, 3)
    along = points @ vectors.T  # (P, V)
    length = (vectors**2).sum(axis=1)  # (V,)
    opacity = np.clip(along / length, 0, 1)
    # |point - opacity * vector|^2 without the |point|^2 that all share
    distance = opacity * (opacity * length - 2 * along)
    best = distance.argmin(axis=1)  # (P,)
    best_opacity = opacity[np.arange(len(best)), best]
    owner = np.array(owners)[best]
    masks = np.zeros((len(sprites), *video.shape[:3]), np.float32)
    for number in range(len(sprites)):
        masks[number][foreground] = np.where(owner == number, best_opacity, 0)
    return masks, foreground


def locate(mask):
    """Return center `(2,)`, opacity and area in px of a soft mask `(H, W)`; None if fewer than four pixels show.

    Stray pixels far away are left out. The area counts a pixel by its opacity over the object's own, so that a faded
    object keeps its size.
    """
    ys, xs = np.nonzero(mask)
    if len(xs) < 4:
        return None
    weights = mask[ys, xs]
    middle_x = weighted_median(xs, weights)
    middle_y = weighted_median(ys, weights)
    spread = np.hypot(xs - middle_x, ys - middle_y)
    reach = 2.5 * max(3.0, weighted_median(spread, weights))
    near = spread <= reach
    xs = xs[near]
    ys = ys[near]
    weights = weights[near]
    moments = np.array([(xs * weights).sum(), (ys * weights).sum()])
    center = moments / weights.sum() + 0.5
    opacity = np.percentile(weights, 80)
    area = np.minimum(weights / opacity, 1).sum()
    return center, min(1.0, opacity), area


def weighted_median(values, weights):
    """Return the value at which half of the weight is reached."""
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    middle = np.searchsorted(total, total[-1] / 2)
    return float(values[order][middle])


def track(masks):
    """Track one sprite through `masks` `(F, H, W)`: `position (F, 2)`, `opacity (F,)`, `radius (F,)`; NaN unseen."""
    frames = len(masks)
    position = np.full((frames, 2), np.nan)
    opacity = np.full(frames, np.nan)
    radius = np.full(frames, np.nan)
    for frame, mask in enumerate(masks):
        found = locate(mask)
        if found is None:
            continue
        center, level, area = found
        position[frame] = center
        opacity[frame] = level
        radius[frame] = math.sqrt(area / math.pi)
    return position, opacity, radius


# ------------------------------------------------------------------------------------------------ one sprite


def measure_sprite(masks, solid, video, words, truth=None):
    """Score one sprite: a flat dict, NaN where a question has no meaning (the direction of a still object).

    `masks` `(F, H, W)` is where its color shows, `solid` the foreground that is no other asked sprite's.
    `truth` holds its exact arrays `position` `(F, 2)`, `velocity`, `radius`; without it the caption's nominal values
    are the reference, and the path starts where the object is first seen.
    """
    position, opacity, radius = track(masks)
    sprite = asked_sprite(words)
    _, expected_opacity, _ = modulation(sprite, len(masks))
    asked_area = math.pi * sprite.radius**2
    seen_area = np.nan_to_num(np.pi * radius**2)
    present = seen_area > AREA_SEEN * asked_area  # (F,)
    # Flicker is a question of amplitude, not of existence; before it has faded in nothing needs to be there.
    due = expected_opacity >= OPACITY_SEEN
    size_error = 1.0
    if present.any():
        mean_radius = float(np.nanmean(radius[present]))
        size_error = abs(mean_radius / sprite.radius - 1)
    return {
        "persistence": float(present[due].mean()),
        "size_error": size_error,
        **appearance(masks, solid, video, position, radius, present, words),
        **motion(position, present, words, sprite, truth),
        **change(video, masks, opacity, radius, present, words),
    }


def appearance(masks, solid, video, position, radius, present, words):
    """Return whether color and shape are right: shares of up to five frames spread over the clip."""
    frames = np.flatnonzero(present)
    if not len(frames):
        return {"color_right": 0.0, "shape_right": 0.0}
    places = np.linspace(0, len(frames) - 1, 5).round().astype(int)
    asked_names = (words["color"], words["to_color"])
    asked = asked_colors(words)
    others = np.array([color for name, color in COLORS.items() if name not in asked_names])
    axis = np.arange(masks.shape[-1]) + 0.5
    colors_right = []
    shapes_right = []
    for frame in frames[np.unique(places)]:
        mask = masks[frame]
        x, y = position[frame]
        # All of the object's inside, not only the pixels in which the asked color was found.
        inside = np.hypot(axis - x, axis[:, None] - y) < 0.8 * radius[frame]
        core = solid[frame] & inside
        if not core.any():
            core = mask > 0
        mean = video[frame][core].mean(axis=0)
        # A color on its way from one to another is right anywhere on the way; a faded one is mixed with what is
        # behind it, and `soft_masks` has already told it from the rest.
        asked_distance = np.linalg.norm(asked - mean, axis=1).min()
        other_distance = np.linalg.norm(others - mean, axis=1).min()
        faded = np.nanmax(mask) < FADED_BELOW
        colors_right.append(faded or asked_distance <= other_distance)
        shape = nearest_shape(mask, position[frame], radius[frame])
        shapes_right.append(shape == words["shape"])
    return {
        "color_right": float(np.mean(colors_right)),
        "shape_right": float(np.mean(shapes_right)),
    }


# Degrees after which a shape looks the same
SYMMETRIES = {
    "circle": 1,
    "square": 90,
    "cross": 90,
    "triangle": 120,
}


def nearest_shape(mask, position, radius):
    """Return the shape that, at its best angle, overlaps most with a soft mask `(H, W)`."""
    level = np.percentile(mask[mask > 0], 80)
    mask = np.clip(mask / level, 0, 1)
    best = (-1.0, "")
    for shape in SHAPES:
        angles = np.deg2rad(np.arange(0, SYMMETRIES[shape], 10))
        count = len(angles)
        positions = np.tile(position, (count, 1))
        radii = np.full(count, radius)
        drawn = coverage(shape, positions, radii, angles, len(mask))  # (angles, H, W)
        intersection = np.minimum(drawn, mask).sum(axis=(1, 2))
        union = np.maximum(drawn, mask).sum(axis=(1, 2))
        overlap = intersection / union
        candidate = (float(overlap.max()), shape)
        best = max(best, candidate)
    return best[1]


def motion(position, present, words, sprite, truth):
    """Return the errors of direction, speed and trajectory, against the truth or the caption's nominal values."""
    seen = np.flatnonzero(present)
    if len(seen) < FEWEST_SIGHTS:
        return {
            "direction_error": 180.0 if words["direction"] else NAN,
            "speed_error": 1.0,
            "trajectory_error": NAN,
            "degrees_turned": 0.0 if words["path"] == ORBIT else NAN,
        }
    # Speed over four frames: the noise of single positions would look like motion.
    steps = (position[4:] - position[:-4]) / 4
    seen_steps = steps[present[4:] & present[:-4]]
    speed = 0.0
    if len(seen_steps):
        speed = float(np.linalg.norm(seen_steps, axis=1).mean())
    if truth is None:
        # Center the reference on the whole path, not on one measured frame.
        start = start_of(position, seen, words)
        path, _ = trajectory(asked_sprite(words, start=start), len(position))
    else:
        path = truth["position"]
    distances = np.linalg.norm(position[seen] - path[seen], axis=1)
    if truth is None and words["path"] == ORBIT:
        distances = np.array([NAN])  # the words do not say which way round
    asked_steps = (path[4:] - path[:-4]) / 4
    asked_speed = float(np.linalg.norm(asked_steps, axis=1).mean())
    return {
        "speed_error": abs(speed - asked_speed) / max(asked_speed, SPEEDS["slowly"]),
        "trajectory_error": float(distances.mean()),
        "direction_error": direction_error(position, seen, words),
        "degrees_turned": degrees_turned(position, seen, words),
    }


def degrees_turned(position, seen, words):
    """Return by how many degrees a sprite went around the middle, either way; NaN if no orbit is asked.

    Turns to and fro cancel. The caption does not say which way, so that is not asked.
    """
    if words["path"] != ORBIT:
        return NAN
    x, y = (position[seen] - SIZE / 2).T
    angles = np.unwrap(np.arctan2(y, x))
    return abs(math.degrees(angles[-1] - angles[0]))


def direction_error(position, seen, words):
    """Return the degrees between the mean motion in the frames `seen` and the asked direction; NaN if none is."""
    if not words["direction"]:
        return NAN
    early = seen
    if words["path"] == "bouncing":
        # Before any bounce: within the first 30 % of the way (see `sample_start`).
        early = seen[seen <= 0.28 * (len(position) - 1)]
    slope = np.zeros(2)
    if len(early) >= 4:
        slope = np.polyfit(early, position[early], 1)[0]
    return angle_between(slope, DIRECTIONS[words["direction"]])


def start_of(position, seen, words):
    """Return the start of the asked path that fits what was seen: least squares, or the first sight if it bounces."""
    if words["path"] in ("bouncing", ORBIT):
        return position[seen[0]]
    path, _ = trajectory(asked_sprite(words, start=(0.0, 0.0)), len(position))
    return (position[seen] - path[seen]).mean(axis=0)


def angle_between(slope, direction):
    """Return the degrees between a mean velocity and the asked direction; 90, pure chance, for an object at rest."""
    length = np.linalg.norm(slope)
    if length < 0.05:
        return 90.0
    lengths = length * np.linalg.norm(direction)
    cosine = float(np.dot(slope, direction) / lengths)
    return math.degrees(math.acos(np.clip(cosine, -1, 1)))


def change(video, masks, opacity, radius, present, words):
    """Return the drift of a size that should stay, and the amplitude and period of what should change.

    `modulation_amplitude` is measured over asked (1 is right, 0 is nothing happening), `modulation_period_error`
    relative. The period is searched between 3 and 32 frames.
    """
    dynamics = words["dynamics"]
    scores = {
        "size_drift": NAN,
        "modulation_amplitude": NAN,
        "modulation_period_error": NAN,
    }
    seen = np.flatnonzero(present)
    if len(seen) < FEWEST_SIGHTS:
        if dynamics:
            scores["modulation_amplitude"] = 0.0
        return scores
    if dynamics != "pulsing":
        sizes = radius[seen]
        scores["size_drift"] = float(np.std(sizes) / np.mean(sizes))
    if dynamics in AMPLITUDES:
        if dynamics == "flickering":
            series = np.nan_to_num(opacity)
        else:
            series = radius / np.nanmean(radius)
        times = np.flatnonzero(np.isfinite(series))
        amplitude, period = sinusoid(times, series[times])
        asked_period = PERIODS[dynamics]
        scores["modulation_amplitude"] = amplitude / AMPLITUDES[dynamics]
        scores["modulation_period_error"] = abs(period - asked_period) / asked_period
    elif dynamics.startswith("fading"):
        scores["modulation_amplitude"] = fading_amplitude(opacity, dynamics)
    elif dynamics == "turning":
        scores["modulation_amplitude"] = turning_amplitude(video, masks, seen, words)
    return scores


def fading_amplitude(opacity, dynamics):
    """Return the change of opacity from the first four frames to the last four, over the asked one."""
    visible = np.nan_to_num(opacity)
    measured = visible[-4:].mean() - visible[:4].mean()
    # `modulation` changes it by 0.9 over the clip, and so by 0.82 between the means of four frames.
    asked = 0.82 if dynamics == "fading in" else -0.82
    return float(measured / asked)


def turning_amplitude(video, masks, seen, words):
    """Return how much of the way from its first to its last color a sprite went between its first and last sight."""
    first = np.array(COLORS[words["color"]], np.float64)
    last = np.array(COLORS[words["to_color"]], np.float64)
    whole = last - first
    ends = []
    for frame in (seen[0], seen[-1]):
        mask = masks[frame]
        core = mask > 0.8 * mask.max()
        ends.append(video[frame][core].mean(axis=0))
    measured = ends[1] - ends[0]
    return float(measured @ whole / (whole @ whole))


def sinusoid(times, values):
    """Return the peak-to-peak amplitude and the period, in frames, of the sinusoid that fits best."""
    best = (math.inf, 0.0, math.nan)
    for period in np.linspace(3, 32, 117):
        phase = 2 * np.pi * times / period
        columns = [np.ones(len(times)), np.cos(phase), np.sin(phase)]
        design = np.stack(columns, axis=1)
        solution = np.linalg.lstsq(design, values, rcond=None)[0]
        residual = design @ solution - values
        error = float((residual**2).sum())
        _, cosine, sine = solution
        amplitude = 2 * float(np.hypot(cosine, sine))
        best = min(best, (error, amplitude, float(period)))
    _, amplitude, period = best
    return amplitude, period


# ------------------------------------------------------------------------------------------------ the whole clip


def background_drift(video, foreground, pan):
    """Return how much the background changes from the first frame on, along the camera's asked pan.

    It is the mean absolute change, in 0..255; NaN where no background is free in two frames.
    """
    step = np.zeros(2)
    if pan:
        step = -PAN_SPEED * unit_vector(pan)
    # Soft edges reach a little beyond what is found.
    covered = dilate(foreground, 2)
    drifts = []
    for frame in range(1, len(video)):
        dx, dy = step * frame
        picture = video[frame].astype(np.float32)
        moved, inside = shifted(picture, dx, dy)
        cover = covered[frame].astype(np.float32)
        hidden, _ = shifted(cover[..., None], dx, dy)
        uncovered = hidden[..., 0] == 0
        free = inside & uncovered & ~covered[0]
        if free.any():
            difference = np.abs(moved - video[0])
            drifts.append(difference[free].mean())
    return float(np.mean(drifts)) if drifts else NAN


def dilate(masks, radius):
    """Grow boolean masks `(F, H, W)` by `radius` px along both axes."""
    height, width = masks.shape[1:]
    border = (radius, radius)
    padded = np.pad(masks, ((0, 0), border, border))
    grown = np.zeros_like(masks)
    for y in range(2 * radius + 1):
        for x in range(2 * radius + 1):
            grown |= padded[:, y : y + height, x : x + width]
    return grown


def shifted(image, dx, dy):
    """Read `image` `(H, W, C)` at (x + dx, y + dy), bilinear; return that, and where it lies inside `(H, W)`."""
    height, width = image.shape[:2]
    x = np.arange(width) + dx
    y = np.arange(height) + dy
    x0 = np.clip(np.floor(x).astype(int), 0, width - 2)
    y0 = np.clip(np.floor(y).astype(int), 0, height - 2)
    wx = (x - x0)[None, :, None].astype(np.float32)
    wy = (y - y0)[:, None, None].astype(np.float32)
    rows = image[y0] * (1 - wy) + image[y0 + 1] * wy
    moved = rows[:, x0] * (1 - wx) + rows[:, x0 + 1] * wx
    inside_x = (x >= 0) & (x <= width - 1)
    inside_y = (y >= 0) & (y <= height - 1)
    return moved, inside_y[:, None] & inside_x[None, :]


def measure(video, text, truth=None):
    """Score a clip.

    `video` is uint8 `(F, H, W, 3)`, `text` its caption, `truth` optionally what `render_clip` returned with it.
    Return a flat dict: the scores of its sprites averaged (NaN where they have no meaning), and those of the whole
    clip. Raise `ValueError` for a text that is no caption.
    """
    words = parse_caption(text)
    masks, foreground = soft_masks(video, words["sprites"])
    rows = []
    for number, sprite_words in enumerate(words["sprites"]):
        exact = None
        if truth is not None:
            exact = {key: truth[key][number] for key in ("position", "velocity", "radius")}
        others = np.delete(masks, number, axis=0).any(axis=0)
        solid = foreground & ~others
        row = measure_sprite(masks[number], solid, video, sprite_words, exact)
        rows.append(row)
    scores = mean_scores(rows)
    scores["background_right"] = float(background_name(video) == words["background"])
    scores["background_drift"] = background_drift(video, foreground, words["pan"])
    scores["temporal_flickering"] = temporal_flickering(video)
    return scores


def mean_scores(rows):
    """Return the mean of every score over the rows that have it; NaN if none has."""
    means = {}
    for key in rows[0]:
        values = [row[key] for row in rows if np.isfinite(row[key])]
        means[key] = float(np.mean(values)) if values else NAN
    return means


# ------------------------------------------------------------------------------------------------ command line


def round_trip(vae, video):
    """Send uint8 `(F, H, W, 3)` through the VAE and back."""
    import torch

    channels_first = torch.from_numpy(video).permute(3, 0, 1, 2)
    pixels = channels_first[None].float() / 127.5 - 1  # (1, 3, F, H, W)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode()
        restored = vae.decode(latents).sample[0]  # (3, F, H, W)
    levels = ((restored + 1) * 127.5).round().clamp(0, 255)
    return levels.byte().permute(1, 2, 3, 0).numpy()


def references(count, mix, vae_path, with_flow=False):
    """Score true held-out clips, and with `vae_path` their VAE round trips: what can be reached at best."""
    clips = []
    for index in range(count):
        spec = clip_spec(mix, 0, "heldout", index)
        video, _ = render_clip(spec)
        clips.append((video, caption(spec)))
    result = {"true clips": measure_clips(clips, with_flow)}
    if vae_path:
        from diffusers import AutoencoderKLWan

        vae = AutoencoderKLWan.from_pretrained(vae_path)
        restored = [(round_trip(vae, video), text) for video, text in clips]
        result["VAE round trip"] = measure_clips(restored, with_flow)
    return result


def measure_clips(clips, with_flow=False):
    """Return the mean scores over `(video, caption)` pairs."""
    rows = []
    for video, text in clips:
        scores = measure(video, text)
        if with_flow:
            scores["dis_dynamic_degree"] = dis_dynamic_degree(video)
        rows.append(scores)
    return mean_scores(rows)


def parse_args(input_args=None):
    """Parse the command line, or `input_args` instead of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("video_dir", help="videofolder: videos and metadata.jsonl with file_name and text")
    vae = Path(__file__).parent / "wan-nano" / "vae"
    parser.add_argument("--vae", default=vae, help="also score round trips through this VAE (default: the nano Wan's)")
    parser.add_argument("--mix", default="dynamic", choices=["calm", "dynamic"], help="of the true clips beside it")
    parser.add_argument("--flow", action="store_true", help="also the DIS dynamic degree (needs OpenCV)")
    parser.add_argument("--output", help="write the scores here as JSON")
    return parser.parse_args(input_args)


def main(args):
    """Print a table of the folder's scores beside those of the references, and write it if asked."""
    folder = Path(args.video_dir)
    metadata = (folder / "metadata.jsonl").read_text()
    clips = []
    for line in metadata.splitlines():
        row = json.loads(line)
        video = read_video(folder / row["file_name"])
        clips.append((video, row["text"]))
    own_scores = measure_clips(clips, args.flow)
    table = {str(folder): own_scores}
    table |= references(len(clips), args.mix, args.vae, args.flow)
    headings = [f"{name[-20:]:>22}" for name in table]
    print(f"{'':24}" + "".join(headings))
    for key in own_scores:
        cells = [f"{scores[key]:22.3f}" for scores in table.values()]
        print(f"{key:24}" + "".join(cells))
    if args.output:
        Path(args.output).write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main, parse_args)
