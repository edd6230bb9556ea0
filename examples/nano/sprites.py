"""Captioned sprite videos with exact ground truth: the nano Wan's data, and a demo of the `videofolder` format.

    python examples/nano/sprites.py outputs/sprites/calm --mix calm --count 2048 --seed 0
    python examples/nano/sprites.py outputs/sprites/heldout --mix dynamic --count 64 --seed 0 --split heldout

A clip is 33 frames of 96 x 96 at 16 fps: one to three sprites over a soft background. The caption says all that is
random in words; `parse_caption` is its inverse, so a generated video can be measured against the prompt alone.
Everything follows from (seed, split, index). Positions are in pixels (x to the right, y *down*, pixel centres at
integer + 0.5), velocities in pixels per frame, colours in 0..255. Motion is described as seen on the screen: a camera
pan moves the background, and against the named direction, as the world does when a camera turns.
"""

import argparse
import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(EXAMPLES))  # videos.py: examples/ is folders of scripts, not a package

from videos import write_video

SIZE, FRAMES, FPS = 96, 33, 16
# Near lossless. Without its macroblock tree x264 writes the same bytes every time.
CODEC = {"crf": "8", "preset": "fast", "x264-params": "mbtree=0"}
EDGE = 1.5  # px over which an edge fades: antialiasing, and soft enough for a small VAE

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (230, 40, 40), "orange": (250, 140, 30), "yellow": (250, 225, 60), "green": (50, 200, 70),
    "cyan": (60, 220, 230), "blue": (50, 90, 250), "purple": (165, 60, 220), "white": (245, 245, 245),
}  # fmt: skip
SIZES = {"small": 10.0, "medium": 13.5, "large": 17.5}  # radius of the circle of equal area, px
SPEEDS = {"slowly": 0.7, "steadily": 1.3, "quickly": 2.1}  # mean speed, px per frame
DIRECTIONS = {
    "right": (1, 0), "bottom right": (1, 1), "bottom": (0, 1), "bottom left": (-1, 1),
    "left": (-1, 0), "top left": (-1, -1), "top": (0, -1), "top right": (1, -1),
}  # fmt: skip
PATHS = ("bouncing", "speeding up", "slowing down")  # or "", a straight path at constant speed
DYNAMICS = ("flickering", "pulsing", "fading in", "fading out", "turning")  # or ""
PERIODS = {"flickering": 8.0, "pulsing": 14.0}  # frames
# Dark and muted, so that a sprite of any colour stands out; the two ends of the gradient.
BACKGROUNDS = {
    "gray": ((35, 35, 38), (110, 110, 115)), "blue": ((18, 28, 62), (60, 84, 140)),
    "green": ((18, 48, 32), (62, 112, 82)), "brown": ((50, 34, 24), (126, 94, 70)),
    "purple": ((40, 24, 56), (98, 72, 122)),
}  # fmt: skip
PATTERNS = ("gradient", "stripes", "clouds")
PAN_SPEED = 1.0  # px per frame
# Paths have their middle at most so far from the picture's, px. With free starts a caption says little about where
# things are when, and a base model of this size had learned no direction after ten thousand steps.
MIDDLE = 16.0
SPLITS = {"train": 0, "heldout": 1}

# Probabilities: number of sprites (1, 2, 3), speed (still, slowly, steadily, quickly), path (straight, bouncing,
# speeding up, slowing down), spin, dynamics, pan. Every word occurs in calm and dynamic; the base model learns the
# words where little moves. "lesson" taught it directions first: in calm clips they show too little to be noticed.
MIXES = {
    "calm": {"sprites": (0.8, 0.14, 0.06), "speed": (0.15, 0.40, 0.30, 0.15), "path": (0.79, 0.07, 0.07, 0.07),
             "spin": 0.08, "dynamics": 0.20, "pan": 0.05},
    "dynamic": {"sprites": (0.8, 0.14, 0.06), "speed": (0.05, 0.10, 0.30, 0.55), "path": (0.49, 0.21, 0.15, 0.15),
                "spin": 0.30, "dynamics": 0.40, "pan": 0.20},
    "lesson": {"sprites": (1, 0, 0), "speed": (0, 0, 0.3, 0.7), "path": (1, 0, 0, 0), "spin": 0, "dynamics": 0,
               "pan": 0},
}  # fmt: skip


@dataclass(frozen=True)
class Sprite:
    """One sprite: the words of the caption, then the numbers that the caption leaves open."""

    size: str
    color: str
    shape: str
    speed: str  # "still" or a key of SPEEDS
    direction: str  # key of DIRECTIONS, "" when still
    path: str
    spin: bool
    dynamics: str
    to_color: str  # only with "turning"
    radius: float  # px
    start: tuple[float, float]  # px
    velocity: tuple[float, float]  # mean, px per frame, before any bounce
    angle: float  # rad
    angular_speed: float  # rad per frame
    period: float  # frames, of flickering or pulsing
    phase: float  # rad


@dataclass(frozen=True)
class Clip:
    """All that a clip is made of. The last sprite is drawn on top."""

    sprites: tuple[Sprite, ...]
    background: str
    pattern: str
    pan: str  # key of DIRECTIONS or ""
    waves: tuple[tuple[float, float, float], ...]  # (kx, ky, phase) of the background, rad per px


# ---------------------------------------------------------------------------------------------- specification


def clip_spec(mix, seed, split, index):
    """The `Clip` number `index` of a set: no two of mix, seed, split and index share a random stream."""
    return sample_spec(np.random.default_rng([tuple(MIXES).index(mix), seed, SPLITS[split], index]), mix)


def choose(rng, options, p=None):
    """One of `options`; numpy's own `choice` would turn tuples into arrays."""
    return options[int(rng.choice(len(options), p=p))]


def sample_sprite(rng, mix, color, background):
    """Draw one sprite whose whole path keeps its centre on the screen, so that no motion is lost outside."""
    probabilities = MIXES[mix]
    size, shape = choose(rng, tuple(SIZES)), choose(rng, SHAPES)
    speed = choose(rng, ("still", *SPEEDS), probabilities["speed"])
    direction = path = ""
    radius = SIZES[size] * rng.uniform(0.93, 1.07)
    velocity = np.zeros(2)
    if speed != "still":
        direction = choose(rng, tuple(DIRECTIONS))
        path = choose(rng, ("", *PATHS), probabilities["path"])
        unit = np.array(DIRECTIONS[direction]) / np.linalg.norm(DIRECTIONS[direction])
        velocity = unit * SPEEDS[speed] * rng.uniform(0.9, 1.1)
    # A circle cannot be seen turning.
    spin = bool(rng.random() < probabilities["spin"]) and shape != "circle"
    dynamics = choose(rng, DYNAMICS) if rng.random() < probabilities["dynamics"] else ""
    others = tuple(other for other in COLORS if other not in (color, background))
    to_color = choose(rng, others) if dynamics == "turning" else ""
    return Sprite(
        size, color, shape, speed, direction, path, spin, dynamics, to_color, radius,
        start=tuple(sample_start(rng, velocity, radius, path)), velocity=tuple(velocity),
        angle=rng.uniform(-0.3, 0.3) if not spin else rng.uniform(0, 2 * np.pi),
        angular_speed=choose(rng, (-1, 1)) * rng.uniform(0.12, 0.2) if spin else 0.0,
        period=PERIODS.get(dynamics, 0.0) * rng.uniform(0.9, 1.1), phase=rng.uniform(0, 2 * np.pi),
    )  # fmt: skip


def sample_start(rng, velocity, radius, path):
    """First centre `(x, y)` in px: the path crosses the middle of the picture, or, with bouncing, meets a wall."""
    low, high = walls(radius)
    travel = velocity * (FRAMES - 1)
    middle = SIZE / 2 + rng.uniform(-MIDDLE, MIDDLE, 2)
    start = np.clip(middle - travel / 2, low + np.maximum(0, -travel), high - np.maximum(0, travel))
    if path == "bouncing":
        distance = np.abs(travel) * rng.uniform(0.3, 0.6)
        at_wall = np.where(velocity > 0, high - distance, low + distance)
        start = np.where(np.abs(velocity) > 1e-9, np.clip(at_wall, low, high), start)
    return start.tolist()


def walls(radius):
    """Range of a centre coordinate, px: at most two fifths of the radius leave the screen."""
    return 0.6 * radius, SIZE - 0.6 * radius


def sample_spec(rng, mix):
    """Draw a `Clip` from `mix`, a key of `MIXES`; `rng` is a numpy Generator."""
    if mix not in MIXES:
        raise ValueError(f"mix must be one of {', '.join(MIXES)}, not {mix!r}")
    background, pattern = choose(rng, tuple(BACKGROUNDS)), choose(rng, PATTERNS)
    # Distinct colours, none the background's: "the red one" then has one meaning in a caption.
    colors = rng.permutation([color for color in COLORS if color != background])
    count = choose(rng, (1, 2, 3), MIXES[mix]["sprites"])
    sprites = tuple(sample_sprite(rng, mix, str(color), background) for color in colors[:count])
    pan = choose(rng, tuple(DIRECTIONS)) if rng.random() < MIXES[mix]["pan"] else ""
    return Clip(sprites, background, pattern, pan, sample_waves(rng, pattern))


def sample_waves(rng, pattern):
    """Plane waves whose sum is the background. Wavelengths stay above two latent voxels: texture, but soft."""
    lengths = {"gradient": (200, 260), "stripes": (30, 44), "clouds": (45, 80)}[pattern]
    waves = []
    for _ in range(4 if pattern == "clouds" else 1):
        angle, number = rng.uniform(0, 2 * np.pi), 2 * np.pi / rng.uniform(*lengths)
        waves.append((number * np.cos(angle), number * np.sin(angle), rng.uniform(0, 2 * np.pi)))
    return tuple(waves)


# ---------------------------------------------------------------------------------------------- captions


def caption(spec):
    """The caption, e.g. "a large red circle moves quickly to the left over a blue gradient"."""
    sprites = " and ".join(sprite_phrase(sprite) for sprite in spec.sprites)
    article = "a " if spec.pattern == "gradient" else ""
    pan = f", the camera pans to the {spec.pan}" if spec.pan else ""
    return f"{sprites} over {article}{spec.background} {spec.pattern}{pan}"


def sprite_phrase(sprite):
    """The part of a caption that describes one sprite."""
    motion = "stays still" if sprite.speed == "still" else f"moves {sprite.speed} to the {sprite.direction}"
    dynamics = f"turning {sprite.to_color}" if sprite.dynamics == "turning" else sprite.dynamics
    extras = [phrase for phrase in (sprite.path, "spinning" if sprite.spin else "", dynamics) if phrase]
    return ", ".join([f"a {sprite.size} {sprite.color} {sprite.shape} {motion}", *extras])


SPRITE_PATTERN = re.compile(
    r"an? (?P<size>\w+) (?P<color>\w+) (?P<shape>\w+) (?:stays (?P<still>still)|moves (?P<speed>\w+) to the "
    rf"(?P<direction>{'|'.join(sorted(DIRECTIONS, key=len, reverse=True))}))"
    rf"(?:, (?P<path>{'|'.join(PATHS)}))?(?:, (?P<spin>spinning))?"
    rf"(?:, (?:(?P<dynamics>{'|'.join(DYNAMICS[:-1])})|turning (?P<to_color>\w+)))?"
)


SCENE_PATTERN = re.compile(r"(?:a )?(?P<background>\w+) (?P<pattern>\w+)(?:, the camera pans to the (?P<pan>[\w ]+))?")


def parse_caption(text):
    """The inverse of `caption`: a dict with `sprites` (dicts of the words), `background`, `pattern`, `pan`."""
    body, _, scene = text.partition(" over ")
    match = SCENE_PATTERN.fullmatch(scene)
    sprites = [SPRITE_PATTERN.fullmatch(phrase) for phrase in body.split(" and ")]
    if match is None or None in sprites:
        raise ValueError(f"not a sprite caption: {text!r}")
    words = []
    for found in sprites:
        word = {key: value or "" for key, value in found.groupdict().items()}
        word["speed"] = word.pop("still") or word["speed"]
        word["spin"] = bool(word["spin"])
        word["dynamics"] = "turning" if word["to_color"] else word["dynamics"]
        words.append(word)
    return {"sprites": words, **{key: value or "" for key, value in match.groupdict().items()}}


def caption_words(spec):
    """What `parse_caption(caption(spec))` must return."""
    keys = ("size", "color", "shape", "speed", "direction", "path", "spin", "dynamics", "to_color")
    sprites = [{key: getattr(sprite, key) for key in keys} for sprite in spec.sprites]
    return {"sprites": sprites, "background": spec.background, "pattern": spec.pattern, "pan": spec.pan}


# ---------------------------------------------------------------------------------------------- ground truth


def trajectory(sprite, frames=FRAMES):
    """Centre `(F, 2)` in px and velocity `(F, 2)` in px per frame."""
    time = np.arange(frames, dtype=np.float64)
    total = FRAMES - 1
    # Distance along the path in units of the mean step, and its derivative; all paths are equally long.
    if sprite.path == "speeding up":
        progress, rate = 0.2 * time + 0.8 * time**2 / total, 0.2 + 1.6 * time / total
    elif sprite.path == "slowing down":
        progress, rate = 1.8 * time - 0.8 * time**2 / total, 1.8 - 1.6 * time / total
    else:
        progress, rate = time, np.ones_like(time)
    velocity = np.array(sprite.velocity)
    position = np.array(sprite.start) + velocity * progress[:, None]
    speed = velocity * rate[:, None]
    if sprite.path == "bouncing":
        low, high = walls(sprite.radius)
        folded = (position - low) % (2 * (high - low))
        back = folded > high - low
        position = low + np.where(back, 2 * (high - low) - folded, folded)
        speed = np.where(back, -speed, speed)
    return position, speed


def modulation(sprite, frames=FRAMES):
    """Radius `(F,)` in px, opacity `(F,)` in 0..1 and colour `(F, 3)` in 0..255."""
    time = np.arange(frames, dtype=np.float64)
    ramp = time / (FRAMES - 1)
    radius, opacity = np.full(frames, sprite.radius), np.ones(frames)
    color = np.tile(np.array(COLORS[sprite.color], dtype=np.float64), (frames, 1))
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * time / sprite.period + sprite.phase) if sprite.period else 0.0
    if sprite.dynamics == "flickering":
        opacity = 1 - 0.65 * wave
    elif sprite.dynamics == "pulsing":
        radius = sprite.radius * (1.25 - 0.5 * wave)
    elif sprite.dynamics == "fading in":
        opacity = 0.1 + 0.9 * ramp
    elif sprite.dynamics == "fading out":
        opacity = 1 - 0.9 * ramp
    elif sprite.dynamics == "turning":
        color = color + (np.array(COLORS[sprite.to_color]) - color) * ramp[:, None]
    return radius, opacity, color


def coverage(shape, position, radius, angle, size=SIZE):
    """Share of every pixel inside a shape, `(F, H, W)` in 0..1, with an edge `EDGE` px wide.

    `position` is `(F, 2)`, `radius` and `angle` are `(F,)`. `radius` is that of a circle of the same area, so that
    a size means the same for every shape.
    """
    axis = np.arange(size, dtype=np.float32) + 0.5
    x = axis[None, None, :] - position[:, 0, None, None].astype(np.float32)  # (F, 1, W)
    y = axis[None, :, None] - position[:, 1, None, None].astype(np.float32)  # (F, H, 1)
    radius = radius.astype(np.float32)[:, None, None]
    if shape != "circle":
        cos, sin = np.cos(angle, dtype=np.float32)[:, None, None], np.sin(angle, dtype=np.float32)[:, None, None]
        x, y = cos * x + sin * y, cos * y - sin * x
    return np.clip(0.5 - signed_distance(shape, x, y, radius) / EDGE, 0, 1)


def signed_distance(shape, x, y, radius):
    """Distance in px to the outline, negative inside (exact near edges, which is all that antialiasing needs)."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - np.float32(np.sqrt(np.pi) / 2) * radius
    if shape == "triangle":
        inner = np.float32(np.sqrt(np.pi / (3 * np.sqrt(3)))) * radius  # radius of the inscribed circle
        slope = np.float32(np.sqrt(3) / 2)
        return np.maximum(slope * np.abs(x) - 0.5 * y, y) - inner
    if shape == "cross":
        arm = np.float32(np.sqrt(np.pi / 5)) * radius / 2  # a cross is five squares of side 2 * arm
        x, y = np.abs(x), np.abs(y)
        return np.maximum(np.minimum(x, y) - arm, np.maximum(x, y) - 3 * arm)
    raise ValueError(f"shape must be one of {', '.join(SHAPES)}, not {shape!r}")


def render_background(spec, frames=FRAMES):
    """Background `(F or 1, H, W, 3)` float32 in 0..255, and its shift `(F, 2)` in px since the first frame."""
    time = np.arange(frames)
    step = np.zeros(2)
    if spec.pan:
        step = -PAN_SPEED * np.array(DIRECTIONS[spec.pan]) / np.linalg.norm(DIRECTIONS[spec.pan])
    shift = time[:, None] * step
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    moved = shift.astype(np.float32) if spec.pan else np.zeros((1, 2), np.float32)
    level = sum(
        np.sin(kx * (axis[None, None, :] - moved[:, 0, None, None])
               + ky * (axis[None, :, None] - moved[:, 1, None, None]) + phase)
        for kx, ky, phase in np.array(spec.waves, dtype=np.float32)
    )  # fmt: skip
    level = 0.5 + 0.5 * level / np.sqrt(len(spec.waves))
    dark, light = np.array(BACKGROUNDS[spec.background], dtype=np.float32)
    return np.clip(dark + (light - dark) * level[..., None], 0, 255), shift


def render_clip(spec, frames=FRAMES):
    """Draw a clip.

    Returns `(video, truth)`: uint8 `(F, H, W, 3)`, and a dict of arrays over sprites `S` and frames: `position`
    `(S, F, 2)`, `velocity` `(S, F, 2)`, `radius` `(S, F)`, `angle` `(S, F)`, `opacity` `(S, F)`, `color` `(S, F, 3)`,
    `background_shift` `(F, 2)` and `mask` uint8 `(F, H, W)`: 0 for background, i + 1 where sprite i is on top
    (by its outline, however transparent it is).
    """
    background, shift = render_background(spec, frames)
    video = np.repeat(background, frames, axis=0) if len(background) == 1 else background  # (F, H, W, 3)
    mask = np.zeros(video.shape[:3], dtype=np.uint8)
    rows = []
    for number, sprite in enumerate(spec.sprites, start=1):
        position, velocity = trajectory(sprite, frames)
        radius, opacity, color = modulation(sprite, frames)
        angle = sprite.angle + sprite.angular_speed * np.arange(frames)
        alpha = coverage(sprite.shape, position, radius, angle)  # (F, H, W)
        mask[alpha > 0.5] = number
        alpha *= opacity.astype(np.float32)[:, None, None]
        video += alpha[..., None] * (color.astype(np.float32)[:, None, None, :] - video)
        rows.append({"position": position, "velocity": velocity, "radius": radius, "angle": angle,
                     "opacity": opacity, "color": color})  # fmt: skip
    truth = {key: np.stack([row[key] for row in rows]).astype(np.float32) for key in rows[0]}
    return np.round(video).astype(np.uint8), {**truth, "background_shift": shift.astype(np.float32), "mask": mask}


# ---------------------------------------------------------------------------------------------- files


def write_dataset(folder, mix, count, seed, split="train"):
    """Write `count` clips as a `videofolder`: mp4 and metadata.jsonl, with ground truth (.npz) beside each clip."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        spec = clip_spec(mix, seed, split, index)
        video, truth = render_clip(spec)
        # No "train" or "test" in it: `load_dataset` would take that for a split, and leave metadata.jsonl out.
        name = f"{mix}-{split[0]}{seed}-{index:05d}"
        write_video(video, folder / f"{name}.mp4", FPS, codec=CODEC)
        np.savez_compressed(folder / f"{name}.npz", spec=json.dumps(asdict(spec)), **truth)
        lines.append(json.dumps({"file_name": f"{name}.mp4", "text": caption(spec)}))
    # Last, so that a folder with metadata is a complete one.
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output_dir", help="folder to write the videofolder to")
    parser.add_argument("--mix", choices=MIXES, default="calm", help="how much motion")
    parser.add_argument("--count", type=int, default=256, help="number of clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train", help="held-out clips share no seed with training")
    return parser.parse_args(input_args)


def main(args):
    write_dataset(args.output_dir, args.mix, args.count, args.seed, args.split)


if __name__ == "__main__":
    main(parse_args())
