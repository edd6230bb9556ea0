"""The page of a run's samples: which video is of which prompt and step, and what a real browser shows of it."""

import json
import re

import gallery
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from videos import write_video

pytest_plugins = ["browser"]

PROMPTS = ["a dog jumps", "a <b>bold</b> cat & dog", "a café, 2 cups"]
SETTINGS = {
    "train_type": "lora",
    "rank": 16,
    "pretrained_model_name_or_path": "wan-nano",
    "max_train_steps": 50,
    "loss": "ltd",
    "validation_prompt": PROMPTS,
}


def write_sample(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.full((9, 32, 48, 3), level, np.uint8)
    frames[:, 8:24, 8:24] = 250
    write_video(frames, path, 16)


def make_run(folder, names, steps=(0, 50), settings=SETTINGS):
    """A folder of results: for each name a sample a step, gray by its number and step."""
    for number, name in enumerate(names):
        for step in steps:
            write_sample(folder / "samples" / f"step-{step:06d}-{name}.mp4", 20 + 40 * number + step)
    if settings:
        (folder / "training_settings.json").write_text(json.dumps(settings))
    Image.new("RGB", (80, 40), "white").save(folder / "curves.png")
    return folder


def write_metrics(folder):
    rows = [{"step": 0, "val/mse": 0.28}, {"step": 25, "loss": 1.0}, {"step": 50, "val/mse": 0.17}]
    lines = [json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 60, "va']))


@pytest.mark.parametrize(
    "names",
    [
        ["0", "1", "2"],
        ["a-dog-jumps", "a-b-bold-b-cat-dog", "a-café-2-cups"],
        ["a-dog", "a-b-bold-b", "a-café-2"],  # cut to a length
        ["a-dog-jumps-0", "a-b-bold-b-cat-dog-1", "a-café-2-cups-2"],
        ["a dog jumps", "a _b_bold__b_ cat & dog", "a café, 2 cups"],
    ],
)
def test_samples_are_told_by_number_or_by_words(tmp_path, names):
    run = make_run(tmp_path, names)
    samples = gallery.find_samples(run)
    found = {name: gallery.prompt_of(name, PROMPTS, {}) for name in samples.videos}
    assert found == dict(zip(names, PROMPTS, strict=True))
    assert all(list(steps) == [0, 50] for steps in samples.videos.values())
    text = gallery.build_samples_page(run).read_text(encoding="utf-8")
    assert re.findall("<h3>(.*)</h3>", text) == [
        "a dog jumps",
        "a &lt;b&gt;bold&lt;/b&gt; cat &amp; dog",
        "a café, 2 cups",
    ]


def test_the_card_says_which_prompt_a_sample_is_of(tmp_path):
    run = make_run(tmp_path, ["x1", "y2"], settings=SETTINGS | {"validation_prompt": []})
    widget = [{"text": text, "output": {"url": f"samples/step-000050-{name}.mp4"}} for text, name in
              zip(PROMPTS, ["y2", "x1"], strict=False)]  # fmt: skip
    widget += [{"text": "by hand"}, {"output": {"url": "step-000050-x1.mp4"}}]
    (run / "README.md").write_text(f"---\nwidget: {json.dumps(widget)}\n---\n# my_lora\n")
    text = gallery.build_samples_page(run).read_text(encoding="utf-8")
    assert re.findall("<h3>(.*)</h3>", text) == ["a &lt;b&gt;bold&lt;/b&gt; cat &amp; dog", "a dog jumps"]


def test_a_run_that_goes_on_has_a_page_too(tmp_path):
    """Its settings and curves come at its end, and the first steps may be all there is."""
    run = make_run(tmp_path, ["a-dog-jumps", "b"], steps=(0,), settings=None)
    (run / "curves.png").unlink()
    write_sample(run / "samples" / ".partial-step-000050-b.mp4", 0)
    text = gallery.build_samples_page(run).read_text(encoding="utf-8")
    assert re.findall("<h3>(.*)</h3>", text) == ["a dog jumps", "b"]
    assert text.count("before training (step 0)") == 2 and "after step" not in text and "curves.png" not in text


def test_a_folder_without_samples_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"holds no videos step-\*\.mp4; was --validation_prompt given"):
        gallery.main(gallery.parse_args([str(tmp_path)]))
    assert list(tmp_path.iterdir()) == []
    (make_run(tmp_path, ["0"], steps=(0,)) / "training_settings.json").write_text("{")
    with pytest.raises(ValueError, match=r"training_settings\.json is no JSON"):
        gallery.main(gallery.parse_args([str(tmp_path)]))


def test_both_experts_stand_on_one_page(tmp_path):
    for name in ("high_noise", "low_noise"):
        make_run(tmp_path / name, ["0"])
    text = gallery.build_samples_page(tmp_path).read_text(encoding="utf-8")
    assert text.index("expert for high noise") < text.index("high_noise/samples/step-000000-0.mp4")
    assert text.index("expert for low noise") < text.index("low_noise/samples/step-000000-0.mp4")
    assert "high_noise/curves.png" in text and "low_noise/curves.png" in text


@pytest.mark.slow
def test_the_map_is_drawn_from_the_cache(tmp_path):
    run = make_run(tmp_path, ["0"])
    (run / "cache" / "latents").mkdir(parents=True)
    latents = torch.randn(16, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    save_file({"latents": latents}, run / "cache" / "latents" / "a.safetensors")
    text = gallery.build_samples_page(run).read_text(encoding="utf-8")
    assert "Where LTD sees motion" in text and (run / "ltd_maps.mp4").is_file() and (run / "ltd_maps.jpg").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("width", "columns"), [(1280, 4), (390, 2)])
def test_the_page_in_a_browser(chromium, tmp_path, width, columns):
    """Step 0 first, prompts as text, videos that play together, nothing cut off and nothing asked of a network."""
    run = make_run(tmp_path / "my lora, 50% #1", ["0", "1", "2"], steps=(0, 25, 50, 100))
    write_metrics(run)
    write_sample(run / "ltd_maps.mp4", 90)
    page_file = gallery.build_samples_page(run, ["Turned by <i>339</i> degrees."])
    page, problems = chromium.new_page(viewport={"width": width, "height": 800}), []
    page.set_default_timeout(180_000)  # the machine may be busy
    page.on("pageerror", lambda error: problems.append(error))
    page.on("requestfailed", lambda request: problems.append(request.url))
    page.on("request", lambda request: request.url.startswith("file:") or problems.append(request.url))
    page.goto(page_file.as_uri())
    assert page.locator("h3").all_text_contents() == PROMPTS and page.locator("h3 b, li i").count() == 0
    facts = page.locator("li").all_text_contents()
    assert [fact.strip() for fact in facts] == [
        "Turned by <i>339</i> degrees.",
        "Trained: a LoRA of rank 16 of wan-nano, 50 steps, loss ltd.",
        "Error on clips that training never saw: 0.280 at step 0, 0.170 at step 50.",
    ]
    row = page.locator(".steps").first
    assert row.locator("figcaption").all_text_contents() == [
        "before training (step 0)",
        "after step 25",
        "after step 50",
        "after step 100",
    ]
    tops = row.locator("video").evaluate_all("videos => videos.map(v => Math.round(v.getBoundingClientRect().top))")
    assert tops.count(tops[0]) == columns
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for i in (0, 11, 12):
        video = page.locator("video").nth(i)
        video.scroll_into_view_if_needed()
        page.wait_for_function("i => document.querySelectorAll('video')[i].played.length > 0", arg=i)
        assert video.evaluate("v => [v.videoWidth, v.videoHeight, v.error]") == [48, 32, None]
    posters = page.locator("video").evaluate_all("videos => videos.map(v => v.poster)")
    assert len(set(posters)) == 13 and all(poster.endswith(".jpg") for poster in posters)
    page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth === 80)")
    assert not problems
    page.close()
