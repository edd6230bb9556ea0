"""examples/benchmark/gpu_check.py: its commands are right, and it goes on whatever an item does. No GPU is used."""

import json
import re
import shlex
import sys

import benchmark
import gpu_check
import pytest

import train_ltd

FLAGS = {action.dest for action in train_ltd.build_parser()._actions}
ITEMS = [item for items in gpu_check.CHECKS.values() for item in items]
MODULES = {"nf4": "bitsandbytes", "int8": "torchao", "flash_4": "flash_attn.cute"}


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: item.name)
def test_each_item_is_a_command_that_its_program_takes(item):
    script, *line = shlex.split(item.command)
    if script == "-m":
        *_, file, option, expression = line
        assert line[0] == "pytest" and option == "-k"
        assert re.search(rf"def test_\w*{expression}", (gpu_check.ROOT / file).read_text())
        return
    assert (gpu_check.ROOT / script).is_file()
    args = benchmark.parse_args(line)
    assert len(args.parts) == 1 and args.model in benchmark.SHAPES
    given = [flag.removeprefix("--") for flag in args.train_flags if flag.startswith("--")]
    assert set(given) <= FLAGS
    assert [MODULES[name] for name in MODULES if name in line] == list(item.packages)
    assert item.goal is None or args.parts == ["step"]


def test_names_are_given_once():
    assert len({item.name for item in ITEMS}) == len(ITEMS)
    assert gpu_check.INSTALL["flash_attn.cute"] in train_ltd.FLASH_ATTENTION["flash_4"].install


def test_the_first_items_are_what_is_worth_most():
    first, second, *_ = gpu_check.CHECKS["speed"]
    assert first.command.replace("selective", "full") == second.command and "--model 14b" in first.command
    item = gpu_check.CHECKS["memory"][0]
    args = benchmark.parse_args(shlex.split(item.command)[1:])
    assert benchmark.SIZES[args.model] == (81, 480, 832)
    flags = " ".join(args.train_flags)
    assert "--quantization nf4" in flags and "--gradient_checkpointing offload" in flags


def test_items_of_another_check_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu_check.parse_args(["--items", "int8"])
    assert "int8 is not one of 14b_selective" in capsys.readouterr().err
    assert gpu_check.parse_args(["--check", "memory", "--items", "int8"]).items == ["int8"]


@pytest.mark.slow
@pytest.mark.parametrize("check", gpu_check.CHECKS)
def test_without_a_gpu_every_item_is_left_out_by_name(tmp_path, capsys, check):
    lines = gpu_check.main(gpu_check.parse_args(["--check", check, f"--output_dir={tmp_path}"]))
    assert lines == {item.name: "left out: torch finds no GPU" for item in gpu_check.CHECKS[check]}
    printed = capsys.readouterr().out
    assert "torch 2." in printed and f"Python {sys.version_info.major}." in printed
    assert "GPU: torch finds none" in printed


def test_what_a_gpu_cannot_hold_is_left_out(monkeypatch):
    monkeypatch.setattr(gpu_check, "is_missing", lambda module: module == "torchao")
    big = gpu_check.Item("big", "-c pass", memory_gib=100)
    reason = gpu_check.reason_to_leave_out(big, {"memory_gib": 79.2}, False, 1)
    assert reason == "needs 100 GiB of GPU memory, this one has 79"
    assert gpu_check.reason_to_leave_out(big, {"memory_gib": 139.8}, False, 1) is None
    assert gpu_check.reason_to_leave_out(big, {"memory_gib": 139.8}, False, 0) == "the time was up"
    assert gpu_check.reason_to_leave_out(big, {}, True, 1) is None
    lacking = gpu_check.Item("lacking", "-c pass", packages=("torchao",))
    assert gpu_check.reason_to_leave_out(lacking, {"memory_gib": 80}, True, 1) == "pip install torchao"
    monkeypatch.undo()
    assert gpu_check.is_missing("no_such_package.cute") and not gpu_check.is_missing("json")


@pytest.mark.slow
def test_items_are_run_in_turn_and_none_ends_the_others(tmp_path, monkeypatch, capsys):
    """One writes a benchmark's result, one a broken one, one fails, one is stopped, and one has no package."""
    result = {"seconds_per_step": 2.5, "peak_memory_gib": 19.6, "losses": [3.0, 2.0], "mfu": 0.5}
    text = json.dumps({"step": {"results": {"train_ltd.py": result}}})
    writer = tmp_path / "writer.py"
    writer.write_text("import sys; open(sys.argv[sys.argv.index('--output_file') + 1], 'w').write(sys.argv[1])")
    monkeypatch.setattr(gpu_check, "BENCHMARK", str(writer))
    items = [
        gpu_check.Item("measured", f"{writer} {shlex.quote(text)}", goal=0.62),
        gpu_check.Item("breaks", f"{writer} {{}}x"),
        gpu_check.Item("fails", "-c 'raise SystemExit(\"why it failed\")'"),
        gpu_check.Item("lacks", "-c pass", ("no_such_package",)),
        gpu_check.Item("passes", "-c pass"),
        gpu_check.Item("hangs", "-c 'import time; time.sleep(3600)'", seconds=0.1),
        gpu_check.Item("goes_on", "-c pass"),
    ]
    monkeypatch.setitem(gpu_check.CHECKS, "speed", items)
    facts = {"gpu": {"name": "a GPU", "memory_gib": 80.0}}
    monkeypatch.setattr(gpu_check, "environment", lambda: facts)
    lines = gpu_check.main(gpu_check.parse_args([f"--output_dir={tmp_path}", f"--work_dir={tmp_path}"]))
    assert lines["measured"].startswith("2.5 s/step, peak 19.6 GiB, loss 3.000 to 2.000, MFU 50%, goal 62%; ")
    assert lines["breaks"].startswith("failed: JSONDecodeError")
    assert re.fullmatch(r"failed with exit code 1 after \d+ s: why it failed", lines["fails"])
    assert lines["lacks"] == "left out: pip install no_such_package"
    assert lines["passes"].startswith("passed in")
    assert lines["hangs"] == "stopped after 0 s"
    assert lines["goes_on"].startswith("passed in")
    assert list(lines) == [item.name for item in items]
    assert "measured           2.5 s/step" in capsys.readouterr().out
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["environment"] == facts
    assert {name: row["line"] for name, row in written["items"].items()} == lines
    assert written["items"]["measured"]["record"] == json.loads(text)

    lines = gpu_check.main(gpu_check.parse_args([f"--output_dir={tmp_path}", "--minutes=0"]))
    assert lines["lacks"] == "left out: pip install no_such_package"
    assert {line for name, line in lines.items() if name != "lacks"} == {"left out: the time was up"}


@pytest.mark.slow
def test_small_it_runs_through_on_a_cpu(tmp_path):
    """The real commands with a tiny model: what a CPU can do is measured, what it cannot do is named."""
    line = ["--small", f"--output_dir={tmp_path}", f"--work_dir={tmp_path}", "--minutes=60"]
    names = ["14b_selective", "caching", "1.3b_flash_4"]
    lines = gpu_check.main(gpu_check.parse_args([*line, "--items", *names]))
    assert list(lines) == names
    assert " s/step, peak " in lines["14b_selective"] and "goal 62%" in lines["14b_selective"]
    assert re.search(r"decode .* text .* script .* clips/s", lines["caching"])
    assert lines["1.3b_flash_4"] == "left out: pip install flash-attn-4==4.0.0b18"
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["small"] and written["environment"]["packages"]["torch"].startswith("2.")
    assert written["items"]["14b_selective"]["record"]["model"] == "tiny"
    assert "--model tiny" in written["items"]["14b_selective"]["command"]
