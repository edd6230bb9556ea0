"""examples/benchmark/gpu_check.py: its commands are right, and it goes on whatever an item does. No GPU is used."""

import json
import shlex
import sys

import benchmark
import gpu_check
import pytest

import train_ltd

FLAGS = {action.dest for action in train_ltd.build_parser()._actions}


@pytest.mark.parametrize("item", gpu_check.ITEMS, ids=lambda item: item.name)
def test_each_item_is_a_command_that_its_program_takes(item):
    script, *line = shlex.split(item.command)
    if script == "-m":
        assert line[0] == "pytest" and (gpu_check.ROOT / "tests/test_wan.py").is_file()
        return
    assert (gpu_check.ROOT / script).is_file()
    args = benchmark.parse_args(line)
    assert args.parts == ["step"] and args.model in benchmark.SHAPES
    given = [flag.removeprefix("--") for flag in args.train_flags if flag.startswith("--")]
    assert set(given) <= FLAGS
    quantization = {"nf4": "bitsandbytes", "int8": "torchao"}
    assert [quantization[name] for name in quantization if name in line] == list(item.packages)


def test_the_first_item_is_what_the_recipe_for_24_gb_computes():
    item = gpu_check.ITEMS[0]
    args = benchmark.parse_args(shlex.split(item.command)[1:])
    assert benchmark.SIZES[args.model] == (81, 480, 832)
    flags = " ".join(args.train_flags)
    assert "--quantization nf4" in flags and "--gradient_checkpointing offload" in flags


@pytest.mark.slow
def test_without_a_gpu_every_item_is_left_out_by_name(tmp_path, capsys):
    lines = gpu_check.main(gpu_check.parse_args([f"--output_dir={tmp_path}"]))
    assert lines == {item.name: "left out: torch finds no GPU" for item in gpu_check.ITEMS}
    printed = capsys.readouterr().out
    assert "torch 2." in printed and f"Python {sys.version_info.major}." in printed


@pytest.mark.slow
def test_items_are_run_in_turn_and_none_ends_the_others(tmp_path, monkeypatch, capsys):
    """One writes a benchmark's result, one fails, one is stopped, and one has no package."""
    result = {"seconds_per_step": 2.5, "peak_memory_gib": 19.6, "losses": [3.0, 2.0], "mfu": 0.5}
    text = json.dumps({"step": {"results": {"train_ltd.py": result}}})
    writer = tmp_path / "writer.py"
    writer.write_text(f"import sys; open(sys.argv[sys.argv.index('--output_file') + 1], 'w').write({text!r})")
    monkeypatch.setattr(gpu_check, "BENCHMARK", str(writer))
    items = [
        gpu_check.Item("measured", str(writer)),
        gpu_check.Item("fails", "-c 'raise SystemExit(3)'"),
        gpu_check.Item("lacks", "-c pass", ("no_such_package",)),
        gpu_check.Item("passes", "-c pass"),
        gpu_check.Item("hangs", "-c 'import time; time.sleep(3600)'"),
        gpu_check.Item("goes_on", "-c pass"),
    ]
    monkeypatch.setattr(gpu_check, "ITEMS", items)
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: True)
    args = gpu_check.parse_args([f"--output_dir={tmp_path}", f"--work_dir={tmp_path}"])
    run = gpu_check.subprocess.run

    def stop_what_hangs(command, timeout=None, **kwargs):
        limit = 0.01 if "time.sleep" in command[-1] else timeout
        return run(command, timeout=limit, **kwargs)

    monkeypatch.setattr(gpu_check.subprocess, "run", stop_what_hangs)
    lines = gpu_check.main(args)
    assert lines["measured"].startswith("2.50 s/step, peak 19.6 GiB, loss 3.000 to 2.000, MFU 50%; ")
    assert lines["fails"].startswith("failed with exit code 3")
    assert lines["lacks"] == "left out: pip install no_such_package"
    assert lines["passes"].startswith("passed in")
    assert lines["hangs"] == "stopped: the time was up"
    assert lines["goes_on"].startswith("passed in")
    assert list(lines) == [item.name for item in items]
    assert "measured         2.50 s/step" in capsys.readouterr().out

    lines = gpu_check.main(gpu_check.parse_args([f"--output_dir={tmp_path}", "--minutes=0"]))
    assert lines["lacks"] == "left out: pip install no_such_package"
    assert {line for name, line in lines.items() if name != "lacks"} == {"left out: the time was up"}
