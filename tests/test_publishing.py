"""The card, and the Hub: whole runs into a loopback Hub and out of it again, with all faults on the way."""

import ast
import contextlib
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import av
import huggingface_hub
import pytest
from accelerate.state import PartialState
from conftest import CPU, HOUR, STEPS, launch, run_script, wait_for
from diffusers import WanPipeline, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from helpers import checkpoints, code_block, matter, strike
from hub_server import HubServer
from huggingface_hub import EvalResult, ModelCard, hf_hub_download
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

import train_ltd

ROOT = Path(__file__).resolve().parent.parent
TRIGGER = 'ohwx: "man"'
SAMPLES = [  # of the prompts below, after step 2
    "samples/step-000002-0-ohwx-man-a-quoted-prompt-of-a-square-x-y.mp4",
    "samples/step-000002-1-ohwx-man-b-s-end.mp4",
]
PROMPTS = ["a \"quoted\": prompt,\n---\nof a 'square' 🎬 # & {x}: [y]", "--- | `b` \\ %s ``` é\t中文\n\n: end"]


# --- The card, without a Hub -----------------------------------------------------------------------------------------


def cleaned(prompt, trigger=TRIGGER):
    """What a prompt with its trigger word comes to: one line, single spaces."""
    return " ".join(f"{trigger} {prompt}".split())


def all_bytes(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


FACTS = {"clips": 7, "steps": 2, "seed": 3, "clips an update": 1, "hardware": "1 x CPU, 0.01 h"}
HUB_SOURCES = {"pretrained_model_name_or_path": "team/tiny-wan", "train_data_dir": None, "dataset_name": "team/clips"}


@pytest.fixture
def card(flags, tmp_path):
    """Function that returns the card of a run with these flags, as read back from its file by the Hub's own class."""

    def build(samples=(), repo_id="tester/my-lora", **kwargs):
        args = train_ltd.parse_args(flags(**{"lora_alpha": 4} | kwargs))
        train_ltd.model_card(args, repo_id, list(samples), FACTS).save(tmp_path / "README.md")
        card = ModelCard.load(tmp_path / "README.md")
        assert matter(card.content) == card.data.to_dict()
        return card.data.to_dict(), card.content

    return build


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_front_matter(card, train_type):
    front, text = card(train_type=train_type, trigger_word="ohwx", license="mit", **HUB_SOURCES)
    lora = train_type == "lora"
    tags = {"text-to-video", "diffusers-training", "diffusers", "wan", "wan-diffusers", "ltd"}
    assert set(front.pop("tags")) == tags | ({"lora", "template:sd-lora"} if lora else set())
    assert front == {
        "base_model": "team/tiny-wan",
        "base_model_relation": "adapter" if lora else "finetune",
        "datasets": ["team/clips"],
        "library_name": "diffusers",
        "license": "mit",
        "pipeline_tag": "text-to-video",
    } | ({"instance_prompt": "ohwx"} if lora else {})
    assert "<Gallery />" not in text  # there are no samples
    assert "TODO" not in text and "None" not in text
    code = code_block(text)
    assert ('load_lora_weights("tester/my-lora")' in code) == lora
    assert ('from_pretrained("tester/my-lora", subfolder="transformer"' in code) == (not lora)


def test_local_sources_are_not_in_the_front_matter(card, tiny_wan, clips, tmp_path):
    front, text = card(dataset_name=clips, train_data_dir=None)
    assert not {"base_model", "base_model_relation", "datasets", "instance_prompt", "widget"} & set(front)
    for path in (tiny_wan, clips, tmp_path):
        assert str(path) not in text and str(path.parent) not in text


def test_relative_folder_that_looks_like_a_hub_id(card, tmp_path, monkeypatch):
    (tmp_path / "team" / "tiny-wan").mkdir(parents=True)
    (tmp_path / "team" / "clips").mkdir()
    monkeypatch.chdir(tmp_path)
    front, text = card(**HUB_SOURCES)
    assert not {"base_model", "base_model_relation", "datasets"} & set(front)
    assert "team/tiny-wan" not in text and "team/clips" not in text


def test_card_names_what_was_built_on(card, tiny_wan, tmp_path):
    other = tmp_path / "private" / "other.safetensors"
    other.parent.mkdir()
    other.write_bytes(b"")
    front, text = card(**HUB_SOURCES, init_lora="someone/style-lora", transformer_path="someone/other-wan")
    table = text.split("## Training")[1]
    assert all(name in table for name in ("team/tiny-wan", "someone/other-wan", "someone/style-lora"))
    assert {"someone/other-wan", "someone/style-lora"} <= set(front["base_model"])
    assert front["base_model_relation"] == "adapter" and '"someone/other-wan"' in code_block(text)
    _, text = card(init_lora=other, transformer_path=other)
    assert text.count("other.safetensors") >= 2 and str(tmp_path) not in text
    ast.parse(code_block(text))


def test_card_of_plain_mse_does_not_claim_ltd(card):
    front, text = card(loss="mse")
    (row,) = re.findall(r"\| loss.*? \| (.*) \|", text)
    assert "mse" in row
    assert "ltd" not in front["tags"]
    assert "Latent Temporal Discrepancy" not in text.split("## Citation")[0]


def test_card_of_ltd_says_its_settings(card):
    _, text = card(ltd_window=4, ltd_scale=0.5, ltd_normalize=True)
    for row in ("| ltd_window | 4 |", "| ltd_scale | 0.5 |", "| ltd_normalize | True |"):
        assert row in text.splitlines()
    assert "https://huggingface.co/papers/2601.20504" in text


ODD = [
    *PROMPTS,
    "---",
    "- item: 'x'",
    "null",
    "1e3",
    "{{ jinja }} {% if %} {0} %s \\n \\u0041",
    "ends with a backslash \\ and quotes \"\"\" '''",
    "| a | table | <Gallery /> <script>alert(1)</script>",
    "```\nimport os\n```\n# heading",
    "line\u2028separator, \x85 next line,\u00a0no-break, \u200bzero width, \ufeffbom",
    "\U0001f3ac\U0001f1e9\U0001f1ea 👩‍👩‍👧 日本語 العربية é \u0301",
    "&lt;b&gt; &amp;amp; @user #tag !tag *bold* ~ ? % `",
    "long " * 400,
]


@pytest.mark.parametrize("prompt", ODD, ids=range(len(ODD)))
def test_odd_prompts_do_not_break_the_card(card, prompt):
    samples = ["samples/step-000002-0.mp4", "samples/step-000002-1.mp4"]
    front, text = card(samples, validation_prompt=[prompt, "plain"], trigger_word=TRIGGER, **HUB_SOURCES)
    expected = prompt_clean(f"{TRIGGER} {prompt}")
    assert front["widget"] == [
        {"text": expected, "output": {"url": samples[0]}},
        {"text": prompt_clean(f"{TRIGGER} plain"), "output": {"url": samples[1]}},
    ]
    assert front["instance_prompt"] == TRIGGER and front["base_model"] == "team/tiny-wan"
    assert text.count("<Gallery />") >= 1
    calls = [node for node in ast.walk(ast.parse(code_block(text))) if isinstance(node, ast.Call)]
    (call,) = [node for node in calls if ast.unparse(node.func) == "pipe"]
    assert ast.literal_eval(call.args[0]) == expected
    check_table(text)


def check_table(text):
    """Two cells in every row, no row broken."""
    rows = text.split("| setting | value |\n|---|---|\n")[1].split("\n\n")[0].splitlines()
    assert len(rows) > 10
    for row in rows:
        assert row.startswith("| ") and row.endswith(" |") and len(re.findall(r"(?<!\\)\|", row)) == 3, row


ODD_TRIGGERS = ["`tick`", "---", "yes", "a | b", "two\nlines", "  spaced  out "]


@pytest.mark.parametrize("trigger", ODD_TRIGGERS)
def test_odd_trigger_words(card, trigger):
    """The front matter and the text name the very words that the captions began with."""
    front, text = card(trigger_word=trigger, validation_prompt="plain", samples=["samples/0.mp4"])
    assert front["instance_prompt"] == " ".join(trigger.split())
    assert front["widget"][0]["text"] == f"{front['instance_prompt']} plain"
    ast.parse(code_block(text))


def test_markup_is_escaped(card, tmp_path):
    """Front matter and code hold it literally; in the text it must not act."""
    folder = tmp_path / "<img src=x>"
    folder.mkdir()
    _, text = card(trigger_word="<script>alert(1)</script>`*", pretrained_model_name_or_path=folder)
    body = text.split("---\n", 2)[2].replace(code_block(text), "")
    assert "&lt;script&gt;" in body and "&lt;img" in body and "<script" not in body and "<img" not in body
    check_table(text)


def test_odd_name_of_the_base_folder(card, tmp_path):
    folder = tmp_path / 'odd "name" | of\\a base'
    folder.mkdir()
    _, text = card(pretrained_model_name_or_path=folder, train_type="full")
    ast.parse(code_block(text))
    check_table(text)


@pytest.mark.parametrize("path", ["{tmp}/secret/thing", "../secret/thing", "secret/thing", "./secret/thing/"])
def test_published_settings_hold_no_path(flags, tmp_path, monkeypatch, path):
    """For every flag that can hold one, absolute or relative."""
    (tmp_path / "here" / "secret" / "thing").mkdir(parents=True)
    (tmp_path / "secret" / "thing").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    args, path = train_ltd.parse_args(flags(validation_split="test")), path.format(tmp=tmp_path)
    holders = """pretrained_model_name_or_path transformer_path init_lora dataset_name train_data_dir cache_dir
        output_dir resume_from_checkpoint config""".split()
    assert set(holders) <= set(vars(args))
    for flag in holders:
        setattr(args, flag, path)
    text = json.dumps(train_ltd.published_settings(args))
    assert "secret" not in text and str(tmp_path) not in text
    assert json.loads(text)["pretrained_model_name_or_path"] == "thing"


def test_odd_name_of_the_transformer_folder(card, tmp_path):
    folder = tmp_path / 'odd "name" of\\a transformer'
    folder.mkdir()
    _, text = card(transformer_path=folder)
    ast.parse(code_block(text))


@pytest.mark.parametrize("flag, value", [("revision", "v1.0"), ("variant", "fp16")])
@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_code_loads_the_very_base_of_the_training(card, flag, value, train_type):
    _, text = card(train_type=train_type, **HUB_SOURCES | {flag: value})
    assert f'{flag}="{value}"' in code_block(text)


# --- The output folder of more than one run --------------------------------------------------------------------------

SAMPLED = {"validation_num_inference_steps": 1, "max_train_steps": 1}


@pytest.fixture
def published(run, monkeypatch):
    """Function that runs with `--push_to_hub` and returns the card, its widget, and the files that are uploaded."""

    def train_and_publish(**kwargs):
        uploaded = []
        monkeypatch.setattr(train_ltd, "create_hub_repo", lambda args: "tester/run")
        monkeypatch.setattr(train_ltd, "publish", lambda args, repo_id, files: uploaded.extend(files))
        folder = run(push_to_hub=True, **SAMPLED, **kwargs)
        text = (folder / "README.md").read_text(encoding="utf-8")
        return text, matter(text).get("widget", []), {path.relative_to(folder).as_posix(): path for path in uploaded}

    return train_and_publish


@pytest.mark.parametrize("prompts", [["a"], None])
def test_samples_of_an_earlier_run_are_not_this_ones(published, tmp_path, prompts):
    (tmp_path / "run" / "samples").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "run" / "samples" / f"step-000001-{number}.mp4").write_bytes(b"stale")
    text, widget, files = published(validation_prompt=prompts)
    assert [entry["text"] for entry in widget] == (prompts or [])
    assert ("<Gallery />" in text) == bool(prompts)
    samples = {name: path for name, path in files.items() if name.endswith(".mp4")}
    assert set(samples) == {entry["output"]["url"] for entry in widget}
    assert all(path.read_bytes() != b"stale" for path in samples.values())


@pytest.mark.parametrize("prompts", [None, ["b"]])
def test_finished_run_is_resumed_with_other_prompts(published, prompts):
    """As one does to publish what was not published: no sample goes with a prompt that it was not made from."""
    _, widget, files = published(validation_prompt=["a"])
    old = files[widget[0]["output"]["url"]].stat().st_mtime_ns
    text, widget, files = published(validation_prompt=prompts, resume_from_checkpoint="latest")
    assert {entry["text"] for entry in widget} <= set(prompts or [])
    assert ("<Gallery />" in text) == bool(widget)
    samples = {name: path for name, path in files.items() if name.endswith(".mp4")}
    assert set(samples) == {entry["output"]["url"] for entry in widget}
    assert all(path.stat().st_mtime_ns > old for path in samples.values())


def test_upload_that_was_left_out_follows_at_the_end(run, monkeypatch, tmp_path):
    """The network is busy with the first of four; in the end the last one is there, and the limit holds here."""
    uploaded, training_is_over = [], threading.Event()

    def upload(repo_id, branch, folder, own, limit):
        if not uploaded:
            training_is_over.wait()
        assert train_ltd.is_intact(folder)  # was not removed meanwhile
        uploaded.append(folder.name)

    strike(monkeypatch, train_ltd, "end", 1, training_is_over.set)
    monkeypatch.setattr(train_ltd, "create_hub_repo", lambda args: "tester/run")
    monkeypatch.setattr(train_ltd, "hub_checkpoints", lambda repo_id, branch: {})
    monkeypatch.setattr(train_ltd, "upload_checkpoint", upload)
    kwargs = STEPS | {"max_train_steps": 4, "checkpoints_total_limit": 1, "push_checkpoints_to_hub": True}
    run(**kwargs)
    assert uploaded == ["checkpoint-1", "checkpoint-4"] and checkpoints(tmp_path / "run") == ["checkpoint-4"]


class Shelf:
    """What is on the Hub's branch of checkpoints, by name."""

    def __init__(self, monkeypatch):
        self.names = set()
        monkeypatch.setattr(train_ltd, "create_hub_repo", lambda args: "tester/run")
        monkeypatch.setattr(train_ltd, "hub_checkpoints", self.checkpoints)
        monkeypatch.setattr(train_ltd.huggingface_hub, "upload_folder", self.upload)
        monkeypatch.setattr(train_ltd.huggingface_hub, "delete_folder", self.delete)

    def checkpoints(self, repo_id, branch):
        return dict.fromkeys(sorted(self.names, key=train_ltd.checkpoint_step))

    def upload(self, *, path_in_repo, **kwargs):
        self.names.add(path_in_repo)

    def delete(self, *, path_in_repo, **kwargs):
        self.names.remove(path_in_repo)


def test_only_what_this_run_has_pushed_is_deleted_from_the_hub(monkeypatch, tmp_path):
    """By the limit, and what lies ahead after going back; never what was just uploaded, nor another run's."""
    shelf = Shelf(monkeypatch)
    shelf.names = {"checkpoint-1", "checkpoint-4", "checkpoint-5", "checkpoint-9"}
    own = ["checkpoint-1", "checkpoint-4", "checkpoint-5", "checkpoint-3"]
    train_ltd.upload_checkpoint("tester/run", "checkpoints", tmp_path / "checkpoint-3", own, limit=1)
    assert shelf.names == {"checkpoint-3", "checkpoint-9"}
    train_ltd.upload_checkpoint("tester/run", "checkpoints", tmp_path / "checkpoint-3", own, limit=1)
    assert shelf.names == {"checkpoint-3", "checkpoint-9"}


def test_a_resumed_run_counts_what_it_had_pushed(run, monkeypatch):
    shelf = Shelf(monkeypatch)
    kwargs = STEPS | {"checkpoints_total_limit": 2, "push_checkpoints_to_hub": True, "lr_scheduler": "constant"}
    run(**kwargs)
    assert shelf.names >= {"checkpoint-3"} and len(shelf.names) <= 3
    run(**kwargs | {"max_train_steps": 5}, resume_from_checkpoint="latest")
    assert shelf.names >= {"checkpoint-5"} and len(shelf.names) == 2


@pytest.mark.parametrize(
    "on_hub", [["checkpoint-1", "checkpoint-4"], ["checkpoint-1", "checkpoint-2", "checkpoint-4"]]
)
def test_uploads_after_going_back(run, monkeypatch, tmp_path, on_hub):
    """The Hub has checkpoints of the way that was given up, under the names of those that are made now."""
    uploaded, over = [], threading.Event()

    def upload(repo_id, branch, folder, own, limit):
        if not uploaded:
            over.wait()
        uploaded.append((folder.name, folder.is_dir()))

    kwargs = STEPS | {"max_train_steps": 4, "lr_scheduler": "constant"}
    run(**kwargs)
    strike(monkeypatch, train_ltd, "end", 1, over.set)
    monkeypatch.setattr(train_ltd, "create_hub_repo", lambda args: "tester/run")
    monkeypatch.setattr(train_ltd, "hub_checkpoints", lambda repo_id, branch: dict.fromkeys(on_hub))
    monkeypatch.setattr(train_ltd, "upload_checkpoint", upload)
    kwargs |= {"overwrite_output_dir": True, "push_checkpoints_to_hub": True, "checkpoints_total_limit": 1}
    run(**kwargs, resume_from_checkpoint=tmp_path / "run/checkpoint-1", learning_rate=5e-3)
    assert uploaded == [("checkpoint-2", True), ("checkpoint-4", True)]
    assert checkpoints(tmp_path / "run") == ["checkpoint-4"]


# --- Whole runs ------------------------------------------------------------------------------------------------------

LORA_FILES = {
    ".gitattributes",
    "README.md",
    "pytorch_lora_weights.safetensors",
    "run.safetensors",
    "training_settings.json",
    "curves.png",
}
FULL_FILES = {
    ".gitattributes",
    "README.md",
    "training_settings.json",
    "curves.png",
    "it's full.safetensors",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
}
TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"
NEVER_NEEDED = [
    "README.md",
    "assets/demo.mp4",
    "google/umt5-xxl/spiece.model",
    "text_encoder/model.fp16.safetensors",
    "transformer/diffusion_pytorch_model.fp16.safetensors",
    "vae/diffusion_pytorch_model.bin",
]


def assert_no_secrets(files, *secrets):
    """No token, no path of this machine, be it plain or JSON-escaped, in names or bytes."""
    secrets = [str(secret) for secret in (*secrets, Path.home()) if len(str(secret)) > 3]
    for name, data in files.items():
        found = [s for s in secrets if s.encode() in data or s.replace("/", "\\/").encode() in data or s in name]
        assert not found, name


def secrets(hub):
    return hub.token, hub.read_token, hub.root


def train(hub, folder, *flags, token=None):
    """`python train_ltd.py`, in `folder`, with a fresh home; the result has the requests that the Hub saw."""
    command = [sys.executable, str(ROOT / "train_ltd.py"), *TINY, *flags]
    env, start = {**os.environ, **hub.env(token), **CPU}, len(hub.requests)
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=HOUR)
    done.requests = hub.requests[start:]
    return done


@pytest.fixture(scope="module")
def train_soon(hub_forks):
    """Function that trains in `folder`, without the imports, in a home that such runs share."""
    return lambda folder, *flags: launch([*TINY, *flags], folder=folder, context=hub_forks)


TINY = """--pretrained_model_name_or_path=team/tiny-wan --dataset_name=team/clips --height=32 --width=48 --num_frames=9
    --logging_steps=1 --learning_rate=1e-2 --seed=3 --push_to_hub --validation_num_inference_steps=2
    --hub_private_repo""".split()
LORA = ["--output_dir=run", "--rank=4", "--hub_model_id=tester/my-lora", f"--trigger_word={TRIGGER}"]


def downloads(requests, repo):
    """Files of a repository whose content was asked for, in that order."""
    pattern = re.compile(rf"GET /(?:datasets/)?{repo}/resolve/[^/]+/(.+)")
    return [match.group(1) for request in requests if (match := pattern.fullmatch(" ".join(request)))]


@pytest.fixture(scope="module")
def hub(tmp_path_factory, tiny_wan, clips):
    """With a base model, in whose repository lies much that nobody needs, and a dataset of videos."""
    root = tmp_path_factory.mktemp("hub")
    with HubServer(root) as server:
        server.add("team/tiny-wan", all_bytes(tiny_wan) | dict.fromkeys(NEVER_NEEDED, b"not needed"))
        server.add("team/clips", clips, repo_type="dataset")
        yield server


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def lora_run(hub, work):
    """Two steps of a LoRA, published; every kind of by-product is written too."""
    prompts = [f"--validation_prompt={prompt}" for prompt in PROMPTS]
    extra = ["--max_train_steps=2", "--checkpointing_steps=1", "--validation_fraction=0.3", "--report_to=tensorboard"]
    done = train(hub, work, *LORA, *prompts, *extra)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(done=done, folder=work / "run", files=hub.files("tester/my-lora"))


@pytest.fixture(scope="module")
def second_run(hub, work, lora_run):
    """It resumes the first for one more step, in a home without any download, and publishes again."""
    extra = ["--max_train_steps=3", "--resume_from_checkpoint=latest", "--validation_fraction=0.3", "--report_to=none"]
    done = train(hub, work, *LORA, *extra)
    assert done.returncode == 0, done.stderr
    return SimpleNamespace(done=done, files=hub.files("tester/my-lora"))


@pytest.fixture(scope="module")
def full_run(hub, train_soon, work):
    """Two steps of all weights. The Hub refuses the commit; the command that the run printed is then typed."""
    hub.fail("/api/models/tester/my-wan/commit/", 403, message="storage quota exceeded")
    flags = ["--train_type=full", "--output_dir=it's full", "--hub_model_id=tester/my-wan", "--max_train_steps=2"]
    done = train_soon(work, *flags, "--validation_prompt=a square moves", "--report_to=none")
    assert done.returncode == 1, done.stderr
    command = re.findall(r"hf upload .*$", done.stderr, re.MULTILINE)[-1]
    before, path = set(hub.files("tester/my-wan")), f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, **hub.env(), "PATH": path}
    typed = subprocess.run(command, shell=True, env=env, cwd=work, capture_output=True, text=True, timeout=HOUR)
    return SimpleNamespace(done=done, command=command, typed=typed, before=before, folder=work / "it's full")


@pytest.mark.slow
def test_lora_repository_holds_just_what_others_need(hub, lora_run):
    assert set(lora_run.files) == LORA_FILES | set(SAMPLES)
    assert hub.repos["model", "tester/my-lora"].private
    for name in set(lora_run.files) - {".gitattributes"}:
        assert lora_run.files[name] == (lora_run.folder / name).read_bytes()
    # ... although the output folder holds more than that.
    assert (lora_run.folder / "checkpoint-2" / "optimizer.bin").is_file()
    assert list(lora_run.folder.rglob("events.out.tfevents*")) and list(lora_run.folder.glob("cache/latents/*"))


@pytest.mark.slow
def test_only_what_is_needed_is_downloaded_and_once(lora_run):
    fetched = downloads(lora_run.done.requests, "team/tiny-wan")
    assert len(fetched) == len(set(fetched))
    assert not set(fetched) & set(NEVER_NEEDED)
    weights = {name for name in fetched if name.endswith(".safetensors")}
    parts = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
    assert weights == {f"{folder}/{name}.safetensors" for folder, name in parts.items()}


@pytest.mark.slow
def test_repository_is_made_before_anything_big_is_downloaded(lora_run):
    requests = lora_run.done.requests
    create = requests.index(("POST", "/api/repos/create"))
    check = requests.index(("GET", "/api/models/tester/my-lora/auth-check/write"))
    expensive = (".safetensors", ".mp4", ".jsonl")
    assert create < check < min(n for n, (_, path) in enumerate(requests) if path.endswith(expensive))


@pytest.mark.slow
def test_no_path_and_no_token_anywhere(hub, work, lora_run, second_run, full_run, tiny_wan, clips):
    """Uploads of all runs, and everything else the runs wrote or said: the flags were relative."""
    for repo in ("tester/my-lora", "tester/my-wan"):
        assert_no_secrets(hub.files(repo), *secrets(hub), work, tiny_wan, clips, ROOT)
    assert_no_secrets(all_bytes(work), *secrets(hub), work, tiny_wan, clips)
    # A traceback, which ends the run whose upload failed, names the machine's files; it must not name tokens.
    for run in (lora_run, second_run):
        said = run.done.stdout + run.done.stderr
        assert_no_secrets({"what it said": said.encode()}, *secrets(hub), work, tiny_wan, clips)
    for text in (full_run.done.stdout, full_run.done.stderr, full_run.typed.stdout, full_run.typed.stderr):
        assert hub.token not in text


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_local_base_and_clips_leave_no_path(run, tiny_wan, clips, tmp_path, train_type):
    """Here all flags are absolute paths. Only notes for the user, outside what is published, may hold them."""
    folder = run(train_type=train_type, report_to="tensorboard", validation_prompt="a square", max_train_steps=1)
    assert_no_secrets(all_bytes(folder), tmp_path, tiny_wan, clips, ROOT)
    front = matter((folder / "README.md").read_text())
    assert not {"base_model", "base_model_relation", "datasets"} & set(front)


@pytest.mark.slow
def test_lora_card_of_the_run(lora_run):
    card = lora_run.files["README.md"].decode()
    front = matter(card)
    assert front["base_model"] == "team/tiny-wan" and front["datasets"] == ["team/clips"]
    for entry, prompt, sample in zip(front["widget"], PROMPTS, SAMPLES, strict=True):
        assert entry == {"text": cleaned(prompt), "output": {"url": sample}}
        assert lora_run.files[entry["output"]["url"]][4:8] == b"ftyp"
    # Every local link of the body is in the repository, too.
    assert re.findall(r"!\[.*?\]\((.*?)\)", card) == ["curves.png"]
    settings = json.loads(lora_run.files["training_settings.json"])
    assert settings["rank"] == settings["lora_alpha"] == 4 and settings["trigger_word"] == TRIGGER


@pytest.mark.slow
def test_second_push_updates_the_repository(hub, lora_run, second_run):
    assert len(hub.repos["model", "tester/my-lora"].commits) == 3  # with the initial one
    old_samples = {name for name in lora_run.files if name.startswith("samples/")}
    assert set(second_run.files) - old_samples == LORA_FILES
    for name in LORA_FILES - {".gitattributes", "curves.png"}:
        assert second_run.files[name] != lora_run.files[name]
    assert "| steps | 3 |" in second_run.files["README.md"].decode()
    assert "widget" not in matter(second_run.files["README.md"].decode())


@pytest.mark.slow
def test_warm_run_downloads_neither_vae_nor_text_encoder(second_run):
    fetched = downloads(second_run.done.requests, "team/tiny-wan")
    assert {name for name in fetched if name.endswith(".safetensors")} == {f"transformer/{TRANSFORMER_FILE}"}
    assert {name.split("/")[0] for name in fetched if "/" in name} <= {"transformer", "vae"}
    assert [name for name in fetched if name.startswith("vae/")] == ["vae/config.json"]


@pytest.mark.slow
def test_failed_upload_prints_the_command_that_mends_it(hub, full_run):
    assert "RuntimeError" in full_run.done.stderr and "storage quota exceeded" in full_run.done.stderr
    assert full_run.before == {".gitattributes"}
    words = shlex.split(full_run.command)
    assert words == ["hf", "upload", "tester/my-wan", "it's full/.upload", "."]
    assert full_run.typed.returncode == 0, full_run.typed.stderr
    files = hub.files("tester/my-wan")
    assert set(files) == FULL_FILES | {"samples/step-000002-0-a-square-moves.mp4"}
    for name in set(files) - {".gitattributes"}:
        assert files[name] == (full_run.folder / name).read_bytes()


@pytest.mark.slow
def test_full_card_of_the_run(hub, full_run):
    front = matter(hub.files("tester/my-wan")["README.md"].decode())
    assert front["base_model"] == "team/tiny-wan" and front["base_model_relation"] == "finetune"
    assert not {"lora", "template:sd-lora"} & set(front["tags"]) and "instance_prompt" not in front
    config = json.loads(hub.files("tester/my-wan")["transformer/config.json"])
    assert config["_class_name"] == "WanTransformer3DModel" and "_name_or_path" not in config


@pytest.mark.slow
def test_without_a_token_nothing_is_encoded(hub, tmp_path):
    done = train(hub, tmp_path, *LORA, "--hub_model_id=tester/never", "--max_train_steps=1", token="")
    assert done.returncode == 2
    error = done.stderr[done.stderr.rindex("error: ") :]
    assert "hf auth login" in error and "HF_TOKEN" in error and "tester/never" in error
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == [".lock"]  # of one run a folder
    assert not [name for name in downloads(done.requests, "team/tiny-wan") if name.endswith(".safetensors")]
    assert not downloads(done.requests, "team/clips") and ("model", "tester/never") not in hub.repos


@pytest.mark.slow
def test_checkpoints_go_to_the_hub_and_come_back(hub, hub_forks, run, tmp_path):
    """Train, kill -9, delete the folder, resume from the Hub: as if nothing had happened, even when it then fails."""
    flags = [flag for flag in TINY if flag != "--push_to_hub"] + ["--rank=4"]
    flags += [
        "--hub_model_id=tester/saved",
        "--push_checkpoints_to_hub",
        "--lr_scheduler=constant",
        "--report_to=none",
    ]
    flags += ["--output_dir=run", "--checkpointing_steps=1", "--checkpoints_total_limit=2"]

    def saved():
        there = ("model", "tester/saved") in hub.repos and "checkpoints" in hub.repos["model", "tester/saved"].branches
        files = hub.files("tester/saved", "checkpoints") if there else {}
        return sorted(int(name.split("-")[1].split("/")[0]) for name in files if name.endswith("/SHA256SUMS"))

    endless = [*flags, "--max_train_steps=100000"]
    process = hub_forks.Process(target=run_script, args=(endless, CPU, tmp_path / "said", tmp_path), daemon=True)
    process.start()
    wait_for(lambda: len(saved()) >= 2, process)
    process.kill()
    process.join()
    newest = saved()[-1]  # of two, or of three for as long as the oldest is not deleted yet
    assert len(saved()) <= 3 and hub.repos["model", "tester/saved"].private
    (tmp_path / "run").rename(tmp_path / "lost")
    hub.fail("/api/models/tester/saved/commit/checkpoints", 403, times=10_000)
    resume = [f"--max_train_steps={newest + 2}", "--resume_from_checkpoint=hub"]
    done = launch([*flags, *resume], folder=tmp_path, context=hub_forks)
    hub._faults.clear()
    assert done.returncode == 0, done.stderr
    assert f"resumed run/checkpoint-{newest}, step {newest}" in done.stderr
    assert "failed, training goes on" in done.stderr and saved()[-1] == newest
    assert set(hub.files("tester/saved")) == {".gitattributes"}  # only checkpoints were asked for
    assert_no_secrets(
        hub.files("tester/saved", "checkpoints") | {"said": done.stderr.encode()}, *secrets(hub), tmp_path
    )
    kwargs = {"lr_scheduler": "constant", "max_train_steps": newest + 2, "checkpointing_steps": 10**6}
    straight = run(output_dir=tmp_path / "straight", **kwargs)
    here, there = load_file(straight / WEIGHTS), load_file(tmp_path / "run" / WEIGHTS)
    assert here.keys() == there.keys() and all(here[k].equal(there[k]) for k in here)


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "times"), [(401, 10_000), ("cut", 1)])
def test_upload_of_a_checkpoint_meets_a_fault(hub, train_soon, tmp_path, fault, times):
    """A token revoked in the middle, or a connection that breaks: training does not wait, and the rest is uploaded."""
    repo = f"tester/fault-{fault}"
    hub.fail(f"/api/models/{repo}/commit/checkpoints", fault, times=times)
    flags = ["--output_dir=run", "--rank=4", f"--hub_model_id={repo}", "--push_checkpoints_to_hub", "--report_to=none"]
    done = train_soon(tmp_path, *flags, "--max_train_steps=2", "--checkpointing_steps=2")
    hub._faults.clear()
    assert done.returncode == 0, done.stderr
    assert WEIGHTS in hub.files(repo)
    assert ("failed, training goes on" in done.stderr) == (fault == 401)
    there = "checkpoint-2/SHA256SUMS" in hub.files(repo, "checkpoints")
    assert there == (fault == "cut")


@pytest.mark.slow
def test_training_does_not_wait_for_a_slow_hub(hub, hub_forks, tmp_path):
    """Checkpoints are left out while the first is on its way; the last one follows when training has ended."""
    repo = "tester/slow"
    hub.fail(f"/api/models/{repo}/commit/checkpoints", "held")
    flags = ["--output_dir=run", "--rank=4", f"--hub_model_id={repo}", "--push_checkpoints_to_hub", "--report_to=none"]
    line, log = [*TINY, *flags, "--max_train_steps=4", "--checkpointing_steps=1"], tmp_path / "said.err"
    process = hub_forks.Process(target=run_script, args=(line, CPU, tmp_path / "said", tmp_path), daemon=True)
    process.start()
    wait_for(lambda: log.is_file() and "checkpoint-4 is not uploaded yet" in log.read_text(), process)
    hub.released.set()
    process.join()
    said = log.read_text()
    assert process.exitcode == 0, said
    for step in (2, 3, 4):
        assert f"checkpoint-{step} is not uploaded yet: the network is busy with checkpoint-1" in said
    there = {name.split("/")[0] for name in hub.files(repo, "checkpoints")}
    assert there >= {"checkpoint-1", "checkpoint-4"} and not there & {"checkpoint-2", "checkpoint-3"}


# --- Single calls, in a worker ---------------------------------------------------------------------------------------


def work_off(connection):
    """The worker's loop: `(function, arguments)` in, what it returned out."""
    PartialState(cpu=True)  # train_ltd's logger asks for it
    while True:
        function, arguments = connection.recv()
        try:
            result = {"result": function(**arguments)}
        except Exception as error:
            result = {"error": type(error).__name__, "message": str(error), "cause": repr(error.__cause__)}
        connection.send(result)


@pytest.fixture(scope="module")
def worker(hub, hub_forks):
    """Function that calls a function of this file in the other process."""
    here, there = hub_forks.Pipe()
    process = hub_forks.Process(target=work_off, args=(there,), daemon=True)
    process.start()
    there.close()  # so that its end is seen

    def call(function, **arguments):
        start = len(hub.requests)
        here.send((function, arguments))
        assert here.poll(HOUR)
        result = SimpleNamespace(**{"result": None, "error": None, "message": "", **here.recv()})
        result.requests = hub.requests[start:]
        return result

    yield call
    process.kill()
    process.join()


@contextlib.contextmanager
def hurried(token, endpoint=None):
    """Nobody waits: yields the list of the waits, `train_ltd`'s and the client's own."""
    api, slept = huggingface_hub.hf_api.api, []
    before = time.sleep, os.environ["HF_TOKEN"], api.endpoint
    time.sleep, os.environ["HF_TOKEN"], api.endpoint = slept.append, token, endpoint or api.endpoint
    try:
        yield slept
    finally:
        time.sleep, os.environ["HF_TOKEN"], api.endpoint = before


def parse(output_dir, name=None, more=()):
    flags = ["--train_data_dir=.", "--report_to=none", "--push_to_hub", f"--output_dir={output_dir}"]
    flags += ["--height=32", "--width=48", "--num_frames=9", "--fps=16"]  # which no model is asked for here
    return train_ltd.parse_args([*flags, *([f"--hub_model_id={name}"] if name else []), *more])


def create(token, endpoint=None, name=None, output_dir="run", more=()):
    args = parse(output_dir, name, more)
    with hurried(token, endpoint) as slept:
        return [train_ltd.create_hub_repo(args), slept]


def publish(token, repo_id, output_dir, files):
    args = parse(output_dir, repo_id)
    with hurried(token) as slept:
        train_ltd.publish(args, repo_id, [Path(output_dir, name) for name in files])
    return slept


def counts(requests, method, part):
    return sum(request[0] == method and part in request[1] for request in requests)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tester/named", "bare", None])
def test_create_makes_the_repository(hub, worker, tmp_path, name):
    made = {"bare": "tester/bare", None: "tester/my_run"}.get(name, name)
    done = worker(create, token=hub.token, name=name, output_dir=str(tmp_path / "my_run"))
    assert done.result == [made, []], done.message
    assert set(hub.files(made)) == {".gitattributes"}


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["my run!", "a--b"])
def test_folder_whose_name_is_no_repository_name(worker, tmp_path, folder):
    """Refused at start, with the flag that helps, and before anything is sent."""
    done = worker(create, token="", output_dir=str(tmp_path / folder))
    assert done.error in ("ValueError", "HFValidationError") and not done.requests
    assert "--hub_model_id" in done.message


@pytest.mark.slow
def test_create_accepts_the_users_own_repository(hub, worker):
    hub.add("tester/there", {"README.md": b"old"})
    assert worker(create, token=hub.token, name="tester/there").result == ["tester/there", []]
    assert hub.files("tester/there")["README.md"] == b"old"


@pytest.mark.slow
def test_create_refuses_a_public_repository_that_is_to_be_private(hub, worker):
    """With checkpoints, the optimizer's state would be there for all to see."""
    hub.add("tester/open", {})
    done = worker(create, token=hub.token, name="tester/open", more=["--hub_private_repo"])
    assert done.error == "ValueError" and "tester/open is there and public" in done.message
    assert worker(create, token=hub.token, name="tester/closed", more=["--hub_private_repo"]).error is None
    assert hub.repos["model", "tester/closed"].private


@pytest.mark.slow
@pytest.mark.parametrize("case", ["no token", "wrong token", "read token", "read token, existing", "stranger's"])
def test_create_refuses_at_once_who_may_not_write(hub, worker, case):
    hub.add("tester/mine", {})
    token = {"no token": "", "wrong token": "hf_wrong", "stranger's": hub.token}.get(case, hub.read_token)
    name = {"stranger's": "stranger/lora", "read token, existing": "tester/mine"}.get(case, "tester/refused")
    done = worker(create, token=token, name=name)
    assert done.error == "ValueError"
    status = "401" if case in ("no token", "wrong token") else "403"
    for words in ("--push_to_hub", name, "hf auth login", "HF_TOKEN", status):
        assert words in done.message
    assert len(done.requests) <= 3 and ("model", "tester/refused") not in hub.repos
    assert hub.token not in done.message and hub.read_token not in done.message


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["POST /api/repos/create", "/auth-check/write", "/branch/", "GET [^-]+new-[^/]+$"])
@pytest.mark.parametrize("fault", [429, 500, 503, "cut", "lost"])
def test_create_waits_out_passing_faults(hub, worker, stage, fault):
    hub.fail(stage, fault, times=2)
    more = ["--push_checkpoints_to_hub", "--hub_private_repo"]
    done = worker(create, token=hub.token, name=f"tester/new-{fault}", more=more)
    assert done.result == [f"tester/new-{fault}", list(train_ltd.RETRY_DELAYS[:2])], done.message


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "waited"), [("30", 30), ("0", 1), ("soon", 1), ("86400", 600)])
def test_create_waits_as_long_as_the_hub_asks_but_no_day(hub, worker, asked, waited):
    hub.fail("POST /api/repos/create", 429, headers={"Retry-After": asked})
    assert worker(create, token=hub.token, name=f"tester/asked-{asked}").result[1] == [waited]


@pytest.mark.slow
@pytest.mark.parametrize("down", ["answers 503", "is not there"])
def test_create_gives_up_on_a_hub_that_is_down(hub, worker, down):
    tries = len(train_ltd.RETRY_DELAYS) + 1
    endpoint = "http://127.0.0.1:9" if down == "is not there" else None
    if not endpoint:
        hub.fail("POST /api/repos/create", 503, times=tries)
    done = worker(create, token=hub.token, name="tester/down", endpoint=endpoint)
    assert done.error == "ValueError" and "tester/down" in done.message
    assert counts(done.requests, "POST", "/api/repos/create") == (0 if endpoint else tries)


WEIGHTS, CARD, VIDEO = "pytorch_lora_weights.safetensors", "README.md", "samples/step-000002-0.mp4"


@pytest.fixture
def outputs(tmp_path):
    """An output folder, its name in need of quotes, with three files to publish and others never to."""
    folder = tmp_path / "it's $mine"
    for name in (WEIGHTS, CARD, VIDEO, "run.txt", "cache/latents/a.safetensors", "checkpoint-2/optimizer.bin"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((str(path).encode() + b"\n") * 5_000)
    (folder / CARD).write_text("---\nlicense: mit\n---\n\n# A card\n")
    return folder


def wanted(folder):
    return {name: (folder / name).read_bytes() for name in (WEIGHTS, CARD, VIDEO)}


def push(hub, worker, folder, repo):
    return worker(publish, token=hub.token, repo_id=repo, output_dir=str(folder), files=[WEIGHTS, CARD, VIDEO])


STAGES = {
    "yaml": "POST /api/validate-yaml",
    "preupload": "/preupload/main",
    "batch": "/info/lfs/objects/batch",
    "put": "PUT /lfs/",
    "verify": "/info/lfs/verify",
    "commit": "/commit/main",
}


# The client itself tries a commit once, most else six times: there, seven faults are for `publish` to wait out.
PASSING = [(stage, fault, 1) for stage in STAGES for fault in (429, 500, "cut")]


PASSING += [("commit", "lost", 1), ("commit", "cut", 3), ("put", 503, 7), ("put", "cut", 7), ("preupload", 429, 7)]


@pytest.mark.slow
@pytest.mark.parametrize("stage, fault, times", PASSING)
def test_publish_waits_out_passing_faults(hub, worker, outputs, stage, fault, times):
    repo = f"tester/upload-{stage}-{fault}-{times}"
    hub.add(repo, {})
    hub.fail(STAGES[stage], fault, times=times)
    done = push(hub, worker, outputs, repo)
    try:
        assert done.error is None, done.message
        assert {k: v for k, v in hub.files(repo).items() if k != ".gitattributes"} == wanted(outputs)
    finally:
        hub._faults.clear()


FATAL = [("commit", 403), ("commit", 503), ("put", 503), ("put", "cut"), ("preupload", 401)]


@pytest.mark.slow
@pytest.mark.parametrize("stage, fault", FATAL)
def test_publish_that_fails_for_good_keeps_the_folder(hub, worker, outputs, stage, fault):
    repo = f"tester/fails-{stage}-{fault}"
    hub.add(repo, {})
    hub.fail(STAGES[stage], fault, times=10_000)
    done = push(hub, worker, outputs, repo)
    hub._faults.clear()
    assert done.error == "RuntimeError"
    command = shlex.split(done.message[done.message.index("hf upload") :].splitlines()[0])
    assert command == ["hf", "upload", repo, str(outputs / ".upload"), "."]
    assert all_bytes(outputs / ".upload") == wanted(outputs)
    assert wanted(outputs).items() <= all_bytes(outputs).items()
    if fault in (401, 403):  # no use in trying again
        assert counts(done.requests, "POST", STAGES[stage]) == 1


@pytest.mark.slow
def test_publish_again_sends_only_what_changed(hub, worker, outputs):
    hub.add("tester/again", {})
    first = push(hub, worker, outputs, "tester/again")
    assert counts(first.requests, "PUT", "/lfs/") == 2
    second = push(hub, worker, outputs, "tester/again")
    assert second.error is None and not counts(second.requests, "PUT", "/lfs/")
    assert len(hub.repos["model", "tester/again"].commits) == 3
    (outputs / CARD).write_text("# Another\n")
    third = push(hub, worker, outputs, "tester/again")
    assert third.error is None and not counts(third.requests, "PUT", "/lfs/")
    assert hub.files("tester/again")[CARD] == b"# Another\n"


@pytest.mark.slow
def test_publish_leaves_nothing_of_an_earlier_staging(hub, worker, outputs):
    hub.add("tester/clean", {})
    (outputs / ".upload").mkdir()
    (outputs / ".upload" / "stale.safetensors").write_bytes(b"of an earlier run")
    assert push(hub, worker, outputs, "tester/clean").error is None
    assert set(hub.files("tester/clean")) == {".gitattributes", WEIGHTS, CARD, VIDEO}


def upload(token, repo_id, folder, own, limit):
    with hurried(token):
        train_ltd.upload_checkpoint(repo_id, "checkpoints", Path(folder), own, limit)


@pytest.mark.slow
@pytest.mark.parametrize("fault", [None, 429, 503, "cut"])
def test_old_checkpoints_are_deleted_once_the_new_one_is_there(hub, worker, outputs, fault):
    """Also when the upload of one of them had failed; others stay."""
    repo = f"tester/rolling-{fault}"
    hub.add(repo, {f"checkpoint-{step}/SHA256SUMS": b"" for step in (1, 2, 3, 1000)})
    hub.repos["model", repo].branches["checkpoints"] = hub.repos["model", repo].branches["main"]
    folder = outputs.rename(outputs.with_name("checkpoint-4"))
    if fault:
        hub.fail("/commit/checkpoints", fault, times=2)
    (folder / "SHA256SUMS").write_text("")
    own = [f"checkpoint-{step}" for step in (2, 7, 4)]
    done = worker(upload, token=hub.token, repo_id=repo, folder=str(folder), own=own, limit=1)
    assert done.error is None
    there = {name.split("/")[0] for name in hub.files(repo, "checkpoints")} - {".gitattributes"}
    assert there == {f"checkpoint-{step}" for step in (1, 3, 4, 1000)}


@pytest.mark.slow
def test_nothing_is_deleted_while_the_new_checkpoint_is_not_there(hub, worker, outputs):
    hub.add("tester/refusing", {"checkpoint-2/SHA256SUMS": b""})
    hub.repos["model", "tester/refusing"].branches["checkpoints"] = hub.repos["model", "tester/refusing"].branches[
        "main"
    ]
    hub.fail("/commit/checkpoints", 403)
    folder = outputs.rename(outputs.with_name("checkpoint-4"))
    own = ["checkpoint-2", "checkpoint-4"]
    worker(upload, token=hub.token, repo_id="tester/refusing", folder=str(folder), own=own, limit=1)
    assert "checkpoint-2/SHA256SUMS" in hub.files("tester/refusing", "checkpoints")


def fetch(token, repo_id, output_dir):
    with hurried(token) as slept:
        train_ltd.fetch_checkpoint(repo_id, "checkpoints", output_dir)
    return slept


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["/tree/checkpoints", "HEAD .*/resolve/", "GET .*/resolve/"])
@pytest.mark.parametrize("fault", [429, 503, "cut", "lost"])
def test_fetch_waits_out_passing_faults(hub, worker, tmp_path, stage, fault):
    """The newest that is intact: of checkpoint-3 the upload was cut short, checkpoint-2 is damaged."""
    repo, sums = (
        f"tester/fetch-{stage.split()[0].strip('/').replace('/', '-')}-{fault}",
        hashlib.sha256(b"1").hexdigest(),
    )
    table = f"{sums}  settings.json\n".encode()
    files = {f"checkpoint-{step}/settings.json": b"%d" % step for step in (1, 2, 3)}
    hub.add(repo, files | {f"checkpoint-{step}/SHA256SUMS": table for step in (1, 2)})
    hub.repos["model", repo].branches["checkpoints"] = hub.repos["model", repo].branches["main"]
    hub.fail(stage, fault, times=2)
    done = worker(fetch, token=hub.token, repo_id=repo, output_dir=str(tmp_path))
    assert done.error is None, done.message
    assert (tmp_path / "checkpoint-1/settings.json").read_bytes() == b"1"
    assert not (tmp_path / "checkpoint-3").exists() and not any(fault.times for fault in hub._faults)


@pytest.mark.slow
def test_a_download_that_breaks_off_is_no_checkpoint(hub, worker, tmp_path):
    """Nor is what it leaves taken for one when the Hub is still down at the next start; it is when the Hub is back."""
    table = "".join(f"{hashlib.sha256(name.encode()).hexdigest()}  {name}\n" for name in "abc")
    files = {f"checkpoint-1/{name}": name.encode() for name in "abc"} | {"checkpoint-1/SHA256SUMS": table.encode()}
    hub.add("tester/broken", files)
    hub.repos["model", "tester/broken"].branches["checkpoints"] = hub.repos["model", "tester/broken"].branches["main"]
    hub.fail("/checkpoint-1/b$", 503, times=10_000)
    for _ in range(2):
        done = worker(fetch, token=hub.token, repo_id="tester/broken", output_dir=str(tmp_path))
        assert done.error and not list(tmp_path.glob("checkpoint-*"))
    hub._faults.clear()
    assert worker(fetch, token=hub.token, repo_id="tester/broken", output_dir=str(tmp_path)).error is None
    assert (tmp_path / "checkpoint-1/b").read_bytes() == b"b"


# --- From the Hub into stock diffusers -------------------------------------------------------------------------------


def load_lora(repo_id):
    """What the stock pipeline has after `load_lora_weights`: names, and how far they are from the published file."""
    pipeline = WanPipeline.from_pretrained("team/tiny-wan")
    results = {}
    for name in (WEIGHTS, "run.safetensors"):
        pipeline.load_lora_weights(repo_id, **({} if name == WEIGHTS else {"weight_name": name}))
        loaded = get_peft_model_state_dict(pipeline.transformer, adapter_name=pipeline.get_active_adapters()[0])
        loaded = {f"transformer.{k}": v for k, v in loaded.items()}
        saved = load_file(hf_hub_download(repo_id, WEIGHTS))
        distance = max(float((loaded[k] - v).abs().max()) for k, v in saved.items())
        size = max(float(v.abs().max()) for k, v in saved.items() if "lora_B" in k)
        results[name] = [set(saved) == set(loaded), distance, size]
        pipeline.unload_lora_weights()
    return results


def load_full(repo_id, folder):
    """How far the published weights are from those in the output folder, and those from the base's."""
    names, kwargs = (repo_id, folder, "team/tiny-wan"), {"subfolder": "transformer"}
    models = [WanTransformer3DModel.from_pretrained(name, **kwargs) for name in names]
    published, written, base = [dict(model.named_parameters()) for model in models]
    return [max(float((a[k] - b[k]).abs().max()) for k in b) for a, b in ((published, written), (written, base))]


def run_card(repo_id, folder):
    """Do as a user does: copy the code from the card on the Hub, run it."""
    card = ModelCard.load(repo_id)
    os.chdir(folder)
    exec(compile(code_block(card.content), "README.md", "exec"), {})
    return card.data.to_dict()


@pytest.mark.slow
def test_lora_loads_from_the_hub(worker, second_run):
    done = worker(load_lora, repo_id="tester/my-lora")
    assert done.error is None, done.message
    for same_keys, distance, size in done.result.values():
        assert same_keys and distance < 1e-6 and size > 1e-3


@pytest.mark.slow
def test_full_weights_load_from_the_hub(worker, full_run):
    done = worker(load_full, repo_id="tester/my-wan", folder=str(full_run.folder))
    assert done.error is None, done.message
    assert done.result[0] == 0 and done.result[1] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("repo", ["tester/my-lora", "tester/my-wan"])
def test_code_of_the_card_runs(worker, second_run, full_run, tmp_path, repo):
    done = worker(run_card, repo_id=repo, folder=str(tmp_path))
    assert done.error is None, f"{done.error}: {done.message}"
    assert done.result["pipeline_tag"] == "text-to-video"
    with av.open(str(tmp_path / "output.mp4")) as video:
        frames = list(video.decode(video=0))
        assert (len(frames), frames[0].width, frames[0].height) == (9, 48, 32)
        assert video.streams.video[0].average_rate == 16 and video.streams.video[0].codec_context.name == "h264"


def check_other_transformer(repo_id):
    flags = ["--pretrained_model_name_or_path=team/tiny-wan", f"--transformer_path={repo_id}", "--rank=4"]
    args = train_ltd.parse_args([*flags, "--dataset_name=team/clips", "--report_to=none"])
    train_ltd.load_transformer(args, train_ltd.identify_wan(args))


@pytest.mark.slow
def test_published_transformer_can_be_trained_further(worker, full_run):
    """`--transformer_path` takes a repository that this very script has published."""
    done = worker(check_other_transformer, repo_id="tester/my-wan")
    assert done.error is None, done.message


@pytest.mark.slow
def test_published_lora_can_be_trained_further(worker, second_run):
    done = worker(read_published_lora, repo_id="tester/my-lora")
    assert done.error is None, done.message
    assert done.result == [4, 4]


def read_published_lora(repo_id):
    transformer = WanTransformer3DModel.from_pretrained("team/tiny-wan", subfolder="transformer")
    layer = train_ltd.read_lora(repo_id, transformer)["blocks.0.attn1.to_q"]
    return [len(layer.down), layer.alpha]


# --- What is refused at the start, and what a failing push says ------------------------------------------------------


@pytest.mark.slow
def test_a_card_that_the_hub_would_refuse_ends_the_run_at_once(hub, worker, tmp_path):
    done = worker(create, token=hub.token, name="tester/licensed", more=["--license=CC BY-NC 4.0"])
    assert done.error == "ValueError"
    assert "the Hub refuses the card" in done.message and "--license" in done.message


def push_a_checkpoint(token, repo_id):
    for name in (train_ltd.SUMS_FILE, "settings.json"):
        huggingface_hub.upload_file(
            path_or_fileobj=b"{}",
            path_in_repo=f"checkpoint-7/{name}",
            repo_id=repo_id,
            revision=train_ltd.CHECKPOINT_BRANCH,
        )


@pytest.mark.slow
def test_checkpoints_of_another_run_are_an_error_at_the_start(hub, worker, tmp_path):
    """And a run that resumes knows its own: those that its checkpoint has pushed."""
    done = worker(create, token=hub.token, name="tester/taken", more=["--push_checkpoints_to_hub"])
    assert done.error is None, done.message
    done = worker(push_a_checkpoint, token=hub.token, repo_id="tester/taken")
    assert done.error is None, done.message
    done = worker(create, token=hub.token, name="tester/taken", more=["--push_checkpoints_to_hub"])
    assert done.error == "ValueError"
    for part in ("has checkpoint-7 of another run", "--resume_from_checkpoint hub", "--hub_model_id"):
        assert part in done.message
    done = worker(
        create,
        token=hub.token,
        name="tester/taken",
        more=["--push_checkpoints_to_hub", "--resume_from_checkpoint=hub"],
    )
    assert done.error is None, done.message


@pytest.mark.parametrize("error", [ValueError("odd JSON"), KeyError("commitUrl"), RuntimeError("200 with HTML")])
def test_whatever_a_push_dies_of_the_command_is_printed(monkeypatch, flags, tmp_path, error):
    args = train_ltd.parse_args(flags())
    (tmp_path / "run").mkdir()
    (tmp_path / "run/README.md").write_text("a card")

    def fail(**kwargs):
        raise error

    monkeypatch.setattr(train_ltd.huggingface_hub, "upload_folder", fail)
    monkeypatch.setattr(train_ltd.time, "sleep", lambda seconds: None)
    with pytest.raises(RuntimeError, match="Nothing is lost; type: hf upload tester/run"):
        train_ltd.publish(args, "tester/run", [tmp_path / "run/README.md"])
    assert (tmp_path / "run/.upload/README.md").read_text() == "a card"


def test_scores_in_a_card_stay_with_their_weights(run):
    """They are kept when the card of the same weights is written again, and not when training goes on."""
    folder = run(max_train_steps=2, checkpointing_steps=1, lr_scheduler="constant")
    card = ModelCard.load(folder / "README.md")
    card.data.model_name = "run"
    score = EvalResult(
        task_type="text-to-video",
        dataset_type="VBench",
        dataset_name="VBench",
        metric_type="dynamic degree",
        metric_value=0.5,
    )
    card.data.eval_results = [score]
    card.save(folder / "README.md")
    run(max_train_steps=2, lr_scheduler="constant", resume_from_checkpoint="latest")
    (result,) = ModelCard.load(folder / "README.md").data.eval_results
    assert (result.dataset_name, result.metric_value) == ("VBench", 0.5)
    run(max_train_steps=3, lr_scheduler="constant", resume_from_checkpoint="latest")
    assert ModelCard.load(folder / "README.md").data.eval_results is None


def test_results_of_a_finished_run_are_not_overwritten_unasked(run):
    folder = run()
    for checkpoint in train_ltd.list_checkpoints(folder):
        train_ltd.remove_checkpoint(checkpoint)
    before = (folder / "README.md").read_bytes()
    with pytest.raises(ValueError, match="holds the results of a finished run"):
        run(max_train_steps=1)
    assert (folder / "README.md").read_bytes() == before
    run(max_train_steps=1, overwrite_output_dir=True)


def test_no_absolute_path_of_a_split_is_published(flags, tmp_path):
    args = train_ltd.parse_args(flags(validation_split=str(tmp_path / "held_out")))
    assert train_ltd.published_settings(args)["validation_split"] == "held_out"


# --- Two experts, one repository -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts_run(hub, train_soon, tmp_path_factory, tiny_experts):
    """The low expert's run, then the high one's, into one repository, with checkpoints; the same names otherwise."""
    root = tmp_path_factory.mktemp("experts")
    hub.add("team/tiny-experts", all_bytes(tiny_experts))
    common = [
        "--pretrained_model_name_or_path=team/tiny-experts",
        "--rank=4",
        "--output_name=dog",
        "--hub_model_id=tester/dog",
        "--push_checkpoints_to_hub",
        "--checkpoints_total_limit=1",
        "--checkpointing_steps=1",
        "--max_train_steps=2",
        "--validation_prompt=a square",
        "--report_to=none",
    ]
    for expert in ("low", "high"):
        done = train_soon(root, *common, f"--expert={expert}", f"--output_dir={expert}")
        assert done.returncode == 0, done.stderr
    return SimpleNamespace(hub=hub, root=root, files=hub.files("tester/dog"))


@pytest.mark.slow
def test_experts_keep_each_others_files_and_checkpoints(experts_run):
    expected = {".gitattributes", "README.md"}
    for expert in ("high", "low"):
        expected |= {
            f"pytorch_lora_weights_{expert}_noise.safetensors",
            f"dog_{expert}_noise.safetensors",
            f"{expert}_noise/samples/step-000002-0-a-square.mp4",
            f"{expert}_noise/curves.png",
            f"{expert}_noise/training_settings.json",
        }
        branch = experts_run.hub.files("tester/dog", f"checkpoints-{expert}")
        # A branch begins as a copy of main; of checkpoints it has the newest of its own run.
        assert {name.split("/")[0] for name in branch if name.startswith("checkpoint")} == {"checkpoint-2"}
        settings = json.loads(branch["checkpoint-2/settings.json"])["settings"]
        assert settings["flags"]["expert"] == expert
    assert set(experts_run.files) == expected


@pytest.mark.slow
def test_card_of_two_experts_has_the_code_that_loads_both(experts_run, tiny_experts, tmp_path, monkeypatch):
    card = experts_run.files["README.md"].decode()
    code = code_block(card)
    assert 'weight_name="pytorch_lora_weights_high_noise.safetensors"' in code
    assert 'weight_name="pytorch_lora_weights_low_noise.safetensors", load_into_transformer_2=True' in code
    assert "`low_noise/` has the other's settings" in card
    for link in re.findall(r"!\[.*?\]\((.*?)\)", card):
        assert link in experts_run.files
    # Run where base and weights go by the names in it.
    for name, content in experts_run.files.items():
        path = tmp_path / "tester/dog" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (tmp_path / "team").mkdir()
    (tmp_path / "team/tiny-experts").symlink_to(tiny_experts)
    monkeypatch.chdir(tmp_path)
    loaded = {}
    exec(compile(code, "README.md", "exec"), loaded)
    for model in (loaded["pipe"].transformer, loaded["pipe"].transformer_2):
        weights = get_peft_model_state_dict(model, adapter_name=next(iter(model.peft_config)))
        assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.slow
def test_expert_resumes_from_its_own_branch(experts_run, train_soon):
    """And the other one's checkpoints are no error."""
    flags = ["--rank=4", "--output_name=dog", "--hub_model_id=tester/dog", "--push_checkpoints_to_hub"]
    flags += ["--expert=low", "--output_dir=again", "--resume_from_checkpoint=hub", "--max_train_steps=3"]
    flags += ["--checkpointing_steps=1", "--report_to=none"]
    flags += ["--pretrained_model_name_or_path=team/tiny-experts"]
    done = train_soon(experts_run.root, *flags)
    assert done.returncode == 0, done.stderr
    assert "resumed again/checkpoint-2, step 2" in done.stderr
    branch = experts_run.hub.files("tester/dog", "checkpoints-high")
    assert {name.split("/")[0] for name in branch if name.startswith("checkpoint")} == {"checkpoint-2"}
