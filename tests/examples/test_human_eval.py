"""The blind study: what is built, what a real browser lets annotators do and see, what is gathered, what comes out."""

import csv
import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import av
import numpy as np
import pytest
from human_eval import analyse, build, collect
from human_eval.analyse import NEITHER

pytest_plugins = ["browser"]

SCRIPTS = Path(__file__).resolve().parents[2] / "examples" / "human_eval"
LABELS = ["ModelOfOld", "ModelOfNew"]
FRAMES, FPS = 8, 16  # half a second


def write_video(path, level=80, frames=FRAMES, height=48, width=64, fps=FPS, codec="libx264", title=None):
    """A bright square that moves over a ground of gray `level`."""
    with av.open(str(path), "w") as container:
        container.metadata["title"] = title or ""
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            picture = np.full((height, width, 3), level, np.uint8)
            picture[8:24, 2 * index : 2 * index + 16] = 220
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


def write_results(folder, count=4, offset=0, **kwargs):
    """A folder as generate.py leaves it: `count` videos and generation.json. Each pair and model has its own gray."""
    folder.mkdir()
    videos = {}
    for number in range(count):
        name = f"a square, number {number}-0.mp4"
        write_video(folder / name, level=40 + 10 * number + offset, title=folder.name, **kwargs)
        videos[name] = {"prompt": f"a square, number {number} <b>", "text": "", "sample": 0, "seed": number}
    settings = {"lora": folder.name, "steps": 50}
    (folder / "generation.json").write_text(json.dumps({"settings": settings, "versions": {}, "videos": videos}))
    return folder


@pytest.fixture
def results(tmp_path):
    """Two models' folders, four pairs."""
    return [write_results(tmp_path / label, offset=5 * index) for index, label in enumerate(LABELS)]


def build_study(folders, output_dir, *flags):
    build.main(build.parse_args([*map(str, folders), "--output_dir", str(output_dir), *flags]))
    key_path = output_dir.with_name(f"{output_dir.name}_key.json")
    return collect.read_study(output_dir), json.loads(key_path.read_text(encoding="utf-8"))


@pytest.fixture
def study(results, tmp_path):
    """Folder, page data and key of a study of three pairs, one more to practise on, one seen twice."""
    folder = tmp_path / "study"
    return folder, *build_study(results, folder, "--practice", "1", "--repeats", "1")


# ------------------------------------------------------------------------------------------------------------- build


def boxes(path):
    """Type and size of the outermost boxes of an mp4 file."""
    data, found = path.read_bytes(), []
    while data:
        size = int.from_bytes(data[:4], "big")
        found.append((data[4:8].decode(), size))
        data = data[size:]
    return found


def test_build_hides_the_models(study, results):
    folder, page, key = study
    assert sorted(path.name for path in folder.iterdir()) == ["clips", "index.html"]
    clips = {clip: name for pair in key["pairs"].values() for name, clip in pair["clips"].items()}
    assert {f"{clip}.mp4" for clip in clips} == {path.name for path in (folder / "clips").iterdir()}
    assert len(clips) == 8 and all(len(clip) == 16 and set(clip) <= set("0123456789abcdef") for clip in clips)
    for path in folder.rglob("*.*"):
        content = path.read_bytes()
        assert not any(label.encode() in content for label in LABELS), path
        assert b"a square, number 0-0" not in content, path
    for pair in page["practice"] + page["pairs"]:
        files = [(folder / "clips" / f"{clip}.mp4").stat() for clip in pair["clips"]]
        assert files[0].st_size == files[1].st_size and files[0].st_mtime == files[1].st_mtime
    assert (folder.with_name("study_key.json").stat().st_mode & 0o777) == 0o600


def test_clips_are_the_models_pictures_in_h264(study, results):
    folder, _, key = study
    for pair in key["pairs"].values():
        for label, source in zip(LABELS, results, strict=True):
            path = folder / "clips" / f"{pair['clips'][label]}.mp4"
            with av.open(str(path)) as made, av.open(str(source / pair["file_name"])) as original:
                assert {key: value for key, value in made.metadata.items() if key in ("title", "comment")} == {}
                assert [stream.type for stream in made.streams] == ["video"]
                stream = made.streams.video[0]
                assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
                assert (stream.frames, stream.average_rate) == (FRAMES, FPS)
                pictures = [
                    np.stack([frame.to_ndarray(format="gray") for frame in container.decode(video=0)]).astype(float)
                    for container in (made, original)
                ]
            assert np.abs(pictures[0] - pictures[1]).mean() < 2
        assert boxes(path)[-1][0] == "free" and [kind for kind, _ in boxes(path)].index("moov") < 3


def test_each_model_comes_first_in_half_of_the_page_list(results, tmp_path):
    page, key = build_study(results, tmp_path / "s", "--practice", "0", "--repeats", "0")
    orders = [pair["clips"][0] == key["pairs"][pair["pair"]]["clips"][LABELS[0]] for pair in page["pairs"]]
    assert orders[0] != orders[1] and orders[2] != orders[3]
    assert [key["pairs"][pair["pair"]]["prompt"] for pair in page["pairs"]] == [p["prompt"] for p in page["pairs"]]
    assert sorted(pair["seed"] for pair in key["pairs"].values()) == [0, 1, 2, 3]


def spoil(folders, fault):
    """Bring a fault into a result folder, and return what the refusal must name."""
    name = "a square, number 1-0.mp4"
    path = folders[1] / name
    if fault == "unpaired":
        path.rename(folders[1] / "other.mp4")
        return [f"{name}: in", "other.mp4: in"]
    if fault == "no video":
        path.write_text("not a video")
        return [f"{name}: cannot be played"]
    if fault == "cut off":
        with (
            av.open(str(folders[0] / name)) as reader,
            av.open(str(path), "w", options={"movflags": "faststart"}) as out,
        ):
            stream = out.add_stream_from_template(reader.streams.video[0])
            for packet in reader.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    out.mux(packet)
        path.write_bytes(path.read_bytes()[:-60])
        return [f"{name}: "]
    if fault in ("prompt", "seed"):
        record = json.loads((folders[1] / "generation.json").read_text())
        record["videos"][name][fault] = "another"
        (folders[1] / "generation.json").write_text(json.dumps(record))
        return [f"{name}: {fault} ", "'another'"]
    write_video(path, **{fault: {"frames": 6, "height": 32, "width": 32, "fps": 8}[fault]})
    return [f"{name}: {fault} "]


@pytest.mark.parametrize(
    "fault", ["unpaired", "no video", "cut off", "prompt", "seed", "frames", "height", "width", "fps"]
)
def test_build_refuses_by_name_and_leaves_nothing(results, tmp_path, fault):
    named = spoil(results, fault)
    with pytest.raises(SystemExit) as refusal:
        build_study(results, tmp_path / "study", "--practice", "1")
    assert [text for text in named if text not in str(refusal.value)] == []
    assert "number 2" not in str(refusal.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(LABELS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--practice", "4"], "--practice 4"),
        (["--practice", "1", "--repeats", "2"], "--repeats 2"),
        (["--num_pairs", "9"], "--num_pairs 9"),
        (["--labels", "same", "same"], "--labels"),
        (["--key", "{tmp}/study/key.json"], "--key"),
        (["--prompts", "{tmp}/prompts.json"], "--prompts"),
    ],
)
def test_build_refuses_impossible_flags(results, tmp_path, flags, message):
    (tmp_path / "prompts.json").write_text("[1, 2]")
    with pytest.raises(SystemExit, match=message):
        build_study(results, tmp_path / "study", *(flag.replace("{tmp}", str(tmp_path)) for flag in flags))
    assert not (tmp_path / "study").exists() and not (tmp_path / "study_key.json").exists()


def test_odd_folders_are_pointed_out(results, tmp_path, capsys):
    for folder in results:
        (folder / "a square, number 3-0.mp4").unlink()
    (results[1] / "generation.json").unlink()
    build_study(results, tmp_path / "study", "--practice", "0")
    printed = capsys.readouterr().out
    assert f"1 of {results[0] / 'generation.json'} are not there yet: a square, number 3-0.mp4" in printed
    assert "different settings: lora, steps" in printed and "seeds" in printed


def test_a_study_is_never_overwritten(study, results):
    folder, _, key = study
    with pytest.raises(SystemExit, match="never overwritten"):
        build_study(results, folder)
    assert json.loads(folder.with_name("study_key.json").read_text()) == key


def test_prompts_can_come_from_a_file_and_equal_videos_are_reported(results, tmp_path, capsys):
    for folder in results:
        (folder / "generation.json").unlink()
    names = sorted(path.name for path in results[0].iterdir())
    (results[1] / names[0]).write_bytes((results[0] / names[0]).read_bytes())
    with pytest.raises(SystemExit, match="--prompts"):
        build_study(results, tmp_path / "study")
    (tmp_path / "p.json").write_text(json.dumps({name: f"prompt of {name}" for name in names}))
    rows = [json.dumps({"file_name": name, "text": f"prompt of {name}"}) for name in names]
    (tmp_path / "p.jsonl").write_text("\n".join(rows))
    for kind in ("json", "jsonl"):
        capsys.readouterr()
        _, key = build_study(results, tmp_path / kind, "--prompts", str(tmp_path / f"p.{kind}"), "--num_pairs", "4")
        assert {pair["prompt"] for pair in key["pairs"].values()} == {f"prompt of {name}" for name in names}
        printed = capsys.readouterr().out
        assert f"same in 1 pair(s): {names[0]}" in printed and "seeds" in printed


# -------------------------------------------------------------------------------------------------------------- page


class Annotator:
    """Somebody at the page, who prefers the models that `answers` says: file name -> label or `indistinguishable`."""

    def __init__(self, chromium, address, name, key, answers, **context):
        self.context = chromium.new_context(accept_downloads=True, **context)
        self.context.add_init_script("window.plays = 0; document.addEventListener('play', () => window.plays++, true)")
        self.page = self.context.new_page()
        self.page.set_default_timeout(180_000)  # the machine may be busy
        self.requests, self.errors = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.name, self.key, self.answers, self.seen = name, key, answers, []
        self.page.goto(f"{address}?annotator={name}&synthetic")

    def enter(self):
        """Start, and wait for a pair or the end: the page asks for a receiver of votes before it shows them."""
        self.page.click("text=Start or go on")
        self.page.wait_for_function("!byId('task').hidden || !byId('end').hidden")

    def shown(self):
        """The pair on the screen: its key entry and the labels of the left and the right clip."""
        sources = [self.page.get_attribute(f"#{side}", "src") for side in ("left", "right")]
        clips = [source.removeprefix("clips/").removesuffix(".mp4") for source in sources]
        pair = next(pair for pair in self.key["pairs"].values() if set(clips) == set(pair["clips"].values()))
        models = {clip: label for label, clip in pair["clips"].items()}
        return pair, [models[clip] for clip in clips]

    def unlocked(self):
        return [self.page.is_enabled(f"[data-choice={choice}]") for choice in collect.CHOICES]

    def play(self, act, *numbers):
        """
        Have the sides of these numbers played to their ends by `act`. On a busy machine the page may see a clip end
        early by the clock, and then wants it to be watched again.
        """
        for _ in range(20):
            plays = self.page.evaluate("plays")
            act()
            self.page.wait_for_function("before => plays > before", arg=plays)  # a tap may arrive later
            ended = "numbers => numbers.every(n => sides[n].watched || sides[n].video.paused)"
            self.page.wait_for_function(ended, arg=numbers)
            if self.page.evaluate("numbers => numbers.every(n => sides[n].watched)", numbers):
                return
        raise AssertionError("the page never takes the clips as watched")

    def watch(self):
        assert self.unlocked() == [False] * 3
        self.play(lambda: self.page.keyboard.press("Space"), 0, 1)
        assert self.unlocked() == [True] * 3

    def vote(self, reasons=()):
        """Watch and vote by keyboard, as `answers` says."""
        pair, models = self.shown()
        self.watch()
        answer = self.answers[pair["file_name"]]
        self.page.keyboard.press("2" if answer == NEITHER else "13"[models.index(answer)])
        for reason in reasons:
            self.page.check(f"#reasons input[value='{reason}']")
        self.seen.append((pair["file_name"], models))
        item = self.page.evaluate("item.key")
        self.page.keyboard.press("Enter")
        self.page.wait_for_function("key => votes.has(key) && localStorage.getItem(key)", arg=item)

    def vote_all(self):
        self.enter()
        while not self.page.is_visible("#end"):
            self.vote()

    def stored(self):
        return self.page.evaluate("localStorage.length")

    def export(self, folder):
        with self.page.expect_download() as download:
            self.page.click("text=Download my votes")
        path = folder / download.value.suggested_filename
        download.value.save_as(path)
        return path


def file_names(key, practice):
    return sorted(pair["file_name"] for pair in key["pairs"].values() if pair["practice"] == practice)


def test_two_annotators_vote_and_the_known_ratios_come_out(chromium, study, tmp_path):
    """Three pairs from the disk: one annotator votes new, old, indistinguishable, the other new on all three."""
    folder, page, key = study
    counted, practice = file_names(key, False), file_names(key, True)
    choices = [dict(zip(counted, [LABELS[1], LABELS[0], NEITHER], strict=True)), dict.fromkeys(counted, LABELS[1])]
    paths, people = [], []
    for name, answers in zip(("anna", "Ben"), choices, strict=True):
        answers |= dict.fromkeys(practice, LABELS[0])
        someone = Annotator(chromium, (folder / "index.html").as_uri(), name, key, answers)
        someone.vote_all()
        paths.append(someone.export(tmp_path))
        people.append(someone)
        state = someone.page.content() + json.dumps(someone.context.storage_state())
        state += someone.page.evaluate("JSON.stringify(Object.entries(localStorage))")
        for hidden in (*LABELS, *counted, *practice):
            assert hidden not in state and not any(hidden in url for url in someone.requests)
        assert all(url.startswith((folder.as_uri(), "blob:")) for url in someone.requests) and someone.errors == []
        someone.context.close()

    votes = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    # The one that comes back was seen first of three, so it comes after the third.
    assert [vote["kind"] for vote in votes] == ["practice", "main", "main", "main", "repeat"] * 2
    for vote in votes:
        assert vote["synthetic"] is True and vote["seconds_to_vote"] >= vote["seconds_to_unlock"] >= 0.9 * FRAMES / FPS
        collect.check_vote(vote, page)
    report_dir = tmp_path / "report"
    command = ["--key", f"{folder}_key.json", "--votes", *paths, "--output_dir", report_dir, "--min_votes", "2"]
    analyse.main(analyse.parse_args([str(part) for part in command]))
    report = json.loads((report_dir / "report.json").read_text())
    assert report["synthetic"] is True and report["pairs"] == 3
    third = pytest.approx(100 / 3)
    assert report["annotators"]["anna"]["percent"] == {LABELS[0]: third, LABELS[1]: third, NEITHER: third}
    assert report["annotators"]["ben"]["percent"] == {LABELS[0]: 0, LABELS[1]: 100, NEITHER: 0}
    # Both say new on one pair; on the others they differ, so nothing has a majority of two.
    assert report["majority"]["counts"] == {LABELS[0]: 0, LABELS[1]: 1, NEITHER: 2}
    assert report["majority"]["without_majority"] == 2
    assert report["self_consistency"] == {"same": 2, "repeats": 2}
    for someone in people:
        shown = dict(someone.seen[1:])
        assert len(shown) == 3 and someone.seen[0][0] in practice
        twice = [models for name, models in someone.seen if [n for n, _ in someone.seen].count(name) == 2]
        assert len(twice) == 2 and twice[0] == twice[1][::-1]


def orders(page, names):
    """The schedules of annotators, computed by the page: lists of `[kind, pair, left]`."""
    script = "names => names.map(name => { annotator = name; return schedule().map(i => [i.kind, i.pair, i.left]); })"
    return page.evaluate(script, names)


def test_order_and_sides_of_460_pairs(chromium, tmp_path):
    """Every annotator has an order of their own, the same each time; each model is left in half of the pairs."""
    pairs = {
        f"{n}.mp4": {"prompt": f"prompt {n}", "seed": n, "clips": [f"{2 * n:016x}", f"{2 * n + 1:016x}"]}
        for n in range(463)
    }
    study, key = build.make_study(pairs, LABELS, practice=3, repeats=23)
    folder = tmp_path / "study"
    folder.mkdir()
    build.write_page(study, folder)
    page = chromium.new_page()
    page.set_default_timeout(180_000)  # the machine may be busy
    page.goto((folder / "index.html").as_uri())
    names = [f"annotator{n}" for n in range(10)]
    schedules = orders(page, names)
    page.reload()
    assert orders(page, names) == schedules
    assert len({json.dumps(schedule) for schedule in schedules}) == 10
    for schedule in schedules:
        assert [kind for kind, *_ in schedule[:3]] == ["practice"] * 3
        counted = [item for item in schedule if item[0] == "main"]
        assert {pair for _, pair, _ in counted} == {p["pair"] for p in study["pairs"]} and len(counted) == 460
        first = sum(key["pairs"][pair]["clips"][LABELS[0]] == left for _, pair, left in counted)
        assert first == 230
        position = {(kind, pair): index for index, (kind, pair, _) in enumerate(schedule)}
        left = {(kind, pair): left for kind, pair, left in schedule}
        repeats = [pair for kind, pair, _ in schedule if kind == "repeat"]
        assert len(set(repeats)) == 23
        for pair in repeats:
            assert position["repeat", pair] - position["main", pair] >= 230
            assert left["repeat", pair] != left["main", pair]
    lefts = [{pair: left for kind, pair, left in schedule if kind == "main"} for schedule in schedules]
    for other in lefts[1:]:  # sides are drawn for each annotator
        assert 0.3 < np.mean([other[pair] == left for pair, left in lefts[0].items()]) < 0.7
    page.close()


def test_buttons_stay_locked_until_both_were_watched_in_full(chromium, study):
    """Neither one video, nor a jump, nor speed, nor made-up events unlock; then buttons, touch and keys work."""
    folder, _, key = study
    context = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "is_mobile": True}
    someone = Annotator(chromium, (folder / "index.html").as_uri(), "a1", key, {}, **context)
    page = someone.page
    assert someone.stored() == 0
    page.tap("text=Start or go on")
    page.wait_for_function("[...document.querySelectorAll('video')].every(v => v.readyState > 2)")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing is cut off on a phone
    assert page.inner_text("#choices").count("Top") == 1 and "Left" not in page.inner_text("#choices")
    box = page.locator("#choices button").first.bounding_box()
    assert box["height"] >= 44

    page.keyboard.press("1")
    page.keyboard.press("Enter")
    assert someone.unlocked() == [False] * 3 and someone.stored() == 0

    someone.play(lambda: page.tap("#left"), 0)  # this one alone
    assert someone.unlocked() == [False] * 3

    jumps = "document.getElementById('right').currentTime = document.getElementById('right').duration - 0.05"
    page.evaluate(jumps)
    page.wait_for_selector("#notice:visible")
    page.wait_for_function("document.getElementById('right').readyState > 2")
    page.evaluate(f"document.getElementById('right').play(); {jumps}")  # while it plays, before it can have ended
    page.wait_for_function("document.getElementById('right').currentTime === 0")
    assert someone.unlocked() == [False] * 3

    page.evaluate("document.getElementById('right').playbackRate = 1.1")
    page.wait_for_function("document.getElementById('right').playbackRate === 1")
    page.evaluate("const stopped = performance.now(); performance.now = () => stopped")  # however slow the machine is
    page.evaluate("sides[1].video.onratechange = null; sides[1].video.playbackRate = 16; sides[1].video.play()")
    page.wait_for_function("document.getElementById('right').playbackRate === 1")  # the clock shows it at the end
    page.evaluate("delete performance.now")
    page.evaluate("document.getElementById('right').dispatchEvent(new Event('ended'))")
    assert someone.unlocked() == [False] * 3
    page.evaluate("[...document.querySelectorAll('[data-choice]')].forEach(b => b.click())")
    page.evaluate("choose('left'); vote()")
    assert someone.stored() == 0

    page.wait_for_function("document.getElementById('right').readyState > 2")
    someone.play(lambda: page.tap("#right"), 1)
    assert someone.unlocked() == [True] * 3
    # Now they may look again as they like.
    page.evaluate("new Promise(done => { sides[1].video.onseeked = done; sides[1].video.currentTime = 0.1; })")
    assert someone.unlocked() == [True] * 3
    assert page.is_disabled("#next")
    page.tap("[data-choice=indistinguishable]")
    assert page.is_disabled("#reasons input >> nth=0") and page.is_enabled("#next")
    page.tap("[data-choice=right]")
    page.tap("text=motion >> nth=-1")
    page.tap("#next")
    page.wait_for_function("localStorage.length === 1")
    vote = json.loads(page.evaluate("Object.values(localStorage)[0]"))
    assert (vote["choice"], vote["reasons"], vote["kind"]) == ("right", ["motion"], "practice")
    assert vote["viewport"] == "390x780" and someone.errors == []
    someone.context.close()


def test_a_tab_in_the_background_does_not_play(chromium, study):
    folder, _, key = study
    someone = Annotator(chromium, (folder / "index.html").as_uri(), "a1", key, {})
    someone.enter()
    # Headless tabs are never hidden. All at once, before the clips can have ended.
    script = """() => {
      playBoth();
      const playing = sides.map(({ video }) => !video.paused);
      Object.defineProperty(document, "hidden", { value: true });
      document.dispatchEvent(new Event("visibilitychange"));
      return playing;
    }"""
    assert someone.page.evaluate(script) == [True, True]
    someone.page.wait_for_function("[...document.querySelectorAll('video')].every(v => v.paused)")
    assert someone.unlocked() == [False] * 3
    someone.context.close()


def test_reload_and_pause_resume(chromium, study, tmp_path):
    folder, _, key = study
    answers = dict.fromkeys(file_names(key, False) + file_names(key, True), LABELS[1])
    someone = Annotator(chromium, (folder / "index.html").as_uri(), "a1", key, answers)
    page = someone.page
    someone.enter()
    assert page.inner_text("#count") == "Practice 1 of 1"
    someone.vote()
    assert page.inner_text("#count") == "Pair 1 of 4"
    someone.vote(reasons=["motion", "overall"])
    third = someone.shown()
    before = page.evaluate("JSON.stringify(Object.entries(localStorage).sort())")
    page.reload()
    someone.enter()
    assert someone.shown() == third and page.inner_text("#count") == "Pair 2 of 4"
    assert page.evaluate("document.getElementById('progress').value") == 2
    assert page.evaluate("JSON.stringify(Object.entries(localStorage).sort())") == before
    page.click("#pause")
    assert page.is_visible("#start") and not page.is_visible("#task")
    assert len(someone.export(tmp_path).read_text().splitlines()) == 2
    someone.enter()
    assert someone.shown() == third
    page.evaluate("localStorage.setItem(item.key, JSON.stringify({choice: 'of another tab', time: ''}))")
    someone.vote()
    assert page.evaluate("Object.values(localStorage).filter(vote => vote.includes('of another tab')).length") == 1
    page.evaluate(
        "Object.keys(localStorage).forEach(k => localStorage[k].includes('tab') && localStorage.removeItem(k))"
    )
    page.reload()
    someone.enter()
    assert someone.shown() == third
    while not page.is_visible("#end"):
        someone.vote()
    votes = [json.loads(line) for line in someone.export(tmp_path).read_text().splitlines()]
    assert len({collect.vote_id(vote) for vote in votes}) == len(votes) == 5
    assert [vote["position"] for vote in votes] == [0, 1, 2, 3, 4]
    assert votes[1]["reasons"] == ["motion", "overall"]
    page.goto((folder / "index.html").as_uri() + "?annotator=a2")
    someone.enter()
    assert page.inner_text("#count") == "Practice 1 of 1"  # another annotator at the same browser starts at the start
    someone.context.close()


def test_a_clip_that_cannot_be_loaded_can_be_skipped(chromium, study):
    folder, _, key = study
    someone = Annotator(chromium, (folder / "index.html").as_uri(), "a1", key, {})
    for clip in (folder / "clips").iterdir():
        clip.rename(clip.with_suffix(".gone"))
    someone.enter()
    for _ in range(5):
        someone.page.wait_for_selector("#skip:visible")
        assert "cannot be played" in someone.page.inner_text("#notice")
        someone.page.click("#skip")
    assert someone.page.is_visible("#end") and "5 of the pairs" in someone.page.inner_text("#left_out")
    assert someone.stored() == 0
    someone.context.close()


# ----------------------------------------------------------------------------------------------------------- collect


@pytest.fixture
def server(study, tmp_path):
    """A receiver in a thread: host and port, the file of votes, the study's data."""
    folder, page, _ = study
    votes = collect.VoteFile(tmp_path / "votes.jsonl")
    handler = partial(collect.Handler, study=page, folder=folder, votes=votes, annotators=None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_address, tmp_path / "votes.jsonl", page
        running.shutdown()


def ask(address, method, path, body=None, **headers):
    connection = http.client.HTTPConnection(*address, timeout=30)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    reply = connection.getresponse()
    return reply.status, reply.read(), reply.headers


def post(address, *votes):
    body = "".join(json.dumps(vote) + "\n" for vote in votes).encode()
    return ask(address, "POST", "/votes", body, Content_Type="application/x-ndjson")[:2]


def a_vote(page, number=0, **changes):
    pair = page["pairs"][number]
    vote = {"study": page["study"], "page": 1, "annotator": "a1", "pair": pair["pair"], "kind": "main", "position": 1,
            "left": pair["clips"][0], "right": pair["clips"][1], "choice": "left", "reasons": ["motion"],
            "seconds_to_unlock": 5.1, "seconds_to_vote": 7, "replays": 0, "time": "2026-11-23T10:00:00.000Z",
            "viewport": "800x600", "synthetic": True}  # fmt: skip
    return vote | changes


def test_votes_arrive_from_the_page_and_count_once(chromium, server, study, tmp_path):
    address, path, _ = server
    _, _, key = study
    answers = dict.fromkeys(file_names(key, False) + file_names(key, True), LABELS[1])
    url = "http://{}:{}/".format(*address)
    someone = Annotator(chromium, url, "a1", key, answers)
    someone.vote_all()
    someone.page.wait_for_selector("text=All your votes have arrived")
    lines = path.read_text().splitlines()
    assert len(lines) == 5
    someone.page.reload()
    someone.enter()  # sends everything again
    someone.page.wait_for_selector("text=All your votes have arrived")
    assert path.read_text().splitlines() == lines
    exported = someone.export(tmp_path).read_text().splitlines()
    assert [json.loads(line) for line in exported] == [json.loads(line) for line in lines]
    assert all(request.startswith((url, f"blob:{url}")) for request in someone.requests)
    assert not any(label in request for label in LABELS for request in someone.requests) and someone.errors == []
    someone.context.close()


def test_votes_wait_in_the_browser_while_the_receiver_is_away(chromium, server, study):
    address, path, _ = server
    _, _, key = study
    answers = dict.fromkeys(file_names(key, False) + file_names(key, True), LABELS[1])
    someone = Annotator(chromium, "http://{}:{}/".format(*address), "a1", key, answers)
    someone.enter()
    someone.context.route("**/votes", lambda route: route.abort())
    someone.vote()
    someone.page.wait_for_selector("text=kept in this browser")
    assert path.read_text() == ""
    someone.context.unroute("**/votes")
    someone.vote()
    someone.page.wait_for_function("sent.size === 2")
    assert len(path.read_text().splitlines()) == 2
    someone.context.close()


def test_a_vote_sent_twice_counts_once_also_after_a_crash(server):
    address, path, page = server
    assert post(address, a_vote(page)) == (200, b"1")
    assert post(address, a_vote(page), a_vote(page, 1), a_vote(page, 1)) == (200, b"1")
    status, message = post(address, a_vote(page, choice="right"))  # the first stands
    assert status == 400 and b"voted otherwise on this pair" in message
    whole = path.read_bytes()
    assert [json.loads(line)["choice"] for line in whole.splitlines()] == ["left", "left"]
    path = path.with_name("crashed.jsonl")  # the server still has the lock of the other one
    path.write_bytes(whole[:-20])  # the second line is cut off
    votes = collect.VoteFile(path)
    assert votes.append([a_vote(page), a_vote(page, 1)]) == 1
    lines = path.read_bytes().splitlines()
    assert lines[0] == whole.splitlines()[0] and json.loads(lines[2]) == a_vote(page, 1)
    votes.file.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": "other"}, "another study"),
        ({"annotator": "../../etc"}, "annotator"),
        ({"annotator": "a" * 33}, "annotator"),
        ({"pair": "0" * 16}, "no such pair"),
        ({"kind": "practice"}, "no such pair"),
        ({"kind": "extra"}, "no such pair"),
        ({"left": "0" * 16}, "clips of this pair"),
        ({"choice": "both"}, "choice"),
        ({"reasons": ["because"]}, "reason"),
        ({"reasons": "motion"}, "reasons"),
        ({"seconds_to_vote": math.nan}, "out of range"),
        ({"position": -1}, "out of range"),
        ({"replays": True}, "replays"),
        ({"time": "x" * 50}, "too long"),
        ({"note": "more"}, "other keys"),
    ],
)
def test_the_receiver_refuses_bad_votes(server, changes, message):
    address, path, page = server
    status, body = post(address, a_vote(page, 1), a_vote(page, **changes))
    assert status == 400 and message in body.decode() and path.read_bytes() == b""


def test_the_receiver_limits_what_it_takes_and_gives(server, study, monkeypatch):
    address, path, page = server
    folder = study[0]
    json_lines = {"Content_Type": "application/x-ndjson"}
    assert ask(address, "POST", "/votes", b"{}", Content_Type="text/plain")[0] == 415
    assert ask(address, "POST", "/votes", b"{", **json_lines)[0] == 400
    assert ask(address, "POST", "/elsewhere", b"{}", **json_lines)[0] == 404
    monkeypatch.setattr(collect, "MAX_BODY", 100)
    assert post(address, a_vote(page))[0] == 413
    monkeypatch.undo()
    monkeypatch.setattr(collect, "MAX_ANNOTATORS", 2)
    statuses = [post(address, a_vote(page, annotator=f"a{n}"))[0] for n in range(3)]
    assert statuses == [200, 200, 400] and len(path.read_text().splitlines()) == 2

    assert ask(address, "HEAD", "/votes")[0] == 204 and ask(address, "GET", "/votes")[0] == 404
    clip = page["pairs"][0]["clips"][0]
    whole = (folder / "clips" / f"{clip}.mp4").read_bytes()
    for path in ("/clips/", "/study_key.json", "/../study_key.json", "/clips/%2e%2e/index.html", "/clips/none.mp4"):
        assert ask(address, "GET", path)[0] == 404
    status, body, headers = ask(address, "GET", f"/clips/{clip}.mp4")
    assert (status, body) == (200, whole) and headers["Accept-Ranges"] == "bytes"
    assert headers["Last-Modified"] is None
    for asked, expected in {"0-1": whole[:2], "10-": whole[10:], "-5": whole[-5:], "5-99999999": whole[5:]}.items():
        status, body, headers = ask(address, "GET", f"/clips/{clip}.mp4", Range=f"bytes={asked}")
        assert (status, body) == (206, expected)
        start = whole.index(expected) if len(expected) > 5 else len(whole) - 5 if asked == "-5" else 0
        assert headers["Content-Range"] == f"bytes {start}-{start + len(expected) - 1}/{len(whole)}"
    assert ask(address, "GET", f"/clips/{clip}.mp4", Range=f"bytes={len(whole)}-")[0] == 416


def raw(address, request: bytes) -> bytes:
    """Send bytes as they are, and return the first line of the answer."""
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        return connection.makefile("rb").readline()


MALFORMED = {
    "a length that is a power": "Content-Length: ²\r\n",
    "a length below zero": "Content-Length: -1\r\n",
    "a length with a sign": "Content-Length: +2\r\n",
    "a length too long": f"Content-Length: {5000 * '9'}\r\n",
    "two lengths": "Content-Length: 2\r\nContent-Length: 3\r\n",
    "no colon": "Content-Length: 2\r\nwhat is this\r\n",
    "two hosts": "Host: evil.example\r\nContent-Length: 2\r\n",
    "two origins": "Origin: http://a\r\nOrigin: http://b\r\nContent-Length: 2\r\n",
    "cut off": "Content-Length: 900\r\n",
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_headers_are_a_bad_request(server, name, capfd):
    address, path, _ = server
    head = f"POST /votes HTTP/1.1\r\nHost: 127.0.0.1:{address[1]}\r\nContent-Type: application/x-ndjson\r\n"
    answer = raw(address, (head + MALFORMED[name] + "\r\n{}").encode("latin-1"))
    assert b" 400 " in answer and path.read_bytes() == b""
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "header", ["", "Host:\r\n", "Host: a:b\r\n", "Host: x@127.0.0.1\r\n", "Host: 127.0.0.1/x\r\n"]
)
def test_a_host_that_is_none_is_a_bad_request(server, header):
    assert b" 400 " in raw(server[0], f"GET / HTTP/1.1\r\n{header}\r\n".encode())


@pytest.mark.parametrize("asked", ["9" * 5000 + "-", "²-3", "--", "5-2"])
def test_a_malformed_range_does_not_end_the_thread(server, asked, capfd):
    address, _, page = server
    clip = page["pairs"][0]["clips"][0]
    request = f"GET /clips/{clip}.mp4 HTTP/1.1\r\nHost: 127.0.0.1\r\nRange: bytes={asked}\r\n\r\n"
    answer = raw(address, request.encode("latin-1"))
    assert b" 416 " in answer if asked == "5-2" else b" 200 " in answer
    assert "Traceback" not in capfd.readouterr().err


def test_other_sites_can_neither_read_nor_vote(server):
    """By a name of theirs that leads here (DNS rebinding), or by a request from a page of theirs."""
    address, path, page = server
    own = f"127.0.0.1:{address[1]}"
    body = json.dumps(a_vote(page)).encode()

    def status(method, **headers):
        return ask(address, method, "/votes" if method == "POST" else "/", body, **headers)[0]

    ndjson = {"Content_Type": "application/x-ndjson"}
    assert status("GET", Host="evil.example") == status("GET", Host=f"evil.example:{address[1]}") == 403
    assert status("POST", Host="evil.example", Origin="http://evil.example", **ndjson) == 403
    for origin in ("http://evil.example", "http://127.0.0.1:1", "null", f"http://{own}@evil.example", "http://["):
        assert status("POST", Host=own, Origin=origin, **ndjson) == 403
    assert path.read_bytes() == b""
    assert status("GET", Host="localhost") == status("GET", Host="[::1]:80") == 200
    assert status("GET", Host="192.168.0.7:8000") == 200
    assert status("POST", Host=own, Origin=f"http://{own}", **ndjson) == 200
    assert len(path.read_bytes().splitlines()) == 1


def test_a_proxy_is_known_by_its_public_name(study, tmp_path):
    folder, page, _ = study
    votes = collect.VoteFile(tmp_path / "votes.jsonl")
    handler = partial(
        collect.Handler, study=page, folder=folder, votes=votes, annotators=None, public_names=["Study.example"]
    )
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        body = json.dumps(a_vote(page)).encode()
        headers = {"Content_Type": "application/x-ndjson", "Origin": "https://study.example"}
        for host, expected in {"study.example": 200, "127.0.0.1": 200, "other.example": 403}.items():
            assert ask(running.server_address, "POST", "/votes", body, Host=host, **headers)[0] == expected
        running.shutdown()
    votes.file.close()


def test_a_second_collector_on_one_file_is_refused(tmp_path):
    pytest.importorskip("fcntl", reason="Windows locks no file so")
    first = collect.VoteFile(tmp_path / "votes.jsonl")
    with pytest.raises(SystemExit, match=r"another collect\.py is writing to it"):
        collect.VoteFile(tmp_path / "votes.jsonl")
    first.file.close()
    collect.VoteFile(tmp_path / "votes.jsonl").file.close()


def test_a_port_that_is_taken_is_said(server, study, tmp_path):
    words = [str(study[0]), "--votes", str(tmp_path / "more.jsonl"), "--port", str(server[0][1])]
    with pytest.raises(SystemExit, match="cannot be listened at"):
        collect.main(collect.parse_args(words))


@pytest.mark.slow
def test_collect_as_a_command_listens_on_loopback_and_stops_cleanly(study, tmp_path):
    folder, page, _ = study
    with pytest.raises(SystemExit, match="--votes"):
        collect.main(collect.parse_args([str(folder), "--votes", str(folder / "votes.jsonl")]))
    with pytest.raises(SystemExit, match="is not a page"):
        collect.main(collect.parse_args([str(tmp_path), "--votes", str(tmp_path.parent / "votes.jsonl")]))
    command = [sys.executable, SCRIPTS / "collect.py", folder, "--votes", tmp_path / "votes.jsonl", "--port", "0"]
    command += ["--annotators", "a1", "A2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            first = process.stdout.readline().strip()
            assert first.startswith("http://127.0.0.1:") and first.endswith("/?annotator=a1")
            address = ("127.0.0.1", int(first.split(":")[2].split("/")[0]))
            assert post(address, a_vote(page))[0] == 200
            assert post(address, a_vote(page, annotator="a3"))[0] == 400
        finally:
            process.send_signal(signal.SIGINT)
        assert "1 votes are in" in process.stdout.read() and process.wait(timeout=60) == 0
    assert len((tmp_path / "votes.jsonl").read_text().splitlines()) == 1


def test_votes_are_on_the_disk_before_they_are_confirmed(tmp_path, monkeypatch):
    synced = []
    votes = collect.VoteFile(tmp_path / "votes.jsonl")
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append((handle, (tmp_path / "votes.jsonl").read_bytes())))
    vote = {"annotator": "a", "kind": "main", "pair": "p", "choice": "left"}
    assert votes.append([vote]) == 1
    assert synced == [(votes.file.fileno(), json.dumps(vote).encode() + b"\n")]
    votes.file.close()


# ----------------------------------------------------------------------------------------------------------- analyse


def test_fleiss_kappa_of_published_examples():
    """The worked example of https://en.wikipedia.org/wiki/Fleiss%27_kappa (14 raters, 5 categories): 0.210."""
    table = """0 0 0 0 14   0 2 6 4 2   0 0 3 5 6   0 3 9 2 0   2 2 8 1 1
               7 7 0 0 0   3 2 6 3 0   2 5 3 2 2   6 5 2 1 0   0 2 2 3 7"""
    counts = np.array(table.split(), dtype=int).reshape(10, 5)
    assert analyse.fleiss_kappa(counts) == pytest.approx(0.210, abs=5e-4)
    assert analyse.fleiss_kappa(np.array([[3, 0], [0, 3], [3, 0]])) == pytest.approx(1)
    assert analyse.fleiss_kappa(np.array([[1, 1], [1, 1]])) == pytest.approx(-1)  # two raters never agree
    assert math.isnan(analyse.fleiss_kappa(np.array([[3, 0], [3, 0]])))
    with pytest.raises(ValueError, match="same number"):
        analyse.fleiss_kappa(np.array([[3, 0], [1, 1]]))


def test_sign_test_and_intervals_by_hand():
    assert analyse.sign_test(8, 2) == analyse.sign_test(2, 8) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert analyse.sign_test(0, 6) == pytest.approx(2 / 64)
    assert analyse.sign_test(5, 5) == analyse.sign_test(0, 0) == 1
    assert 0 < analyse.sign_test(172, 134) < 0.05 < analyse.sign_test(160, 134)  # 460 pairs: no overflow
    assert analyse.wilson_interval(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert analyse.wilson_interval(0, 10) == pytest.approx((0, 0.2775328), abs=1e-6)
    low, high = analyse.bootstrap_difference(134, 172, 460)
    spread = 1.96 * math.sqrt(((134 + 172) / 460 - (38 / 460) ** 2) / 460)  # the normal approximation
    assert (low, high) == pytest.approx((38 / 460 - spread, 38 / 460 + spread), abs=0.01)


def test_majority_of_three():
    assert analyse.majority(["a", "b", "a"]) == "a" and analyse.majority([NEITHER, NEITHER, "a"]) == NEITHER
    assert analyse.majority(["a", "b", NEITHER]) is None and analyse.majority(["a", "b"]) is None


@pytest.fixture
def small_key(tmp_path):
    """The key of a study of four pairs that count and one that does not; `old3` is the old model's clip of pair 3."""
    pairs = {
        f"p{n}": {"file_name": f"{n}.mp4", "prompt": f"prompt {n}", "seed": n, "practice": n == 4,
                  "clips": {LABELS[0]: f"old{n}", LABELS[1]: f"new{n}"}}
        for n in range(5)
    }  # fmt: skip
    (tmp_path / "key.json").write_text(json.dumps({"study": "s", "labels": LABELS, "pairs": pairs}))
    return tmp_path / "key.json"


def cast(annotator, pair, answer, kind="main", old_left=True, seconds=(5.0, 8.0), reasons=(), synthetic=False):
    left, right = (f"old{pair}", f"new{pair}") if old_left else (f"new{pair}", f"old{pair}")
    choice = answer if answer == NEITHER else "left" if left.startswith(answer) else "right"
    return {"study": "s", "annotator": annotator, "kind": kind, "pair": f"p{pair}", "left": left, "right": right,
            "choice": choice, "reasons": list(reasons), "seconds_to_unlock": seconds[0], "replays": 0,
            "seconds_to_vote": seconds[1], "time": "", "synthetic": synthetic}  # fmt: skip


def run_analysis(key, votes, *flags):
    path, out = key.with_name("votes.jsonl"), key.with_name("report")
    path.write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    analyse.main(analyse.parse_args(["--key", str(key), "--votes", str(path), "--output_dir", str(out), *flags]))
    return json.loads((out / "report.json").read_text()), (out / "report.md").read_text(), out


def test_analysis_by_hand(small_key):
    """Three annotators, four pairs: majorities new, new, none (1-1-1), old."""
    table = {
        "a": ["new", "new", "new", "old"],
        "b": ["new", NEITHER, "old", "old"],
        "c": ["new", "new", NEITHER, "old"],
    }
    votes = [
        cast(who, pair, answer, old_left=pair % 2 == 0, seconds=(5, 6 + pair), reasons=["motion"] * (answer == "new"))
        for who, answers in table.items()
        for pair, answer in enumerate(answers)
    ]
    votes += [cast("a", 0, "new", "repeat", old_left=False), cast("b", 1, "old", "repeat")]
    votes += [cast("a", 4, "old", "practice")]
    report, text, out = run_analysis(small_key, votes)
    old, new = LABELS
    assert report["pairs"] == 4 and report["pairs_by_votes"] == {"3": 4} and report["synthetic"] is False
    assert report["annotators"]["a"]["percent"] == {old: 25, new: 75, NEITHER: 0}
    assert report["annotators"]["b"]["percent"] == {old: 50, new: 25, NEITHER: 25}
    assert report["all_votes"]["counts"] == {old: 4, new: 6, NEITHER: 2}
    result = report["majority"]
    assert result["counts"] == {old: 1, new: 2, NEITHER: 1} and result["without_majority"] == 1
    assert result["difference"] == 25 and result["sign_test_p"] == 1  # 2 to 1
    # p_j = 4/12, 6/12, 2/12; P_i = 1, 1/3, 0, 1: mean 7/12; chance 7/18
    assert report["fleiss_kappa"] == {"kappa": pytest.approx((7 / 12 - 7 / 18) / (1 - 7 / 18)), "pairs": 4,
                                      "votes_per_pair": 3}  # fmt: skip
    # The old one is left in pairs 0 and 2: left is taken once in pair 2 (b); new is left in 1 and 3: taken twice in 1.
    assert (report["left_bias"]["left"], report["left_bias"]["right"]) == (3, 7)
    assert report["left_bias"]["p"] == pytest.approx(2 * (1 + 10 + 45 + 120) / 1024)
    assert report["self_consistency"] == {"same": 1, "repeats": 2}
    assert report["annotators"]["a"]["self_consistency"] == {"same": 1, "repeats": 1}
    assert report["median_seconds"] == {"to_vote": 7.5, "after_unlock": 2.5}
    assert report["reasons"] == {old: {}, new: {"motion": 6}}
    assert "1-1-1" in text and "SYNTHETIC" not in text
    assert f"| {new} | 2 | 50.00 |" in text
    rows = (out / "votes.csv").read_text().splitlines()
    assert len(rows) == 1 + 15 and rows[0].startswith(
        '"annotator","kind","pair","file_name","prompt","seed","left_model"'
    )
    assert (out / "preferences.png").stat().st_size > 5000


def test_pairs_with_too_few_votes_have_no_majority(small_key):
    votes = [cast(who, pair, "new") for who in "ab" for pair in (0, 1)] + [cast("c", 0, "new")]
    report, text, _ = run_analysis(small_key, votes)
    assert report["majority"]["pairs"] == 1 and report["pairs_by_votes"] == {"2": 1, "3": 1}
    report, text, _ = run_analysis(small_key, votes, "--min_votes", "4")
    assert report["majority"] is None and "--min_votes" in text
    assert report["fleiss_kappa"]["kappa"] is None and "undefined" in text


def test_what_is_wrong_with_votes_is_said(small_key, tmp_path):
    votes = [cast("a", 0, "new"), cast("a", 0, "new"), cast("a", 0, "old")]
    report, text, _ = run_analysis(small_key, votes)
    assert report["all_votes"]["votes"] == 1 and "line 3: a had voted otherwise" in text and "line 2" not in text
    path = tmp_path / "cut.jsonl"
    path.write_text(json.dumps(cast("a", 1, "new")) + '\n{"study": "s", "anno')
    key = json.loads(small_key.read_text())
    read, remarks = analyse.read_votes([path], key)
    assert len(read) == 1 and "line 2: cut off" in remarks[0]
    with pytest.raises(SystemExit, match="some of these votes are real and some synthetic"):
        run_analysis(small_key, [cast("a", 0, "new"), cast("a", 1, "new", synthetic=True)])
    with pytest.raises(SystemExit, match=r"no votes that count.*\n- .*line 1: not a vote of study s"):
        run_analysis(small_key, [cast("a", 0, "new") | {"study": "t"}])
    with pytest.raises(SystemExit, match="no votes that count"):
        run_analysis(small_key, [cast("a", 4, "new", "practice")])


HOSTILE = {
    "another study": ({"study": "t"}, "not a vote of study s"),
    "study of another type": ({"study": ["s"]}, "not a vote of study s"),
    "unknown pair": ({"pair": "p9"}, "pair is none"),
    "pair of another type": ({"pair": ["p1"]}, "pair is missing"),
    "unknown clip": ({"left": "x"}, "left is no clip"),
    "clip of another pair": ({"right": "new2"}, "right is no clip"),
    "clip of another type": ({"left": {}}, "left is missing"),
    "the same clip on both sides": ({"left": "new1", "right": "new1"}, "same clip is on both sides"),
    "unknown choice": ({"choice": "both"}, "choice is unknown"),
    "choice of another type": ({"choice": []}, "choice is missing"),
    "unknown kind": ({"kind": "extra"}, "kind is unknown"),
    "kind of practice": ({"kind": "practice"}, "kind is another"),
    "formula as a name": ({"annotator": "=1+1"}, "annotator is not"),
    "name of another type": ({"annotator": None}, "annotator is missing"),
    "seconds as text": ({"seconds_to_vote": "7"}, "seconds_to_vote"),
    "seconds that are none": ({"seconds_to_vote": math.nan}, "seconds_to_vote"),
    "endless seconds": ({"seconds_to_unlock": math.inf}, "seconds_to_unlock"),
    "truth as a number": ({"replays": True}, "replays"),
    "reasons as text": ({"reasons": "motion"}, "reasons"),
    "reasons of another type": ({"reasons": [1]}, "reasons"),
    "a picture as a reason": ({"reasons": ["![x](http://example.org/x.png)"]}, "a reason is none"),
    "synthetic as text": ({"synthetic": "no"}, "synthetic"),
    "time of another type": ({"time": 7}, "time is missing"),
}
HOSTILE_LINES = {
    "no object": b"[1]",
    "nothing": b"null",
    "a number too long": b'{"study": ' + 5000 * b"9" + b"}",
    "deep": 100_000 * b"[",
    "no text": b"\xff\xfe\x00",
    "cut off": b'{"study": "s", "anno',
}


@pytest.mark.parametrize("name", [*HOSTILE, *HOSTILE_LINES])
def test_a_hostile_line_is_left_out_by_number_and_the_others_count(small_key, tmp_path, name):
    message = "left out"
    if name in HOSTILE:
        changes, message = HOSTILE[name]
        line = json.dumps(cast("b", 1, "new") | changes).encode()
    else:
        line = HOSTILE_LINES[name]
    good = [json.dumps(cast("a", pair, "new")).encode() for pair in (0, 1)]
    path = tmp_path / "votes.jsonl"
    path.write_bytes(b"\n".join([good[0], line, good[1]]))
    out = tmp_path / "report"
    analyse.main(analyse.parse_args(["--key", str(small_key), "--votes", str(path), "--output_dir", str(out)]))
    report = json.loads((out / "report.json").read_text())
    assert report["all_votes"]["counts"] == {LABELS[0]: 0, LABELS[1]: 2, NEITHER: 0}
    (remark,) = (line for line in (out / "report.md").read_text().splitlines() if "line 2" in line)
    assert message in remark and remark.endswith("left out") and "http" not in remark


def test_a_missing_key_leaves_the_line_out(small_key):
    key = json.loads(small_key.read_text())
    whole = cast("a", 0, "new")
    for name in set(whole) - {"study"}:
        vote = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(ValueError, match=name):
            analyse.check_vote(vote, key)


@pytest.mark.parametrize("formula", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r\n=1", "\uff1d1", "\ufeff=1"])
def test_no_cell_is_run_by_a_spreadsheet(small_key, formula):
    key = json.loads(small_key.read_text())
    key["pairs"]["p0"]["prompt"] = formula
    key["pairs"]["p1"]["prompt"] = "a dog; =1+1"
    small_key.write_text(json.dumps(key))
    votes = [cast("-1", pair, "new") | {"time": formula} for pair in (0, 1)]
    _, _, out = run_analysis(small_key, votes)
    text = (out / "votes.csv").read_text(encoding="utf-8")
    with (out / "votes.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["prompt"] == rows[0]["time"] == f"'{formula}" and rows[0]["annotator"] == "'-1"
    assert '"a dog; =1+1"' in text  # in quotes, or a spreadsheet that parts at semicolons would run it
    assert rows[0]["pair"] == "p0" and rows[0]["seconds_to_vote"] == "8.0"


def test_a_demo_does_not_replace_a_report(small_key, tmp_path):
    there = tmp_path / "report" / "report.json"
    there.parent.mkdir()
    there.write_text('{"synthetic": false}')
    command = ["--key", str(small_key), "--demo", "3", "--output_dir", str(there.parent)]
    with pytest.raises(SystemExit, match="another --output_dir"):
        analyse.main(analyse.parse_args(command))
    assert there.read_text() == '{"synthetic": false}'


def test_demo_votes_are_called_synthetic_everywhere(small_key, capsys):
    out = small_key.with_name("demo")
    analyse.main(analyse.parse_args(["--key", str(small_key), "--demo", "3", "--output_dir", str(out)]))
    assert "SYNTHETIC" in (out / "report.md").read_text() and "SYNTHETIC" in capsys.readouterr().out
    rows = (out / "votes.csv").read_text().splitlines()
    assert rows[0].endswith(',"synthetic"') and all(row.endswith(",True") for row in rows[1:]) and len(rows) > 12
    report = json.loads((out / "report.json").read_text())
    assert report["synthetic"] is True
    assert analyse.draw_preferences(report).axes[0].get_title() == analyse.SYNTHETIC
    assert analyse.draw_preferences(report | {"synthetic": False}).axes[0].get_title() == ""
    with pytest.raises(SystemExit, match="--demo"):
        analyse.main(analyse.parse_args(["--key", str(small_key), "--demo", "0", "--output_dir", str(out)]))


@pytest.mark.parametrize("script", ["build.py", "collect.py", "analyse.py"])
@pytest.mark.slow
def test_help(script):
    result = subprocess.run([sys.executable, SCRIPTS / script, "--help"], capture_output=True, text=True)
    assert result.returncode == 0 and "python examples/human_eval/" in result.stdout
