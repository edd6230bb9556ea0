"""examples/benchmark: benchmark.py and cost.py: what they count, not how fast it is."""

import gc
import inspect
import itertools
import json
import math

import benchmark
import cost
import numpy as np
import pytest
import small_wan
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.training_utils import free_memory
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import train_ltd

LATENTS = (2, 16, 3, 4, 6)  # of 9 frames of 48x32, batch 2


def settings_for(flags, tmp_path, **kwargs):
    return train_ltd.parse_args(flags(output_dir=tmp_path, **kwargs))


def random_batch(text_dim):
    latents, noise = torch.randn(2, *LATENTS).unbind()
    sigmas, prompt_embeds = torch.rand(LATENTS[0]), torch.randn(LATENTS[0], 512, text_dim)
    return {"latents": latents, "noise": noise, "sigmas": sigmas, "prompt_embeds": prompt_embeds}


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full", "offload"])
@pytest.mark.parametrize("train_type", ["full", "lora"])
def test_flop_formula_is_what_torch_counts(flags, tmp_path, train_type, checkpointing):
    settings = settings_for(flags, tmp_path, train_type=train_type, gradient_checkpointing=checkpointing)
    wan = train_ltd.identify_wan(settings)
    model = train_ltd.load_transformer(settings, wan)
    if train_type == "lora":
        train_ltd.add_lora(model, settings)
    # The CPU's fused attention is not counted; without it, attention is matrix products, and those are. Selective
    # checkpointing knows attention by its kernel, so there it stays fused, once forward and twice its cost backward,
    # and that to the caption once more, which is computed again.
    fused = checkpointing == "selective"
    kernel = SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH
    with sdpa_kernel(kernel), FlopCounterMode(display=False) as forward:
        batch = random_batch(model.config.text_dim)
        loss = train_ltd.predict_flow(wan, model, batch["latents"], batch).square().mean()
    with sdpa_kernel(kernel), FlopCounterMode(display=False) as backward:
        loss.backward()
    flops = benchmark.training_flops(settings, LATENTS)
    tokens = math.prod(LATENTS[2:]) // 4
    cross_attention = flops["attention"] * 512 / (tokens + 512)
    counted = forward.get_total_flops() + backward.get_total_flops()
    counted += fused * (3 * flops["attention"] + cross_attention)
    assert forward.get_total_flops() + fused * flops["attention"] == flops["forward"]
    if train_type == "full":
        assert counted == flops["hardware"]
    # With a LoRA, nothing asks for the gradient of the first block's input.
    assert 0.99 * flops["hardware"] < counted <= flops["hardware"]
    assert (flops["hardware"] > flops["useful"]) == (checkpointing != "none")


@pytest.mark.parametrize(
    ("model", "latents", "parameters", "forward", "attention", "full", "lora"),
    [  # counts of parameters as published with the weights; teraFLOPs worked out by hand, without adapters
        ("1.3b", (16, 21, 60, 104), 1_418_996_800, 283, 0.71, 849, 767),
        ("1.3b", (16, 9, 60, 104), 1_418_996_800, 73, 0.52, 219, 183),
        ("14b", (16, 21, 60, 104), 14_288_491_584, 1678, 0.53, 5035, 4249),
        ("14b", (16, 21, 90, 160), 14_288_491_584, 6523, 0.72, 19570, 17760),
        ("a14b", (16, 21, 60, 104), 14_288_491_584, 1678, 0.53, 5035, 4249),
        ("5b", (48, 31, 44, 80), 4_999_787_712, 517, 0.54, 1550, 1312),
        ("5b", (48, 13, 44, 80), 4_999_787_712, 150, 0.33, 450, 350),
    ],
)
def test_shapes_are_those_of_wan(flags, tmp_path, model, latents, parameters, forward, attention, full, lora):
    named = inspect.signature(WanTransformer3DModel.__init__).parameters
    shape = {name: value for name, value in benchmark.SHAPES[model].items() if name in named and name != "patch_size"}
    with torch.device("meta"):
        transformer = WanTransformer3DModel(in_channels=latents[0], out_channels=latents[0], **shape)
    assert transformer.num_parameters() == parameters
    transformer.save_config(tmp_path / "wan/transformer")
    for train_type, useful in (("full", full), ("lora", lora)):
        path = tmp_path / "wan"
        settings = settings_for(flags, tmp_path, pretrained_model_name_or_path=path, train_type=train_type, rank=1)
        flops = benchmark.training_flops(settings, (1, *latents))
        assert flops["forward"] / 1e12 == pytest.approx(forward, rel=0.005)
        assert flops["attention"] / flops["forward"] == pytest.approx(attention, abs=0.01)
        assert flops["useful"] / 1e12 == pytest.approx(useful, rel=0.005)


def test_flops_of_image_to_video(flags, tmp_path, tiny_i2v):
    """With CLIP's tokens: as torch counts them; of the true shape 1,686 teraFLOPs forward for 81 frames at 480p."""
    settings = settings_for(flags, tmp_path, pretrained_model_name_or_path=tiny_i2v)
    model = train_ltd.load_transformer(settings, train_ltd.identify_wan(settings))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(
            torch.randn(2, 36, *LATENTS[2:]),
            torch.rand(2),
            torch.randn(2, 512, model.config.text_dim),
            encoder_hidden_states_image=torch.randn(2, 257, model.config.image_dim),
        )
    settings.train_type = "full"
    assert counter.get_total_flops() == benchmark.training_flops(settings, LATENTS)["forward"]
    shape = benchmark.SHAPES["i2v-14b"]
    width = shape["num_attention_heads"] * shape["attention_head_dim"]
    config = model.config | {
        "num_layers": shape["num_layers"],
        "ffn_dim": shape["ffn_dim"],
        "added_kv_proj_dim": width,
        "image_dim": shape["clip_dim"],
    }
    for name in ("num_attention_heads", "attention_head_dim", "text_dim", "freq_dim", "rope_max_seq_len"):
        config[name] = shape.get(name, config[name])
    with torch.device("meta"):
        WanTransformer3DModel.from_config(config).save_config(tmp_path / "wan/transformer")
    settings.pretrained_model_name_or_path = str(tmp_path / "wan")
    flops = benchmark.training_flops(settings, (1, 16, 21, 60, 104))
    assert flops["forward"] / 1e12 == pytest.approx(1686, rel=0.002)


@pytest.fixture
def ticking(monkeypatch):
    """Each look at the clocks is a second later on the wall, and half a second of the CPUs."""
    times = itertools.count()
    monkeypatch.setattr(benchmark, "now", lambda: next(times) * np.array([1.0, 0.5]))


def test_stopwatch_counts_nested_calls_once(ticking):
    watch = benchmark.Stopwatch()
    watch.begin_lap()
    with watch.measure("benchmark"):
        pass
    with watch.measure("loss"), watch.measure("forward"):
        pass
    assert watch.timed(abs, "backward")(-1) == 1
    with watch.measure("optimizer"):
        pass
    # From its start to its end a lap is 11 seconds, of which the benchmark's own one is not.
    contender = benchmark.Contender(laps=[watch.lap()], first_loss=1.0)
    summary = benchmark.summarize(contender)
    assert summary["seconds_per_step"] == 10 and summary["cpu"]["seconds_per_step"] == 5
    assert (summary["forward"], summary["loss"], summary["backward"], summary["optimizer"]) == (1, 2, 1, 1)
    assert summary["cpu"]["loss"] == 1
    assert (summary["wall_seconds"], summary["cpu_seconds"]) == ([10], [5])
    assert summary["rest of loop"] == 5
    assert summary["overhead"] == pytest.approx(7 / 10)


def test_ratios_are_of_one_round_each():
    """A machine that is ten times as slow in some rounds does not move them."""
    slowness = [1, 10, 1, 10, 10, 1, 1, 1]
    own = [2.0, 2.2, 2.0, 2.0, 2.4, 2.0, 2.0, 2.0]
    laps = [{"step": np.array([s * x, x])} for s, x in zip(slowness, own, strict=True)]
    bare = [{"step": np.array([s * 2.0, 2.0])} for s in slowness]
    contenders = [benchmark.Contender(laps=rows) for rows in (laps, bare)]
    ratio = benchmark.paired_ratio(*contenders, benchmark.WALL)
    assert ratio["median"] == 1 and ratio["quartiles"] == pytest.approx([1, 1.025])
    # Of 8 sorted ratios the median lies between the second and the last but one in 93 of 100 cases, more beyond.
    assert ratio["interval"] == pytest.approx([1, 1.2])
    assert ratio["of_totals"] == pytest.approx((10 * 6.6 + 10) / (30 * 2 + 10))
    assert benchmark.paired_ratio(*contenders, benchmark.CPU)["of_totals"] == pytest.approx(16.6 / 16)


def test_interval_of_a_median_holds_it_as_often_as_it_says():
    generator = np.random.default_rng(0)
    bare = benchmark.Contender(laps=[{"step": np.ones(2)}] * 40)
    held = 0
    for _ in range(1000):
        own = benchmark.Contender(laps=[{"step": np.full(2, x)} for x in generator.exponential(size=40)])
        low, high = benchmark.paired_ratio(own, bare, benchmark.WALL)["interval"]
        held += low <= math.log(2) <= high
    assert 930 <= held <= 985


def test_peak_on_a_gpu_is_without_what_others_keep(monkeypatch, flags, tmp_path):
    """The script keeps 3 GiB and the other 5; in their steps they take 2 and 4 more. Caching took 50."""
    allocated = {"now": 0, "peak": 0}
    monkeypatch.setattr(benchmark, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(benchmark, "now", lambda: np.zeros(2))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: allocated["now"] * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: allocated["peak"] * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: allocated.update(peak=allocated["now"]))
    settings = settings_for(flags, tmp_path)
    comparison = benchmark.Comparison(settings, {"other": None}, warmup=1, steps=1)
    kept = {benchmark.SCRIPT: 3, "other": 5}
    for number, name in [
        (0, benchmark.SCRIPT),
        (1, "other"),
        (1, benchmark.SCRIPT),
        (2, benchmark.SCRIPT),
        (2, "other"),
    ]:
        comparison.begin_step(number, name)
        if number == 0 or (number, name) == (1, "other"):  # it is built
            allocated["now"] += kept[name]
        allocated["peak"] = allocated["now"] + (50 if number == 0 else kept[name] - 1)
        comparison.end_step()
    assert {name: contender.peak for name, contender in comparison.contenders.items()} == {
        "train_ltd.py": 5,
        "other": 9,
    }


def test_turns_are_drawn_anew_in_each_round():
    names = [benchmark.SCRIPT, "a", "b"]
    turns = benchmark.draw_turns(names, 50, seed=1)
    assert turns[0] == (0, benchmark.SCRIPT)
    rounds = [tuple(name for number, name in turns if number == wanted) for wanted in range(1, 50)]
    assert all(sorted(order) == sorted(names) for order in rounds)
    assert len(set(rounds)) == 6
    assert turns == benchmark.draw_turns(names, 50, seed=1) != benchmark.draw_turns(names, 50, seed=2)


def test_peak_of_a_data_sheet(monkeypatch):
    assert benchmark.data_sheet_peak() is None
    monkeypatch.setattr(benchmark, "DEVICE", torch.device("cuda"))
    names = {"NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA GeForce GTX 970": None}
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert benchmark.data_sheet_peak() == (peak and peak * 1e12)


ADAPTER = """
import benchmark

class Trainer(benchmark.BareLoop):
    def step(self, batch):
        assert batch["latents"].device.type == "cpu" and batch["prompt_embeds"].shape[1] == 512
        return super().step(batch)
"""
# One that has nothing of diffusers, and fails in its third step
FOREIGN = """
import torch

class Trainer:
    def __init__(self, settings):
        self.model = torch.nn.Linear(6, 6)
        self.optimizer = torch.optim.SGD(self.model.parameters())
        self.steps = 0

    def step(self, batch):
        self.steps += 1
        if self.steps == FAIL_IN:
            raise RuntimeError("no more")
        loss = self.model(batch["latents"]).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()
"""


@pytest.fixture
def bench(tiny_wan, tmp_path):
    """Function that runs the benchmark on the tiny pipeline and returns its JSON."""

    def run(*command):
        line = [
            "--steps=3",
            "--warmup_steps=1",
            f"--work_dir={tmp_path}",
            "--num_frames=9",
            "--height=32",
            "--width=48",
        ]
        line += [f"--pretrained_model_name_or_path={tiny_wan}", "--rank=4", "--seed=3", *map(str, command)]
        args = benchmark.parse_args(line)
        benchmark.main(args)
        return json.loads(args.output_file.read_text())

    return run


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_script_bare_loop_and_adapter_train_the_same(bench, tmp_path, capsys, train_type):
    adapter = tmp_path / "other.py"
    adapter.write_text(ADAPTER)
    flags = ["--loss=mse", "--learning_rate=1e-2", f"--train_type={train_type}", "--train_batch_size=2"]
    step = bench("--parts", "step", "bare", "--adapter", adapter, *flags)["step"]
    script, bare, other = step["results"].values()
    assert list(step["results"]) == ["train_ltd.py", "bare loop", "other"]
    # The first round is the script's alone.
    assert [len(result["losses"]) for result in (script, bare, other)] == [5, 4, 4]
    assert script["losses"][:4] == pytest.approx(bare["losses"], rel=1e-5)
    assert bare["losses"] == other["losses"]
    assert len(set(script["losses"])) == 5
    assert script["first_loss"] == pytest.approx(script["losses"][0])
    assert step["latents"] == [2, 16, 3, 4, 6] and step["data_sheet_flops_per_second"] is None
    for result in (script, bare, other):
        assert all(result[label] > 0 and result["cpu"][label] > 0 for label in benchmark.WORK)
        assert result["seconds_per_step"] * result["clips_per_second"] == pytest.approx(2)
        assert result["hfu"] / result["mfu"] == pytest.approx(step["flops"]["hardware"] / step["flops"]["useful"])
        assert result["first_loss"] == pytest.approx(bare["losses"][0], rel=1e-5)
        assert result["trained_parameters"] == bare["trained_parameters"] > 0
    assert script["data wait"] > 0 and script["peak_memory_gib"] > 0
    for result in (script, other):
        for ratio in result["ratio_to_bare_loop"].values():
            assert 0 < ratio["quartiles"][0] <= ratio["median"] <= ratio["quartiles"][1]
    assert "ratio_to_bare_loop" not in bare
    printed = capsys.readouterr().out
    assert "train_ltd.py / bare loop, cpu: median of 3 rounds" in printed
    assert f"{bare['trained_parameters']:,}" in printed


@pytest.mark.slow
def test_an_adapter_that_fails_is_named_and_the_others_go_on(bench, tmp_path, capsys):
    programs = {
        "late": FOREIGN.replace("FAIL_IN", "3"),
        "never": "import no_such_trainer",
        "foreign": FOREIGN.replace("FAIL_IN", "0"),
    }
    adapters = []
    for name, program in programs.items():
        adapters.append(tmp_path / f"{name}.py")
        adapters[-1].write_text(program)
    flags = [flag for path in adapters for flag in ("--adapter", path)]
    results = bench("--parts", "step", "bare", "operators", *flags)
    for part in (results["step"]["results"], results["operators"]):
        assert part["never"] == {"error": "ModuleNotFoundError: No module named 'no_such_trainer'"}
    step = results["step"]["results"]
    assert step["late"] == {"error": "RuntimeError: no more"}
    assert len(step["foreign"]["losses"]) == len(step["bare loop"]["losses"]) == 4
    assert step["foreign"]["ratio_to_bare_loop"]["cpu"]["median"] < 1
    assert step["foreign"]["forward"] > 0 and step["foreign"]["trained_parameters"] == 42
    printed = capsys.readouterr().out
    assert "late is out of the comparison, in round 3: RuntimeError: no more" in printed
    assert "never failed: ModuleNotFoundError" in printed
    assert_operators(results["operators"])


def assert_operators(operators):
    """The script and the bare loop call the same model as often."""
    script, bare = operators["train_ltd.py"], operators["bare loop"]
    for result in (script, bare):
        assert result["products"]["calls"] == script["products"]["calls"] > 0
        for group in ("model", "backward"):  # but for the division by the micro-batches of an update, and the like
            assert result[group]["calls"] == pytest.approx(script[group]["calls"], rel=0.01)
        assert result["model"]["calls"] + result["backward"]["calls"] < result["all"]["calls"]
        functions = result["functions_without_products"]
        seconds = [row["seconds"] for row in functions.values()]
        assert seconds == sorted(seconds, reverse=True)
        assert "backward pass" in functions
        assert any(name.startswith("diffusers: WanTransformerBlock") for name in functions)
    assert bare["all"]["calls"] < script["all"]["calls"]
    assert operators["foreign"]["model"]["calls"] == 0 < operators["foreign"]["products"]["calls"]


@pytest.mark.slow
def test_operators_are_counted_where_they_are_called():
    with benchmark.OperatorCounter() as counter:
        x = torch.ones(3, 3, requires_grad=True)
        (x @ x).sum().backward()
    calls = {}
    for (function, operator), row in counter.rows.items():
        calls[function, operator] = int(row[0])
    here = "test_benchmark: test_operators_are_counted_where_they_are_called"
    assert calls[here, "aten.mm.default"] == 1 and calls[benchmark.BACKWARD, "aten.mm.default"] == 2
    assert counter.total()["calls"] == sum(calls.values())


def test_no_model_is_left_of_a_comparison(flags, tmp_path):
    settings = settings_for(flags, tmp_path, max_train_steps=4)
    free_memory()
    before = sum(type(thing) is WanTransformer3DModel for thing in gc.get_objects())
    comparison = benchmark.Comparison(settings, {"bare loop": benchmark.BareLoop}, warmup=1, steps=2)
    contenders = comparison.run()
    free_memory()
    assert len(comparison.batches) == 4
    assert [len(contender.laps) for contender in contenders.values()] == [2, 2]
    assert sum(type(thing) is WanTransformer3DModel for thing in gc.get_objects()) <= before


@pytest.mark.slow
def test_the_loss_has_a_clock_of_its_own_and_settings_hold_no_path(bench, tmp_path):
    results = bench("--parts", "step", "--loss=ltd")
    assert results["step"]["results"]["train_ltd.py"]["loss"] > 0
    assert results["settings"]["loss"] == "ltd" and results["environment"]["threads"] == 1
    assert str(tmp_path) not in json.dumps(results["settings"])
    assert set(cost.SETTINGS) - {"model"} <= set(results["settings"])


def test_peak_bytes_is_what_a_call_holds_at_once():
    def two_after_another():
        for _ in range(2):
            torch.empty(2**20, dtype=torch.uint8)
        first = torch.empty(2**21, dtype=torch.uint8)
        return first + 1

    assert 2 * 2**21 <= benchmark.peak_bytes(two_after_another) < 2 * 2**21 + 100  # and a scalar


@pytest.mark.slow
def test_cost_of_ltd(bench, monkeypatch):
    monkeypatch.setattr(benchmark, "LTD_SHAPES", [(1, 16, 5, 8, 8)])
    ltd = bench("--parts", "step", "ltd")["ltd"]
    shapes = [[1, 16, 3, 4, 6]] * 4 + [[1, 16, 5, 8, 8]] * 4
    kinds = list(itertools.product(("mse_loss", "ltd_loss"), (False, True)))
    assert [row["shape"] for row in ltd["rows"]] == shapes
    assert [(row["loss"], row["compiled"]) for row in ltd["rows"]] == kinds * 2
    for row in ltd["rows"]:
        assert row["floor"] * ltd["copy_bytes_per_second"] == pytest.approx(12 * torch.Size(row["shape"]).numel())
        assert row["with_gradient"] > 0 and row["forward"] > 0
        assert row["peak_bytes"] >= 4 * torch.Size(row["shape"]).numel()  # the gradient at least
        assert ("share_of_step" in row) == (row["shape"] == [1, 16, 3, 4, 6])


@pytest.mark.slow
def test_caching_and_start(bench):
    results = bench("--parts", "cache", "start")
    cache, start = results["cache"], results["start"]
    assert list(cache["seconds_per_clip"]) == ["decode", "VAE float32", "VAE bfloat16", "text"]
    assert 0 < cache["bfloat16_relative_rms"] < 0.1
    assert cache["script"]["clips"] == benchmark.NUM_CLIPS
    assert 0 < start["warm"] and 0 < start["cold"]


@pytest.mark.slow
def test_profile_shares_sum_to_one(bench):
    profile = bench("--parts", "profile", "--steps=1")["profile"]
    assert sum(profile["kinds"].values()) == pytest.approx(1)
    assert profile["kinds"]["attention"] > 0 and profile["kinds"]["matrix products"] > 0
    assert list(profile["longest"].values()) == sorted(profile["longest"].values(), reverse=True)
    assert profile["seconds"] > 0


@pytest.mark.slow
def test_sweep_ends_with_the_best_of_what_ran(bench, capsys):
    rows = bench("--sweep", "gradient_checkpointing=none,full", "train_batch_size=1,100")["sweep"]
    assert [bool(row["clips_per_second"]) for row in rows] == [True, True, False, False]
    assert rows[0]["clips_per_second"] >= rows[1]["clips_per_second"]
    assert {tuple(row["recipe"]) for row in rows} == {
        (f"gradient_checkpointing: {a}", f"train_batch_size: {b}") for a in ("none", "full") for b in (1, 100)
    }
    assert "--train_batch_size 100" in rows[2]["error"]
    assert capsys.readouterr().out.splitlines()[-3:] == ["best recipe:", *rows[0]["recipe"]]


def test_nano_pipeline_has_its_shape_and_is_built_once(tmp_path):
    args = benchmark.parse_args([f"--work_dir={tmp_path}"])
    folder = benchmark.build_pipeline(args)
    config = WanTransformer3DModel.load_config(folder / "transformer")
    assert (config["num_layers"], config["num_attention_heads"] * config["attention_head_dim"]) == (6, 192)
    settings = benchmark.train_ltd.parse_args(benchmark.script_flags(args))
    assert (settings.num_frames, settings.height, settings.width) == benchmark.SIZES["nano"]
    changed = (folder / "model_index.json").stat().st_mtime_ns
    assert benchmark.build_pipeline(args) == folder
    assert (folder / "model_index.json").stat().st_mtime_ns == changed


def test_experts_are_one_transformer_on_disk_and_two_in_the_stock_pipeline(tmp_path, monkeypatch):
    monkeypatch.setitem(benchmark.SHAPES, "14b", small_wan.PRESETS["tiny"])
    args = benchmark.parse_args([f"--work_dir={tmp_path}", "--model=a14b"])
    folder = benchmark.build_pipeline(args)
    assert (folder / "transformer").samefile(folder / "transformer_2") and args.model == "a14b"
    pipeline = WanPipeline.from_pretrained(folder)
    assert pipeline.config.boundary_ratio == 0.875 and pipeline.transformer is not pipeline.transformer_2
    used = []
    for model in (pipeline.transformer, pipeline.transformer_2):
        assert model.config.num_layers == 2
        model.register_forward_pre_hook(lambda model, args: used.append(model))
    video = pipeline("a cat", height=32, width=48, num_frames=5, num_inference_steps=5).frames[0]
    assert video.shape == (5, 32, 48, 3)
    assert {id(model) for model in used} == {id(pipeline.transformer), id(pipeline.transformer_2)}
    assert benchmark.build_pipeline(args) == folder


def test_true_shape_of_the_5b_is_the_published_one(tmp_path, monkeypatch):
    """What is built for it, with the sizes alone cut down."""
    shape = benchmark.SHAPES["5b"]
    assert (shape["base_dim"], shape["decoder_base_dim"], shape["dim_mult"]) == (160, 256, (1, 2, 4, 4))
    small = small_wan.PRESETS["tiny"] | {"base_dim": 4, "decoder_base_dim": 8, "num_layers": 3}
    monkeypatch.setitem(benchmark.SHAPES, "5b", shape | small)
    folder = benchmark.build_pipeline(benchmark.parse_args([f"--work_dir={tmp_path}", "--model=5b"]))
    pipeline = WanPipeline.from_pretrained(folder)
    assert pipeline.config.expand_timesteps and pipeline.vae_scale_factor_spatial == 16
    assert pipeline.transformer.config.in_channels == pipeline.vae.config.z_dim == 48
    assert pipeline.transformer.config.num_layers == 3
    weights = load_file(folder / "transformer/diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    frames, height, width = benchmark.SIZES["5b"]
    assert (frames - 1) % 4 == height % 32 == width % 32 == 0


def test_clips_that_a_vae_is_fitted_to_are_read_whole(clips):
    videos = small_wan.read_videos(clips)
    assert [video.shape for video in videos] == [(3, 21, small_wan.HEIGHT, small_wan.WIDTH)] * 7  # of 24 frames
    assert all(-1 <= video.min() < video.max() <= 1 for video in videos)


def test_misuse_is_refused(capsys, tmp_path):
    commands = (
        (["--steps=0"], "must be positive"),
        (["--parts", "bare"], "add step"),
        ([f"--work_dir={__file__}"], f"--work_dir {__file__} must be a folder"),
        ([f"--output_file={tmp_path}"], f"--output_file {tmp_path} a file"),
    )
    for command, message in commands:
        with pytest.raises(SystemExit):
            benchmark.parse_args(command)
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match="add --no-torch_compile"):
        benchmark.main(benchmark.parse_args(["--parts", "operators", "--torch_compile", f"--work_dir={tmp_path}"]))


def test_cost_table():
    rows = [line.strip("| ").split(" | ") for line in cost.cost_table(seconds=9.0, price=2.0).splitlines()[2:]]
    # 482 updates of 16 clips, 9 seconds each: 69,408 s = 19.28 h on one GPU; 120 updates of 64 on 64: 1,080 s = 0.3 h
    assert rows == [
        ["1", "16", "482", "19.28", "19.3", "38.56"],
        ["8", "16", "482", "2.41", "19.3", "38.56"],
        ["64", "64", "120", "0.30", "19.2", "38.40"],
    ]
    assert cost.cost_table(seconds=9.0, price=None).splitlines()[2].endswith("| - |")


def test_cost_reads_a_full_fine_tune_of_the_papers_recipe_only(tmp_path):
    file = tmp_path / "run.json"
    step = {"results": {"train_ltd.py": {"clips_per_second": 0.25}}}
    run = {"model": "1.3b", "settings": {k: v for k, v in cost.SETTINGS.items() if k != "model"}, "step": step}
    file.write_text(json.dumps(run))
    assert cost.read_step(str(file)) == (4, "paper")
    run["settings"]["num_frames"] = 33
    file.write_text(json.dumps(run))
    with pytest.raises(ValueError, match="num_frames 33 instead of 81"):
        cost.read_step(str(file))
    with pytest.raises(ValueError, match="neither a folder, nor a file, nor a number"):
        cost.read_step("no.json")
    assert cost.read_step("6.5") == (6.5, "paper")


@pytest.mark.parametrize("expert", [None, "low"])
def test_cost_of_a_run(tmp_path, capsys, expert):
    """What is computed for all of it, and what was measured until its last line, on two GPUs."""
    folder = tmp_path / "low_noise" if expert else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / "estimate.json").write_text(json.dumps({"steps": 1000, "total_hours": 2.5, "processes": 2}))
    rows = [
        {"step": 10, "loss": 1.0, "hours": 0.1},
        {"step": 20, "loss": 1.0, "hours": 0.75},
        {"step": 20, "val/mse": 1},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cost.main(cost.parse_args([str(tmp_path), "--price_per_gpu_hour=3"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == [
        "| the whole run, computed | 1000 | 2.50 | 2 | 5.00 | 15.00 |",
        "| until its last line, measured | 20 | 0.75 | 2 | 1.50 | 4.50 |",
    ]
    with pytest.raises(ValueError, match=r"has no estimate\.json"):
        cost.run_table(str(tmp_path / "elsewhere"), None)


def test_cost_reads_what_a_run_writes(run):
    output = run(max_train_steps=3)
    table = cost.run_table(str(output), None).splitlines()
    assert table[2].startswith("| the whole run, computed | 3 | ") and table[2].endswith(" | - |")
    assert table[3].startswith("| 1000 steps without the rest, computed | 1000 | ")
    assert table[4].startswith("| until its last line, measured | 3 | ")


def test_cost_of_a_lora_counts_both_experts(tmp_path):
    file = tmp_path / "run.json"
    rows = {}
    for model in ("14b", "a14b"):
        step = {"results": {"train_ltd.py": {"clips_per_second": 0.25}}}
        file.write_text(json.dumps({"model": model, "settings": {"train_type": "lora"}, "step": step}))
        seconds, recipe = cost.read_step(str(file))
        rows[model] = cost.cost_table(seconds, 3.6, cost.RECIPES[recipe]).splitlines()[2:]
    # 1,000 updates of 4 clips, 4 seconds each: 16,000 s
    assert rows["14b"][0] == "| 1 | 4 | 1000 | 4.44 | 4.4 | 16.00 |"
    assert rows["14b"][2] == "| 4 | 4 | 1000 | 1.11 | 4.4 | 16.00 |"
    assert rows["a14b"][0] == "| 1 | 4 | 2000 | 8.89 | 8.9 | 32.00 |"
