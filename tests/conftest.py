"""Fixtures: a tiny pipeline of the real Wan classes, real mp4 clips, and `main()` run in this process or in others."""

import gc
import json
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub is imported: nothing may reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")
if "LTD_TEST_CUDA" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is compared to the bit is compared on a CPU
# As in a shell's background, and under `nohup`: what tests start would ignore them too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import diffusers
import numpy as np
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils.launch import prepare_multi_gpu_env
from corpus import NAMES, ffmpeg_frames, make_videos
from diffusers import AutoencoderKLWan, WanPipeline
from diffusers.utils import export_to_video
from diffusers.video_processor import VideoProcessor
from PIL import Image
from transformers import UMT5EncoderModel

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "benchmark")]

from small_wan import FORMS, PRESETS, build_small_wan

import train_ltd

pytest.register_assert_rewrite("helpers")
gc.freeze()  # main() collects garbage often: what the imports made need not be walked each time

SCRIPT = ROOT / "train_ltd.py"
HEIGHT, WIDTH, NUM_FRAMES = 32, 48, 9
CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # the environment of a process
HOUR = 3600  # ends what hangs; no test counts on less, for a busy machine may be slow
STEPS = {"max_train_steps": 3, "checkpointing_steps": 1, "gradient_accumulation_steps": 2}


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU: LTD_TEST_CUDA=1 python -m pytest -m cuda")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark as slow whatever uses a fixture that starts a browser, a server or processes.

    The files with most of them come first, so that no long one is left for the end when two workers share them.
    """
    weights = Counter()
    for item in items:
        if {"chromium", "forks", "hub", "server"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
        weights[item.path] += 10 if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: (-weights[item.path], item.path))


@pytest.fixture(autouse=True)
def no_processes(request, monkeypatch):
    """A test that is not marked slow starts no process, but for ffmpeg, by which imageio writes videos."""
    if request.node.get_closest_marker("slow"):
        return
    popen = subprocess.Popen.__init__

    def start(self, args, *others, **kwargs):
        program = args if isinstance(args, str | os.PathLike) else args[0]
        assert "ffmpeg" in Path(program).name, f"{program} is a process: mark this test slow"
        popen(self, args, *others, **kwargs)

    def fork(self):
        raise AssertionError("this is a process: mark this test slow")

    monkeypatch.setattr(subprocess.Popen, "__init__", start)
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", fork)


@pytest.fixture(scope="session")
def tiny_wan(tmp_path_factory) -> Path:
    """A complete WanPipeline folder below 0.5 MB, real classes, random weights."""
    path = tmp_path_factory.mktemp("models") / "tiny-wan"
    build_small_wan(path, **PRESETS["tiny"])
    return path


@pytest.fixture(scope="session")
def tiny_experts(tmp_path_factory) -> Path:
    """A pipeline with two experts, in the form of Wan2.2 T2V-A14B."""
    path = tmp_path_factory.mktemp("models") / "tiny-experts"
    build_small_wan(path, **PRESETS["tiny"] | FORMS["a14b"])
    return path


@pytest.fixture(scope="session")
def tiny_5b(tmp_path_factory) -> Path:
    """A pipeline in the form of Wan2.2 TI2V-5B: a VAE of 48 channels and 16 x 16 pixels, a timestep a token."""
    path = tmp_path_factory.mktemp("models") / "tiny-5b"
    build_small_wan(path, **PRESETS["tiny"] | FORMS["5b"])
    return path


@pytest.fixture(scope="session")
def tiny_i2v(tmp_path_factory) -> Path:
    """A pipeline in the form of Wan2.1 I2V-14B: 36 channels, and CLIP."""
    path = tmp_path_factory.mktemp("models") / "tiny-i2v"
    build_small_wan(path, **PRESETS["tiny"] | FORMS["i2v-14b"])
    return path


@pytest.fixture(scope="session")
def tiny_i2v_experts(tmp_path_factory) -> Path:
    """A pipeline in the form of Wan2.2 I2V-A14B: 36 channels, and two experts."""
    path = tmp_path_factory.mktemp("models") / "tiny-i2v-experts"
    build_small_wan(path, **PRESETS["tiny"] | FORMS["i2v-a14b"])
    return path


def write_clip(
    path: Path, number: int = 0, frames: int = 24, height: int = 48, width: int = 64, fps: int = 16
) -> None:
    """A bright square that moves over a coloured ground, at a speed and colour by `number`."""
    video = np.zeros((frames, height, width, 3), np.float32)
    video[..., number % 3] = 0.4
    for frame in range(frames):
        left = (4 + frame * (1 + number % 2)) % (width - 16)
        video[frame, 10:26, left : left + 16] = 0.9
    export_to_video(list(video), str(path), fps=fps)


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """Seven captioned clips in the `videofolder` layout."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for number in range(7):
        write_clip(folder / f"{number}.mp4", number)
        rows.append(json.dumps({"file_name": f"{number}.mp4", "text": f"a square moves, number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """`main()` runs more than once in this process."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    PartialState._reset_state()


@pytest.fixture(autouse=True)
def settings_of_the_process():
    """Afterwards as before: the bits of the next run depend on them, and whatever it starts inherits its variables."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    with diffusers.attention_backend("native"):  # `set_attention_backend` sets one for the whole process
        yield
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    for name in os.environ.keys() - variables.keys() - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]
    os.environ.update(variables)


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)


def write_line(**values) -> list[str]:
    """A command line from flags without dashes; of a list each value, of `None` nothing."""
    line = []
    for key, value in values.items():
        if isinstance(value, bool):
            line.append(f"--{key}" if value else f"--no-{key}")
        elif value is not None:
            line += [f"--{key}={v}" for v in (value if isinstance(value, list | tuple) else [value])]
    return line


def tiny_run(model: Path, clips: Path, folder: Path) -> dict:
    """The flags of a run that takes a second, into `folder/run`."""
    return {
        "pretrained_model_name_or_path": model,
        "train_data_dir": clips,
        "output_dir": folder / "run",
        "cache_dir": folder / "cache",
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": NUM_FRAMES,
        "fps": 16,
        "rank": 4,
        "learning_rate": 1e-2,
        "max_train_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "seed": 3,
    }


@pytest.fixture
def flags(tiny_wan, clips, tmp_path):
    """Function that returns a command line for a tiny run into `tmp_path/run`; keyword arguments override or add."""
    return lambda **kwargs: write_line(**tiny_run(tiny_wan, clips, tmp_path) | kwargs)


def train_here(line: list[str], **kwargs) -> Path:
    """Train in this process, and return the output folder."""
    args = train_ltd.parse_args(line)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    train_ltd.main(args, **kwargs)
    return Path(args.output_dir)


def prepare_here(line: list[str]) -> tuple:
    """Cache clips and captions in this process, and return them: `(clips, held-out clips, caption files, args)`."""
    args = train_ltd.parse_args(line)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return *train_ltd.prepare_data(args, train_ltd.build_accelerator(args)), args


@pytest.fixture(scope="session")
def filled_cache(tiny_wan, clips, tmp_path_factory) -> Path:
    """What a run with `flags()` caches, made once for all tests."""
    folder = tmp_path_factory.mktemp("cached")
    prepare_here(write_line(**tiny_run(tiny_wan, clips, folder)))
    return folder / "cache"


@pytest.fixture
def warm_cache(filled_cache, tmp_path):
    """So that clips and captions of `flags()` need not be encoded once more in each test."""
    shutil.copytree(filled_cache, tmp_path / "cache")


@pytest.fixture
def run(flags, warm_cache):
    """Function that trains in this process with `flags(**kwargs)` and returns the output folder.

    A test that is about the cache gives a `cache_dir` of its own.
    """

    def train(compute_loss=None, **kwargs) -> Path:
        return train_here(flags(**kwargs), **({"compute_loss": compute_loss} if compute_loss else {}))

    return train


# --- Processes -------------------------------------------------------------------------------------------------------


def launcher(processes: int) -> list[str]:
    """`accelerate launch train_ltd.py`; with `ACCELERATE_USE_CPU`, for `--cpu` would silently run one process only."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher_options(processes)]
    return [*command, str(SCRIPT)]


def launcher_options(processes: int) -> list[str]:
    options = [f"--num_processes={processes}", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    return [*options, "--main_process_port=0", *["--multi_gpu"] * (processes > 1)]


def launch_for_real(command_line: list[str], processes: int = 1):
    """The script by `accelerate launch`: 10 s for what each process imports."""
    command, env = [*launcher(processes), *command_line], os.environ | CPU
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=HOUR, cwd=ROOT)


def launch(
    command_line: list[str],
    processes: int = 1,
    env: dict | None = None,
    script: Path = SCRIPT,
    options: list[str] | None = None,
    folder: Path = ROOT,
    context=None,
) -> subprocess.CompletedProcess:
    """A script in the variables of `accelerate launch`, by processes that have the imports behind them."""
    variables = CPU | (env or {})
    if processes > 1:
        args = launch_command_parser().parse_args([*(options or launcher_options(processes)), str(script)])
        args, _, _ = _validate_launch_command(args)
        variables = prepare_multi_gpu_env(args) | variables
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks, context, files = [], context or fork_context(), Path(tempfile.mkdtemp())
    for rank in range(processes):
        if processes > 1:
            variables = variables | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            variables |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        said = files / str(rank)
        process = context.Process(target=run_script, args=(command_line, variables, said, folder, script))
        process.start()
        ranks.append(process)
    while running := [process for process in ranks if process.is_alive()]:
        multiprocessing.connection.wait([process.sentinel for process in running])
        if any(process.exitcode for process in ranks):  # then the others go, too
            for process in running:
                process.kill()
    said = {name: "".join(path.read_text() for path in sorted(files.glob(f"*.{name}"))) for name in ("out", "err")}
    shutil.rmtree(files)
    code = next((process.exitcode for process in ranks if process.exitcode), 0)
    return subprocess.CompletedProcess(command_line, code, said["out"], said["err"])


def run_script(
    command_line: list[str], variables: dict, said: Path, folder: Path = ROOT, script: Path = SCRIPT
) -> None:
    """In a process that `forks` starts: `python SCRIPT COMMAND_LINE` in that folder; its words go to `said.err`.

    One that would train for hours is made a daemon, which ends with pytest.
    """
    os.environ |= variables
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{said}.{name}", os.O_WRONLY | os.O_CREAT), number)
    os.chdir(folder)
    sys.argv = [str(script), *command_line]
    runpy.run_path(str(script), run_name="__main__")


def start_fork_server(server, variables: dict | None = None) -> None:
    """Start a process that imports what tests need, in these variables, and then only forks."""
    server.set_forkserver_preload(["conftest", "train_ltd"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server knows no other path
        for name, value in (variables or {}).items():
            patch.setenv(name, value)
        server.ensure_running()


def fork_context():
    """Of processes that need not import everything again, from a server that has not trained: torch forbids that."""
    start_fork_server(multiprocessing.forkserver)
    return multiprocessing.get_context("forkserver")


@pytest.fixture(scope="module")
def forks():
    return fork_context()


@pytest.fixture(scope="module")
def hub_forks(hub):
    """As `forks`, from a server of its own: libraries read where the Hub is when they are imported."""
    server = multiprocessing.forkserver.ForkServer()
    start_fork_server(server, hub.env() | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing.forkserver, "connect_to_new_process", server.connect_to_new_process)
        yield multiprocessing.get_context("forkserver")


@pytest.fixture
def prepare(flags):
    """Function that caches everything: `(clips, held-out clips, caption files, args)`."""

    return lambda **kwargs: prepare_here(flags(**kwargs))


@pytest.fixture(scope="module")
def loaded_pipeline(tiny_wan):
    return WanPipeline.from_pretrained(tiny_wan, transformer=None, vae=None)


@pytest.fixture
def one_text_encoder(monkeypatch, loaded_pipeline):
    """For tests that prepare often and are not about the text encoder: it is loaded once and kept."""
    monkeypatch.setattr(WanPipeline, "from_pretrained", lambda *args, **kwargs: loaded_pipeline)


@pytest.fixture
def log(caplog):
    """Function that returns the messages logged so far, at a level or all."""
    caplog.set_level(logging.INFO)
    rank = re.compile(r"^\[RANK \d+\] ")
    return lambda level=None: [rank.sub("", r.getMessage()) for r in caplog.records if level in (None, r.levelname)]


class Clock:
    """A clock that goes on only when it is told to."""

    seconds = 1e6

    def __call__(self) -> float:
        return self.seconds

    def pass_time(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The clock of the run and of its bars."""
    clock = Clock()
    monkeypatch.setattr("tqdm.std.time", clock)  # which a bar takes when it is made
    for name in ("perf_counter", "monotonic"):
        monkeypatch.setattr(train_ltd.time, name, clock)
    return clock


@pytest.fixture
def sampled_frames(monkeypatch):
    """The frames of each sample, before they are compressed; the files are made all the same."""
    frames = {}
    write = train_ltd.export_to_video

    def keep(video, path, fps):
        frames[Path(path).name] = torch.tensor(video)
        return write(video, path, fps)

    monkeypatch.setattr(train_ltd, "export_to_video", keep)
    return frames


@pytest.fixture
def no_models(monkeypatch):
    """Function after which loading the VAE (and, by default, the text encoder) is an error."""

    def forbid(vae=True, text=True):
        def refuse(*args, **kwargs):
            raise AssertionError("a model was loaded")

        for model in [AutoencoderKLWan] * vae + [UMT5EncoderModel] * text:
            monkeypatch.setattr(model, "from_pretrained", refuse)

    return forbid


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> Path:
    """Four different clips, without captions."""
    folder = tmp_path_factory.mktemp("originals")
    make_videos(folder)
    return folder


@torch.no_grad()
def reference_latents(vae, frames: torch.Tensor) -> torch.Tensor:
    """Normalized mode of the posterior of `(F, 3, H, W)` uint8 frames, by diffusers' own video processor."""
    pictures = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    mode = vae.encode(VideoProcessor(vae_scale_factor=8).preprocess_video(pictures)).latent_dist.mode()
    mean, std = (torch.tensor(c).view(1, -1, 1, 1, 1) for c in (vae.config.latents_mean, vae.config.latents_std))
    return ((mode - mean) / std)[0]


@pytest.fixture(scope="module")
def expected_latents(tiny_wan, originals) -> list[torch.Tensor]:
    """What each clip must be in the cache, encoded here from frames decoded here."""
    vae = AutoencoderKLWan.from_pretrained(tiny_wan, subfolder="vae")
    return [reference_latents(vae, ffmpeg_frames(originals / name, HEIGHT, WIDTH)[:NUM_FRAMES]) for name in NAMES]


@pytest.fixture(scope="session")
def straight_run(tiny_wan, clips, filled_cache, tmp_path_factory) -> Path:
    values = tiny_run(tiny_wan, clips, tmp_path_factory.mktemp("straight")) | {"cache_dir": filled_cache}
    return train_here(write_line(**values | STEPS))


@pytest.fixture
def straight(straight_run, tmp_path) -> Path:
    """The output folder of a run that nothing happened to, to be done with as a test pleases."""
    return shutil.copytree(straight_run, tmp_path / "straight")


def wait_for(happened, process: subprocess.Popen | multiprocessing.process.BaseProcess) -> None:
    """Return once `happened()` is true; fail if the process ends before."""
    running = process.is_alive if hasattr(process, "is_alive") else lambda: process.poll() is None
    for _ in range(100 * HOUR):
        ended = not running()
        if happened():
            return
        assert not ended, "the process has ended too early"
        time.sleep(0.01)
    raise TimeoutError
