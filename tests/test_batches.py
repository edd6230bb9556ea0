"""What is drawn for a sample: latents, noise, sigma and caption, by seed, epoch and number alone."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import HEIGHT, WIDTH
from corpus import caption_dataset, metadata_folder, write_metadata, write_numbered
from safetensors.torch import load_file

import train_ltd


@pytest.fixture
def latent_dataset(prepare, originals, tmp_path):
    data = metadata_folder(originals, tmp_path / "data", "metadata.jsonl")
    clips, _, files, args = prepare(**data, caption_dropout=0.5)

    def build(**changes):
        return train_ltd.LatentDataset(clips, files, SimpleNamespace(**vars(args) | changes))

    return build


def same(a: dict, b: dict) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_a_sample_depends_on_seed_epoch_and_index_only(latent_dataset):
    one, two = latent_dataset(), latent_dataset()
    for epoch in (0, 3):
        one.epoch = two.epoch = epoch
        torch.manual_seed(epoch)
        items = [one[n] for n in range(4)]
        torch.manual_seed(99)
        before = torch.get_rng_state()
        assert all(same(items[n], two[n]) for n in (3, 1, 0, 2))  # in any order
        assert torch.equal(torch.get_rng_state(), before)  # and the run's own random state is left alone
    first = one[0]["noise"]
    assert not torch.equal(first, one[1]["noise"])
    one.epoch = 4
    assert not torch.equal(first, one[0]["noise"]) and one[0]["sigmas"] != two[0]["sigmas"]
    other = latent_dataset(seed=4)
    other.epoch = 3
    assert not torch.equal(first, other[0]["noise"])


def test_all_draws_differ(latent_dataset):
    dataset = latent_dataset()
    noises, sigmas = set(), set()
    for epoch in range(50):
        dataset.epoch = epoch
        for n in range(4):
            item = dataset[n]
            noises.add(item["noise"].numpy().tobytes())
            sigmas.add(item["sigmas"].item())
    assert len(noises) == len(sigmas) == 200


def test_noise_is_standard_normal(latent_dataset):
    dataset = latent_dataset()
    noise = []
    for epoch in range(40):
        dataset.epoch = epoch
        noise += [dataset[n]["noise"] for n in range(4)]
    assert noise[0].shape == (16, 3, HEIGHT // 8, WIDTH // 8) and noise[0].dtype == torch.float32
    noise = torch.stack(noise).double()
    draws = noise.numel()
    assert abs(noise.mean()) < 4 / math.sqrt(draws)
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / draws)
    assert abs((noise**4).mean() - 3) < 4 * math.sqrt(96 / draws)
    flat = noise.flatten(1)  # no two samples share noise, and neither do neighbours within one
    between = (flat @ flat.T / flat.shape[1]).fill_diagonal_(0)
    assert between.abs().max() < 6 / math.sqrt(flat.shape[1])
    assert abs((flat[:, 1:] * flat[:, :-1]).mean()) < 4 / math.sqrt(draws)


def sigma_cdf(sigma: np.ndarray, scheme: str, shift: float) -> np.ndarray:
    """`sigma = shift u / (1 + (shift - 1) u)`, solved for `u`, whose density is uniform or logit-normal."""
    u = torch.from_numpy(np.clip(sigma / (shift - (shift - 1) * sigma), 1e-12, 1 - 1e-12))
    return (u if scheme == "none" else torch.special.ndtr(torch.logit(u))).numpy()


@pytest.mark.usefixtures("one_text_encoder")
@pytest.mark.parametrize(
    "settings",
    [
        {"weighting_scheme": "none", "flow_shift": 1.0},
        {"weighting_scheme": "none", "flow_shift": 5.0},
        {"weighting_scheme": "logit_normal", "flow_shift": 3.0},
        {"weighting_scheme": "logit_normal", "flow_shift": 1.0},
        {"weighting_scheme": "none", "flow_shift": 1.0, "min_sigma": 0.2, "max_sigma": 0.5},
        {"weighting_scheme": "logit_normal", "flow_shift": 3.0, "min_sigma": 0.875},
        {"weighting_scheme": "logit_normal", "flow_shift": 3.0, "max_sigma": 0.3},
    ],
    ids=lambda settings: " ".join(str(value) for value in settings.values()),
)
def test_sigma_density(latent_dataset, settings):
    """Kolmogorov and Smirnov at one in a thousand, against the formula, truncated to the bounds."""
    dataset = latent_dataset(**settings)
    sigmas = []
    for epoch in range(250):
        dataset.epoch = epoch
        sigmas += [dataset[n]["sigmas"].item() for n in range(4)]
    low, high = settings.get("min_sigma", 0.0), settings.get("max_sigma", 1.0)
    sigmas = np.sort(sigmas)
    assert low <= sigmas[0] and sigmas[-1] <= high
    shape = (settings["weighting_scheme"], settings["flow_shift"])
    ends = sigma_cdf(np.array([low, high]), *shape)
    cdf = (sigma_cdf(sigmas, *shape) - ends[0]) / (ends[1] - ends[0])
    steps = np.arange(len(sigmas) + 1) / len(sigmas)
    distance = max(np.abs(cdf - steps[1:]).max(), np.abs(cdf - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(len(sigmas))


def test_default_density_is_shifted_logit_normal(flags):
    args = train_ltd.parse_args(flags())
    sigmas = train_ltd.draw_sigmas(args, torch.Generator().manual_seed(0))
    # The median of u is 1/2, and a shift of 3 takes it to 3/4.
    assert sigmas.median() == pytest.approx(0.75, abs=0.03) and sigmas.dtype == torch.float32


def test_prompt_of_a_sample_is_padded_with_zeros(latent_dataset):
    item = latent_dataset(caption_dropout=0.0)[0]
    assert item["prompt_embeds"].shape == (512, 32)
    length = int(item["prompt_embeds"].any(dim=-1).sum())
    assert 1 < length < 60
    assert torch.equal(item["prompt_embeds"], F.pad(item["prompt_embeds"][:length], (0, 0, 0, 512 - length)))


def test_windows_are_samples(prepare, tmp_path):
    """Each window of a video is a sample with its own latents."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_numbered(folder / "a.mp4", 60)
    write_metadata(folder, [{"file_name": "a.mp4", "text": "a"}])
    clips, _, files, args = prepare(train_data_dir=folder, clips_per_video=3, caption_dropout=0)
    assert [clip.name for clip in clips] == ["a.mp4#0", "a.mp4#1", "a.mp4#2"]
    dataset = train_ltd.LatentDataset(clips, files, args)
    stored = [load_file(Path(args.cache_dir, clip.path))["latents"].float() for clip in clips]
    assert {latents.shape for latents in stored} == {(16, 3, HEIGHT // 8, WIDTH // 8)}
    assert all(torch.equal(dataset[n]["latents"], stored[n]) for n in range(3))
    assert not torch.equal(stored[0], stored[1]) and not torch.equal(stored[1], stored[2])


# --- Captions --------------------------------------------------------------------------------------------------------


def drawn_captions(clips, files, args, epochs: int) -> list[list[str]]:
    """The caption that each clip gets in each epoch, told by its embedding."""
    dataset = train_ltd.LatentDataset(clips, files, args)
    known = {dataset.load_prompt(caption).numpy().tobytes(): caption for caption in files}
    assert len(known) == len(files)
    drawn = []
    for epoch in range(epochs):
        dataset.epoch = epoch
        drawn.append([known[dataset[n]["prompt_embeds"].numpy().tobytes()] for n in range(len(clips))])
    return drawn


def test_lists_of_captions_are_drawn_per_epoch(prepare, tmp_path):
    texts = ["one", "two", "three"]
    clips, _, files, args = prepare(**caption_dataset(tmp_path / "data", [texts, texts, "alone"]), caption_dropout=0)
    assert [clip.captions for clip in clips] == [texts, texts, ["alone"]]
    drawn = drawn_captions(clips, files, args, 60)
    assert drawn == drawn_captions(clips, files, args, 60)
    for n in (0, 1):
        counts = [sum(row[n] == text for row in drawn) for text in texts]
        assert sum(counts) == 60 and min(counts) >= 10
    assert [row[0] for row in drawn] != [row[1] for row in drawn]
    assert {row[2] for row in drawn} == {"alone"}


@pytest.mark.usefixtures("one_text_encoder")
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_caption_dropout(prepare, tmp_path, share):
    """That share of the samples gets the encoded "", without the trigger word."""
    data = caption_dataset(tmp_path / "data", ["a", "b", "c", "d"])
    clips, _, files, args = prepare(**data, caption_dropout=share, trigger_word="ohwx")
    drawn = [caption for row in drawn_captions(clips, files, args, 100) for caption in row]
    assert {c for c in drawn if c} == ({"ohwx a", "ohwx b", "ohwx c", "ohwx d"} if share < 1 else set())
    assert drawn.count("") / len(drawn) == pytest.approx(share, abs=0.06 if 0 < share < 1 else 0)
