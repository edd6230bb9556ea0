"""examples/benchmark: benchmark.py and cost.py: what they count, not how fast it is."""

import gc
import inspect
import itertools
import json
import math

import benchmark
import cost
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


def test_stopwatch_counts_nested_calls_once_and_medians_the_measured_steps(monkeypatch):
    times = itertools.count()
    monkeypatch.setattr(benchmark, "now", lambda: float(next(times)))  # each look at the clock is a second later
    watch = benchmark.Stopwatch(warmup=1, steps=2)
    for _ in range(3):
        with watch.measure("benchmark"):
            pass
        with watch.measure("loss"), watch.measure("forward"):
            pass
        assert watch.timed(abs, "backward")(-1) == 1
        with watch.measure("optimizer"):
            pass
    summary = watch.summary()
    # A step is 10 seconds from the end of one optimizer to that of the next, of which the benchmark's own 1 is not.
    assert summary["seconds_per_step"] == 9
    assert (summary["forward"], summary["loss"], summary["backward"], summary["optimizer"]) == (1, 2, 1, 1)
    assert summary["rest of loop"] == 4
    assert summary["overhead"] == pytest.approx(6 / 9)


ADAPTER = """
import benchmark

class Trainer(benchmark.BareLoop):
    def step(self, batch):
        assert batch["latents"].device.type == "cpu" and batch["prompt_embeds"].shape[1] == 512
        return super().step(batch)
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
    (tmp_path / "other.py").write_text(ADAPTER)
    flags = ["--loss=mse", "--learning_rate=1e-2", f"--train_type={train_type}", "--train_batch_size=2"]
    step = bench("--parts", "step", "bare", "--adapter", tmp_path / "other.py", *flags)["step"]
    losses = [result["losses"] for result in step["results"].values()]
    assert list(step["results"]) == ["train_ltd.py", "bare loop", "other"]
    assert [len(values) for values in losses] == [4, 4, 4]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[1] == losses[2]
    assert len(set(losses[0])) == 4
    assert step["latents"] == [2, 16, 3, 4, 6]
    for result in step["results"].values():
        assert all(result[label] > 0 for label in benchmark.WORK)
        assert result["seconds_per_step"] * result["clips_per_second"] == pytest.approx(2)
        assert result["hfu"] / result["mfu"] == pytest.approx(step["flops"]["hardware"] / step["flops"]["useful"])
    assert step["results"]["train_ltd.py"]["data wait"] > 0
    assert step["results"]["train_ltd.py"]["peak_memory_gib"] > 0
    header, first = capsys.readouterr().out.splitlines()[:2]
    assert header.split() == ["train_ltd.py", "bare", "loop", "other"] and first.startswith("seconds_per_step")


def test_the_scripts_model_is_gone_before_the_next_one_is_built(flags, tmp_path):
    settings = settings_for(flags, tmp_path, max_train_steps=4)
    free_memory()
    before = sum(type(thing) is WanTransformer3DModel for thing in gc.get_objects())
    watch = benchmark.time_script(settings, warmup=1, steps=2)
    free_memory()
    assert len(watch.batches) == 3
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


def test_misuse_is_refused(capsys):
    for command, message in ((["--steps=0"], "must be positive"), (["--parts", "bare"], "add step")):
        with pytest.raises(SystemExit):
            benchmark.parse_args(command)
        assert message in capsys.readouterr().err


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
    with pytest.raises(ValueError, match="neither a file nor a number"):
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
    assert table[3].startswith("| until its last line, measured | 3 | ")


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
