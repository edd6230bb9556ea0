"""Put the nano Wan together around its VAE: text encoder, tokenizer, scheduler, and a fresh or trained transformer.

    python examples/nano/build.py base --output_dir outputs/nano/base
    python examples/nano/build.py export --trained outputs/nano/dit --output_dir examples/nano/wan-nano

`base` makes a `WanPipeline` whose transformer is random, for `train_ltd.py --train_type full` to train; `export`
writes the trained pipeline in float16. `examples/nano/build.sh` runs these and everything between.

The text encoder is a two-layer `UMT5EncoderModel` with a tokenizer of the captions' words. It is trained alone, for
about a minute, on captions without videos: every token has to know all the words of the phrase that it stands in
("circle" that it is red and moves to the left), which attention in the transformer then reads. Then it is frozen.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from tqdm.auto import tqdm
from transformers import UMT5Config, UMT5EncoderModel

EXAMPLES = Path(__file__).resolve().parents[1]
# examples/ is folders of scripts, not a package.
sys.path.insert(0, str(EXAMPLES / "benchmark"))
sys.path.insert(0, str(EXAMPLES))

from mistakes import run_script
from small_wan import build_tokenizer
from sprites import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    DYNAMICS,
    PATHS,
    PATTERNS,
    SHAPES,
    SIZES,
    SPEEDS,
    caption,
    caption_words,
    sample_spec,
)

logger = logging.getLogger("build")

TEXT_DIM = 64
TRANSFORMER = {
    "num_layers": 6,
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "ffn_dim": 512,
    "freq_dim": 256,
    "rope_max_seq_len": 64,
    "text_dim": TEXT_DIM,
    "in_channels": 16,
    "out_channels": 16,
}
PHRASES = [
    "a and over the to moves stays camera pans spinning still turning",
    *SHAPES,
    *COLORS,
    *SIZES,
    *SPEEDS,
    *DIRECTIONS,
    *PATHS,
    *DYNAMICS,
    *BACKGROUNDS,
    *PATTERNS,
]
WORDS = " ".join(PHRASES).split()
# What every token of a sprite's phrase, and of the scene's, has to know, and the possible answers
SPRITE_QUESTIONS = {
    "size": tuple(SIZES),
    "color": tuple(COLORS),
    "shape": SHAPES,
    "speed": ("still", *SPEEDS),
    "direction": ("", *DIRECTIONS),
    "path": ("", *PATHS),
    "spin": (False, True),
    "dynamics": ("", *DYNAMICS),
    "to_color": ("", *COLORS),
}
SCENE_QUESTIONS = {
    "background": tuple(BACKGROUNDS),
    "pattern": PATTERNS,
    "pan": ("", *DIRECTIONS),
}
NOT_ASKED = -100  # what cross-entropy leaves out


# ---------------------------------------------------------------------------------------------- text encoder


def phrase_answers(questions, words):
    """Return the index of the right answer to each question, by a phrase's words."""
    return [answers.index(words[key]) for key, answers in questions.items()]


def caption_answers(words, tokens):
    """Return the index of every right answer for each of a caption's tokens, `(T, Q)`; `NOT_ASKED` elsewhere."""
    rows = []
    phrase = 0
    in_scene = False
    for token in tokens:
        if token == "▁and":
            phrase += 1
        if token == "▁over":
            in_scene = True
        if in_scene:
            row = [NOT_ASKED] * len(SPRITE_QUESTIONS) + phrase_answers(SCENE_QUESTIONS, words)
        else:
            row = phrase_answers(SPRITE_QUESTIONS, words["sprites"][phrase]) + [NOT_ASKED] * len(SCENE_QUESTIONS)
        rows.append(row)
    return rows


def caption_batch(rng, tokenizer, batch_size):
    """Draw captions of both mixes: token ids and attention mask `(B, T)`, answers `(B, T, Q)`, all int64."""
    specs = [sample_spec(rng, ("calm", "dynamic")[index % 2]) for index in range(batch_size)]
    inputs = tokenizer([caption(spec) for spec in specs], padding=True, return_tensors="pt")
    questions = len(SPRITE_QUESTIONS) + len(SCENE_QUESTIONS)
    answers = torch.full((*inputs.input_ids.shape, questions), NOT_ASKED)
    for number, spec in enumerate(specs):
        length = int(inputs.attention_mask[number].sum())
        tokens = tokenizer.convert_ids_to_tokens(inputs.input_ids[number, :length])
        answers[number, :length] = torch.tensor(caption_answers(caption_words(spec), tokens))
    return inputs.input_ids, inputs.attention_mask, answers


class Questions(torch.nn.Module):
    """Answers every question on every token from a text encoder's embeddings."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        options = [*SPRITE_QUESTIONS.values(), *SCENE_QUESTIONS.values()]
        self.sizes = [len(answers) for answers in options]
        self.heads = torch.nn.Linear(TEXT_DIM, sum(self.sizes))

    def forward(self, ids, mask):
        """Return the logits of each question, a tuple of `(B, T, answers)`."""
        return self.heads(self.encoder(ids, mask).last_hidden_state).split(self.sizes, dim=-1)


@torch.no_grad()
def held_out_accuracy(model, tokenizer, seed, batch_size=256):
    """Return the share of right answers on captions of another stream, of which most were never seen."""
    ids, mask, answers = caption_batch(np.random.default_rng([seed, 2]), tokenizer, batch_size)
    right = []
    for number, logits in enumerate(model(ids, mask)):
        asked = answers[..., number] != NOT_ASKED
        right.append((logits.argmax(-1) == answers[..., number])[asked])
    return torch.cat(right).float().mean().item()


def train_text_encoder(tokenizer, steps, batch_size=32, seed=0):
    """Train a small `UMT5EncoderModel` to answer questions on captions; returns it and its held-out accuracy."""
    torch.manual_seed(seed)
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=128,
        num_heads=4,
        num_layers=2,
        dropout_rate=0.0,
    )
    encoder = UMT5EncoderModel(config)
    model = Questions(encoder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = np.random.default_rng([seed, 1])
    for _ in tqdm(range(steps), desc="text encoder"):
        ids, mask, answers = caption_batch(rng, tokenizer, batch_size)
        loss = 0.0
        for number, logits in enumerate(model(ids, mask)):
            loss = loss + F.cross_entropy(logits.flatten(0, 1), answers[..., number].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return encoder.eval(), held_out_accuracy(model, tokenizer, seed)


# ---------------------------------------------------------------------------------------------- transformer


def build_transformer(seed=0):
    """Build a fresh `WanTransformer3DModel` whose blocks start as the identity and whose prediction starts at zero."""
    torch.manual_seed(seed)
    transformer = WanTransformer3DModel(**TRANSFORMER)
    for block in transformer.blocks:
        with torch.no_grad():
            block.scale_shift_table[:, [2, 5]] = 0  # the gates of self-attention and feed-forward
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    return transformer


# ---------------------------------------------------------------------------------------------- commands


def build_base(args):
    """Build the pipeline around a trained VAE, with a trained text encoder and a random transformer."""
    tokenizer = build_tokenizer(WORDS)
    text_encoder, accuracy = train_text_encoder(tokenizer, args.text_steps, seed=args.seed)
    logger.info("text encoder: %.2f %% of the held-out questions right", 100 * accuracy)
    vae = AutoencoderKLWan.from_pretrained(args.vae)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = WanPipeline(tokenizer, text_encoder, vae, scheduler, build_transformer(args.seed))
    pipeline.save_pretrained(args.output_dir)


def export(args):
    """Write the trained pipeline in float16, but the text encoder: it is tiny, and would otherwise run in float16."""
    transformer = WanTransformer3DModel.from_pretrained(args.trained, subfolder="transformer")
    pipeline = WanPipeline.from_pretrained(args.base, transformer=transformer)
    pipeline.transformer.half()
    pipeline.vae.half()
    pipeline.save_pretrained(args.output_dir)
    for path in Path(args.output_dir).rglob("*.json"):  # no paths of this machine
        config = json.loads(path.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None):
            path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def parse_args(input_args=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    base = commands.add_parser("base", help="a pipeline with a random transformer")
    base.add_argument("--output_dir", required=True)
    base.add_argument("--vae", default="examples/nano/wan-nano/vae", help="the trained VAE")
    base.add_argument("--text_steps", type=int, default=1000, help="steps of the text encoder's training")
    base.add_argument("--seed", type=int, default=0)
    trained = commands.add_parser("export", help="the trained pipeline in float16")
    trained.add_argument("--base", required=True, help="what `base` wrote")
    trained.add_argument("--trained", required=True, help="the output folder of train_ltd.py")
    trained.add_argument("--output_dir", required=True)
    return parser.parse_args(input_args)


def main(args):
    """Run the command."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if args.command == "base":
        build_base(args)
    else:
        export(args)


if __name__ == "__main__":
    run_script(main, parse_args)
