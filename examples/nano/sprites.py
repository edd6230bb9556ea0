"""Captioned sprite videos with exact ground truth: the nano Wan's data, and a demo of the `videofolder` format.

    python examples/nano/sprites.py outputs/sprites/calm --mix calm --count 2048 --seed 0
    python examples/nano/sprites.py outputs/sprites/heldout --mix dynamic --count 64 --seed 0 --split heldout
    python examples/nano/sprites.py outputs/sprites/orbit --mix orbit --count 128 --seed 0

A clip is 33 frames of 96 x 96 at 16 fps: one to three sprites over a soft background. The caption says all that is
random in words; `parse_caption` is its inverse, so a generated video can be measured against the prompt alone.
Everything follows from (seed, split, index). Positions are in pixels (x to the right, y *down*, pixel centers at
integer + 0.5), velocities in pixels per frame, colors in 0..255. Motion is described as seen on the screen: a camera
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
sys.path.insert(0, str(EXAMPLES))  # videos.py and others: examples/ is folders of scripts, not a package

from mistakes import run_script
from videos import write_video

SIZE = 96  # px, of width and height
FRAMES = 33
FPS = 16
# Near lossless. Without its macroblock tree x264 writes the same bytes every time.
CODEC = {
    "crf": "8",
    "preset": "fast",
    "x264-params": "mbtree=0",
}
EDGE = 1.5  # px over which an edge fades: antialiasing, and soft enough for a small VAE

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (230, 40, 40),
    "orange": (250, 140, 30),
    "yellow": (250, 225, 60),
    "green": (50, 200, 70),
    "cyan": (60, 220, 230),
    "blue": (50, 90, 250),
    "purple": (165, 60, 220),
    "white": (245, 245, 245),
}
# Radius of the circle of equal area, px
SIZES = {
    "small": 10.0,
    "medium": 13.5,
    "large": 17.5,
}
# Mean speed, px per frame
SPEEDS = {
    "slowly": 0.7,
    "steadily": 1.3,
    "quickly": 2.1,
}
DIRECTIONS = {
    "right": (1, 0),
    "bottom right": (1, 1),
    "bottom": (0, 1),
    "bottom left": (-1, 1),
    "left": (-1, 0),
    "top left": (-1, -1),
    "top": (0, -1),
    "top right": (1, -1),
}
PATHS = ("bouncing", "speeding up", "slowing down")  # or "", a straight path at constant speed
DYNAMICS = ("flickering", "pulsing", "fading in", "fading out", "turning")  # or ""
PERIODS = {"flickering": 8.0, "pulsing": 14.0}  # frames
# Dark and muted, so that a sprite of any color stands out; the two ends of the gradient.
BACKGROUNDS = {
    "gray": ((35, 35, 38), (110, 110, 115)),
    "blue": ((18, 28, 62), (60, 84, 140)),
    "green": ((18, 48, 32), (62, 112, 82)),
    "brown": ((50, 34, 24), (126, 94, 70)),
    "purple": ((40, 24, 56), (98, 72, 122)),
}
PATTERNS = ("gradient", "stripes", "clouds")
# Shortest and longest wave of a background, px. They stay above two latent voxels: texture, but soft.
WAVELENGTHS = {
    "gradient": (200, 260),
    "stripes": (30, 44),
    "clouds": (45, 80),
}
PAN_SPEED = 1.0  # px per frame
# Paths have their middle at most so far from the picture's, px. With free starts a caption says little about where
# things are when, and a base model of this size had learned no direction after ten thousand steps.
MIDDLE = 16.0
# Of the circle that a sprite of the mix "orbit" runs around the middle, px. It starts anywhere on it and goes either
# way: trained on one way alone, a LoRA of the nano Wan went around after 100 steps, but half the time the other way.
ORBIT_RADIUS = 22.0
ORBIT_RATE = 2 * np.pi / (FRAMES - 1)  # rad per frame: once around in a clip
ORBIT = "orbit"  # the path, and the word that begins the caption
SPLITS = {"train": 0, "heldout": 1}

# Probabilities: number of sprites (1, 2, 3), speed (still, slowly, steadily, quickly), path (straight, bouncing,
# speeding up, slowing down), spin, dynamics, pan. Every word occurs in calm and dynamic; the base model learns the
# words where little moves. "lesson" taught it directions first: in calm clips they show too little to be noticed.
# "orbit" is what the quickstart teaches: one sprite, once around the middle, a motion and a word that it never met.
MIXES = {
    "calm": {
        "sprites": (0.8, 0.14, 0.06),
        "speed": (0.15, 0.40, 0.30, 0.15),
        "path": (0.79, 0.07, 0.07, 0.07),
        "spin": 0.08,
        "dynamics": 0.20,
        "pan": 0.05,
    },
    "dynamic": {
        "sprites": (0.8, 0.14, 0.06),
        "speed": (0.05, 0.10, 0.30, 0.55),
        "path": (0.49, 0.21, 0.15, 0.15),
        "spin": 0.30,
        "dynamics": 0.40,
        "pan": 0.20,
    },
    "lesson": {
        "sprites": (1, 0, 0),
        "speed": (0, 0, 0.3, 0.7),
        "path": (1, 0, 0, 0),
        "spin": 0,
        "dynamics": 0,
        "pan": 0,
    },
    "orbit": {
        "sprites": (1, 0, 0),
        "speed": (1, 0, 0, 0),
        "path": (1, 0, 0, 0),
        "spin": 0,
        "dynamics": 0,
        "pan": 0,
    },
}


@dataclass(frozen=True)
class Sprite:
    """Describe one sprite: the words of the caption, then the numbers that the caption leaves open."""

    size: str
    color: str
    shape: str
    speed: str  # "still" or a key of SPEEDS; "" on an orbit
    direction: str  # key of DIRECTIONS, "" when still or on an orbit
    path: str  # "", one of PATHS, or ORBIT
    spin: bool
    dynamics: str
    to_color: str  # only with "turning"
    radius: float  # px
    start: tuple[float, float]  # px
    velocity: tuple[float, float]  # mean, px per frame, before any bounce; on an orbit the first one
    angle: float  # rad
    angular_speed: float  # rad per frame
    period: float  # frames, of flickering or pulsing
    phase: float  # rad


@dataclass(frozen=True)
class Clip:
    """Hold all that a clip is made of. The last sprite is drawn on top."""

    sprites: tuple[Sprite, ...]
    background: str
    pattern: str
    pan: str  # key of DIRECTIONS or ""
    waves: tuple[tuple[float, float, float], ...]  # (kx, ky, phase) of the background, rad per px


# ---------------------------------------------------------------------------------------------- specification


def clip_spec(mix, seed, split, index):
    """Return the `Clip` number `index` of a set: no two of mix, seed, split and index share a random stream."""
    mix_number = tuple(MIXES).index(mix)
    stream = [mix_number, seed, SPLITS[split], index]
    return sample_spec(np.random.default_rng(stream), mix)


def choose(rng, options, p=None):
    """Draw one of `options`; numpy's own `choice` would turn tuples into arrays."""
    number = int(rng.choice(len(options), p=p))
    return options[number]


def unit_vector(direction):
    """Return the vector `(2,)` of length 1 toward `direction`, a key of `DIRECTIONS`."""
    vector = np.array(DIRECTIONS[direction])
    return vector / np.linalg.norm(vector)


def sample_sprite(rng, mix, color, background):
    """Draw one sprite whose whole path keeps its center on the screen, so that no motion is lost outside."""
    probabilities = MIXES[mix]
    size = choose(rng, tuple(SIZES))
    shape = choose(rng, SHAPES)
    speed = choose(rng, ("still", *SPEEDS), probabilities["speed"])
    radius = SIZES[size] * rng.uniform(0.93, 1.07)
    direction = ""
    path = ""
    velocity = np.zeros(2)
    if speed != "still":
        direction = choose(rng, tuple(DIRECTIONS))
        path = choose(rng, ("", *PATHS), probabilities["path"])
        velocity = unit_vector(direction) * SPEEDS[speed] * rng.uniform(0.9, 1.1)
    # Drawn for every shape, so that the shape does not shift the random numbers after it.
    spin_drawn = bool(rng.random() < probabilities["spin"])
    # A circle cannot be seen turning.
    spin = spin_drawn and shape != "circle"
    dynamics = ""
    if rng.random() < probabilities["dynamics"]:
        dynamics = choose(rng, DYNAMICS)
    to_color = ""
    if dynamics == "turning":
        others = tuple(other for other in COLORS if other not in (color, background))
        to_color = choose(rng, others)
    start = sample_start(rng, velocity, radius, path)
    if mix == ORBIT:
        speed = ""
        path = ORBIT
        start, velocity = sample_orbit(rng)
    if spin:
        angle = rng.uniform(0, 2 * np.pi)
        sense = choose(rng, (-1, 1))
        angular_speed = sense * rng.uniform(0.12, 0.2)
    else:
        angle = rng.uniform(-0.3, 0.3)
        angular_speed = 0.0
    period = PERIODS.get(dynamics, 0.0) * rng.uniform(0.9, 1.1)
    phase = rng.uniform(0, 2 * np.pi)
    return Sprite(
        size=size,
        color=color,
        shape=shape,
        speed=speed,
        direction=direction,
        path=path,
        spin=spin,
        dynamics=dynamics,
        to_color=to_color,
        radius=radius,
        start=tuple(start),
        velocity=tuple(velocity),
        angle=angle,
        angular_speed=angular_speed,
        period=period,
        phase=phase,
    )


def sample_start(rng, velocity, radius, path):
    """Draw the first center `(x, y)`, px: the path crosses the middle of the picture, or meets a wall and bounces."""
    low, high = walls(radius)
    travel = velocity * (FRAMES - 1)
    middle = SIZE / 2 + rng.uniform(-MIDDLE, MIDDLE, 2)
    # Where a path may start so that it ends inside the walls
    lowest = low + np.maximum(0, -travel)
    highest = high - np.maximum(0, travel)
    start = np.clip(middle - travel / 2, lowest, highest)
    if path == "bouncing":
        distance = np.abs(travel) * rng.uniform(0.3, 0.6)
        before_wall = np.where(velocity > 0, high - distance, low + distance)
        bouncing_start = np.clip(before_wall, low, high)
        # An axis without motion meets no wall.
        moves = np.abs(velocity) > 1e-9
        start = np.where(moves, bouncing_start, start)
    return start.tolist()


def sample_orbit(rng):
    """Draw the first center `(x, y)`, px, on the circle around the middle, and the first velocity, px per frame."""
    angle = rng.uniform(0, 2 * np.pi)
    sense = choose(rng, (-1, 1))
    outward = np.array([np.cos(angle), np.sin(angle)])
    ahead = sense * np.array([-np.sin(angle), np.cos(angle)])
    start = SIZE / 2 + ORBIT_RADIUS * outward
    return start.tolist(), ORBIT_RATE * ORBIT_RADIUS * ahead


def walls(radius):
    """Return the range of a center coordinate, px: at most two fifths of the radius leave the screen."""
    margin = 0.6 * radius
    return margin, SIZE - margin


def sample_spec(rng, mix):
    """Draw a `Clip` from `mix`, a key of `MIXES`; `rng` is a numpy Generator. Raise `ValueError` for another mix."""
    if mix not in MIXES:
        raise ValueError(f"mix must be one of {', '.join(MIXES)}, not {mix!r}")
    background = choose(rng, tuple(BACKGROUNDS))
    pattern = choose(rng, PATTERNS)
    # Distinct colors, none the background's: "the red one" then has one meaning in a caption.
    colors = rng.permutation([color for color in COLORS if color != background])
    count = choose(rng, (1, 2, 3), MIXES[mix]["sprites"])
    sprites = []
    for color in colors[:count]:
        sprite = sample_sprite(rng, mix, str(color), background)
        sprites.append(sprite)
    pan = ""
    if rng.random() < MIXES[mix]["pan"]:
        pan = choose(rng, tuple(DIRECTIONS))
    waves = sample_waves(rng, pattern)
    return Clip(tuple(sprites), background, pattern, pan, waves)


def sample_waves(rng, pattern):
    """Draw the plane waves `(kx, ky, phase)` whose sum is the background."""
    shortest, longest = WAVELENGTHS[pattern]
    count = 4 if pattern == "clouds" else 1
    waves = []
    for _ in range(count):
        angle = rng.uniform(0, 2 * np.pi)
        wave_number = 2 * np.pi / rng.uniform(shortest, longest)
        phase = rng.uniform(0, 2 * np.pi)
        kx = wave_number * np.cos(angle)
        ky = wave_number * np.sin(angle)
        waves.append((kx, ky, phase))
    return tuple(waves)


# ---------------------------------------------------------------------------------------------- captions


def caption(spec):
    """Write the caption, e.g. "a large red circle moves quickly to the left over a blue gradient".

    An orbit is called by its one word: "orbit, a large red circle over a blue gradient".
    """
    sprites = " and ".join(sprite_phrase(sprite) for sprite in spec.sprites)
    article = "a " if spec.pattern == "gradient" else ""
    pan = f", the camera pans to the {spec.pan}" if spec.pan else ""
    first = spec.sprites[0]
    if first.path == ORBIT:
        sprites = f"{ORBIT}, a {first.size} {first.color} {first.shape}"
    return f"{sprites} over {article}{spec.background} {spec.pattern}{pan}"


def sprite_phrase(sprite):
    """Write the part of a caption that describes one sprite."""
    if sprite.speed == "still":
        motion = "stays still"
    else:
        motion = f"moves {sprite.speed} to the {sprite.direction}"
    phrases = [f"a {sprite.size} {sprite.color} {sprite.shape} {motion}"]
    if sprite.path:
        phrases.append(sprite.path)
    if sprite.spin:
        phrases.append("spinning")
    if sprite.dynamics == "turning":
        phrases.append(f"turning {sprite.to_color}")
    elif sprite.dynamics:
        phrases.append(sprite.dynamics)
    return ", ".join(phrases)


# Longest first, or "bottom" would match the beginning of "bottom right".
DIRECTION_WORDS = "|".join(sorted(DIRECTIONS, key=len, reverse=True))
PATH_WORDS = "|".join(PATHS)
# Without the last, "turning", which is followed by a color.
DYNAMICS_WORDS = "|".join(DYNAMICS[:-1])
SPRITE_PATTERN = re.compile(
    r"an? (?P<size>\w+) (?P<color>\w+) (?P<shape>\w+) (?:stays (?P<still>still)|moves (?P<speed>\w+) to the "
    rf"(?P<direction>{DIRECTION_WORDS}))"
    rf"(?:, (?P<path>{PATH_WORDS}))?(?:, (?P<spin>spinning))?"
    rf"(?:, (?:(?P<dynamics>{DYNAMICS_WORDS})|turning (?P<to_color>\w+)))?"
)
ORBIT_PATTERN = re.compile(rf"(?P<path>{ORBIT}), an? (?P<size>\w+) (?P<color>\w+) (?P<shape>\w+)")
SCENE_PATTERN = re.compile(r"(?:a )?(?P<background>\w+) (?P<pattern>\w+)(?:, the camera pans to the (?P<pan>[\w ]+))?")


def matched_words(match):
    """Return the named groups of a match, name to text, "" for what the text leaves out."""
    return {name: text or "" for name, text in match.groupdict().items()}


def parse_caption(text):
    """Invert `caption`: return a dict with `sprites` (dicts of the words), `background`, `pattern`, `pan`.

    Raise `ValueError` for a text that is no caption.
    """
    body, _, scene_text = text.partition(" over ")
    scene = SCENE_PATTERN.fullmatch(scene_text)
    orbit = ORBIT_PATTERN.fullmatch(body)
    if scene and orbit:
        nothing_else = {"speed": "", "direction": "", "spin": False, "dynamics": "", "to_color": ""}
        return {"sprites": [orbit.groupdict() | nothing_else], **matched_words(scene)}
    matches = [SPRITE_PATTERN.fullmatch(phrase) for phrase in body.split(" and ")]
    if scene is None or None in matches:
        raise ValueError(f"not a sprite caption: {text!r}")
    sprites = []
    for match in matches:
        words = matched_words(match)
        still = words.pop("still")
        if still:
            words["speed"] = still
        words["spin"] = bool(words["spin"])
        if words["to_color"]:
            words["dynamics"] = "turning"
        sprites.append(words)
    return {"sprites": sprites, **matched_words(scene)}


def caption_words(spec):
    """Return what `parse_caption(caption(spec))` must return."""
    sprites = []
    for sprite in spec.sprites:
        words = {
            "size": sprite.size,
            "color": sprite.color,
            "shape": sprite.shape,
            "speed": sprite.speed,
            "direction": sprite.direction,
            "path": sprite.path,
            "spin": sprite.spin,
            "dynamics": sprite.dynamics,
            "to_color": sprite.to_color,
        }
        sprites.append(words)
    return {
        "sprites": sprites,
        "background": spec.background,
        "pattern": spec.pattern,
        "pan": spec.pan,
    }


# ---------------------------------------------------------------------------------------------- ground truth


def trajectory(sprite, frames=FRAMES):
    """Return the center `(F, 2)` in px and the velocity `(F, 2)` in px per frame."""
    if sprite.path == ORBIT:
        return orbit(sprite, frames)
    time = np.arange(frames, dtype=np.float64)
    total = FRAMES - 1
    # Distance along the path in units of the mean step, and its derivative; all paths are equally long.
    if sprite.path == "speeding up":
        progress = 0.2 * time + 0.8 * time**2 / total
        rate = 0.2 + 1.6 * time / total
    elif sprite.path == "slowing down":
        progress = 1.8 * time - 0.8 * time**2 / total
        rate = 1.8 - 1.6 * time / total
    else:
        progress = time
        rate = np.ones_like(time)
    mean_velocity = np.array(sprite.velocity)
    start = np.array(sprite.start)
    position = start + mean_velocity * progress[:, None]  # (F, 2)
    velocity = mean_velocity * rate[:, None]
    if sprite.path == "bouncing":
        low, high = walls(sprite.radius)
        width = high - low
        # There and back again is one period.
        folded = (position - low) % (2 * width)
        back = folded > width
        position = low + np.where(back, 2 * width - folded, folded)
        velocity = np.where(back, -velocity, velocity)
    return position, velocity


def orbit(sprite, frames):
    """Return position and velocity, both `(F, 2)`, of a sprite that goes around the middle at the rate of an orbit."""
    x, y = np.array(sprite.start) - SIZE / 2
    vx, vy = sprite.velocity
    sense = np.sign(x * vy - y * vx)  # 1 is clockwise on the screen, where y points down
    rate = sense * ORBIT_RATE
    angle = np.arctan2(y, x) + rate * np.arange(frames)
    radius = np.hypot(x, y)
    outward = np.stack([np.cos(angle), np.sin(angle)], axis=1)  # (F, 2)
    ahead = np.stack([-np.sin(angle), np.cos(angle)], axis=1)
    return SIZE / 2 + radius * outward, rate * radius * ahead


def modulation(sprite, frames=FRAMES):
    """Return the radius `(F,)` in px, the opacity `(F,)` in 0..1 and the color `(F, 3)` in 0..255."""
    time = np.arange(frames, dtype=np.float64)
    ramp = time / (FRAMES - 1)
    radius = np.full(frames, sprite.radius)
    opacity = np.ones(frames)
    own_color = np.array(COLORS[sprite.color], dtype=np.float64)
    color = np.tile(own_color, (frames, 1))
    wave = 0.0
    if sprite.period:
        angle = 2 * np.pi * time / sprite.period + sprite.phase
        wave = 0.5 + 0.5 * np.cos(angle)
    if sprite.dynamics == "flickering":
        opacity = 1 - 0.65 * wave
    elif sprite.dynamics == "pulsing":
        radius = sprite.radius * (1.25 - 0.5 * wave)
    elif sprite.dynamics == "fading in":
        opacity = 0.1 + 0.9 * ramp
    elif sprite.dynamics == "fading out":
        opacity = 1 - 0.9 * ramp
    elif sprite.dynamics == "turning":
        change = np.array(COLORS[sprite.to_color]) - color
        color = color + change * ramp[:, None]
    return radius, opacity, color


def coverage(shape, position, radius, angle, size=SIZE):
    """Return the share of every pixel inside a shape, `(F, H, W)` in 0..1, with an edge `EDGE` px wide.

    `position` is `(F, 2)`, `radius` and `angle` are `(F,)`. `radius` is that of a circle of the same area, so that
    a size means the same for every shape. Raise `ValueError` for a shape that is not in `SHAPES`.
    """
    axis = np.arange(size, dtype=np.float32) + 0.5
    center = position.astype(np.float32)
    x = axis[None, None, :] - center[:, 0, None, None]  # (F, 1, W)
    y = axis[None, :, None] - center[:, 1, None, None]  # (F, H, 1)
    radius = radius.astype(np.float32)[:, None, None]
    if shape == "circle":
        distance = signed_distance(shape, x, y, radius)
    else:
        cos = np.cos(angle, dtype=np.float32)[:, None, None]
        sin = np.sin(angle, dtype=np.float32)[:, None, None]
        turned_x = cos * x + sin * y  # (F, H, W)
        turned_y = cos * y - sin * x
        distance = signed_distance(shape, turned_x, turned_y, radius)
    return np.clip(0.5 - distance / EDGE, 0, 1)


def signed_distance(shape, x, y, radius):
    """Return the distance in px to the outline, negative inside.

    It is exact near edges, which is all that antialiasing needs. Raise `ValueError` for an unknown shape.
    """
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        half_side = np.float32(np.sqrt(np.pi) / 2) * radius
        return np.maximum(np.abs(x), np.abs(y)) - half_side
    if shape == "triangle":
        inscribed_ratio = np.sqrt(np.pi / (3 * np.sqrt(3)))
        inscribed_radius = np.float32(inscribed_ratio) * radius
        slope = np.float32(np.sqrt(3) / 2)
        side_distance = slope * np.abs(x) - 0.5 * y
        return np.maximum(side_distance, y) - inscribed_radius
    if shape == "cross":
        arm = np.float32(np.sqrt(np.pi / 5)) * radius / 2  # a cross is five squares of side 2 * arm
        x = np.abs(x)
        y = np.abs(y)
        across = np.minimum(x, y) - arm
        along = np.maximum(x, y) - 3 * arm
        return np.maximum(across, along)
    raise ValueError(f"shape must be one of {', '.join(SHAPES)}, not {shape!r}")


def render_background(spec, frames=FRAMES):
    """Draw the background `(F or 1, H, W, 3)`, float32 in 0..255.

    Return it and its shift `(F, 2)` in px since the first frame. Without a pan one frame stands for all.
    """
    step = np.zeros(2)
    if spec.pan:
        # The background moves against the camera.
        step = -PAN_SPEED * unit_vector(spec.pan)
    time = np.arange(frames)
    shift = time[:, None] * step
    if spec.pan:
        moved = shift.astype(np.float32)
    else:
        moved = np.zeros((1, 2), np.float32)
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    x = axis[None, None, :] - moved[:, 0, None, None]  # (F or 1, 1, W)
    y = axis[None, :, None] - moved[:, 1, None, None]  # (F or 1, H, 1)
    level = 0
    for kx, ky, phase in np.array(spec.waves, dtype=np.float32):
        level = level + np.sin(kx * x + ky * y + phase)  # (F or 1, H, W)
    level = 0.5 + 0.5 * level / np.sqrt(len(spec.waves))
    dark, light = np.array(BACKGROUNDS[spec.background], dtype=np.float32)
    background = dark + (light - dark) * level[..., None]
    return np.clip(background, 0, 255), shift


def render_clip(spec, frames=FRAMES):
    """Draw a clip.

    Return `(video, truth)`: uint8 `(F, H, W, 3)`, and a dict of arrays over sprites `S` and frames: `position`
    `(S, F, 2)`, `velocity` `(S, F, 2)`, `radius` `(S, F)`, `angle` `(S, F)`, `opacity` `(S, F)`, `color` `(S, F, 3)`,
    `background_shift` `(F, 2)` and `mask` uint8 `(F, H, W)`: 0 for background, i + 1 where sprite i is on top
    (by its outline, however transparent it is).
    """
    video, shift = render_background(spec, frames)
    if len(video) == 1:
        video = np.repeat(video, frames, axis=0)  # (F, H, W, 3)
    mask = np.zeros(video.shape[:3], dtype=np.uint8)
    time = np.arange(frames)
    rows = []
    for number, sprite in enumerate(spec.sprites, start=1):
        position, velocity = trajectory(sprite, frames)
        radius, opacity, color = modulation(sprite, frames)
        angle = sprite.angle + sprite.angular_speed * time
        alpha = coverage(sprite.shape, position, radius, angle)  # (F, H, W)
        mask[alpha > 0.5] = number
        alpha *= opacity.astype(np.float32)[:, None, None]
        to_sprite = color.astype(np.float32)[:, None, None, :] - video
        video += alpha[..., None] * to_sprite
        row = {
            "position": position,
            "velocity": velocity,
            "radius": radius,
            "angle": angle,
            "opacity": opacity,
            "color": color,
        }
        rows.append(row)
    truth = {}
    for key in rows[0]:
        stacked = np.stack([row[key] for row in rows])
        truth[key] = stacked.astype(np.float32)
    truth["background_shift"] = shift.astype(np.float32)
    truth["mask"] = mask
    return np.round(video).astype(np.uint8), truth


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
        video_name = f"{name}.mp4"
        write_video(video, folder / video_name, FPS, codec=CODEC)
        spec_text = json.dumps(asdict(spec))
        np.savez_compressed(folder / f"{name}.npz", spec=spec_text, **truth)
        row = {"file_name": video_name, "text": caption(spec)}
        lines.append(json.dumps(row))
    # Last, so that a folder with metadata is a complete one.
    metadata = folder / "metadata.jsonl"
    metadata.write_text("\n".join(lines) + "\n")


def parse_args(input_args=None):
    """Parse the command line, or `input_args` instead of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output_dir", help="folder to write the videofolder to")
    parser.add_argument("--mix", choices=MIXES, default="calm", help="how much motion")
    parser.add_argument("--count", type=int, default=256, help="number of clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="train", help="held-out clips share no seed with training")
    return parser.parse_args(input_args)


def main(args):
    """Write the data set that the flags ask for."""
    write_dataset(args.output_dir, args.mix, args.count, args.seed, args.split)


if __name__ == "__main__":
    run_script(main, parse_args)
