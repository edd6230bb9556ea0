"""Build a complete Wan text-to-video pipeline that is small enough for a laptop CPU, without any download.

The classes are the real ones (`WanPipeline` and everything in it), so whatever runs on this folder runs on
`Wan-AI/Wan2.1-T2V-1.3B-Diffusers` too. Only the sizes differ, and the weights are random.

    python examples/small_wan.py --output_dir small-wan --preset tiny
"""

import argparse
import string
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

PRESETS = {
    # For tests: the whole folder is below 0.5 MB and a forward pass takes milliseconds.
    "tiny": {"base_dim": 3, "dim_mult": (1, 1, 1, 1), "text_dim": 32, "num_layers": 2, "num_attention_heads": 2,
             "attention_head_dim": 12, "ffn_dim": 32, "freq_dim": 32, "rope_max_seq_len": 32},
    "small": {"base_dim": 16, "dim_mult": (1, 2, 4, 4), "text_dim": 64, "num_layers": 6, "num_attention_heads": 4,
              "attention_head_dim": 36, "ffn_dim": 512, "freq_dim": 256, "rope_max_seq_len": 128},
}  # fmt: skip

WORDS = """a an and are at away back behind beside big black blue bright brown by camera car city close closer colour
dark day down face fast field for forest from front grass gray green hand hands he head her his in into is it large
left light long looks man motion move moves moving near night of off old on one out over past person red right road
room scene shot she sits sky slow slowly small stands street sun talks the their they through to toward tree trees
turns two under up video view walks water white wind window with woman yellow young""".split()


def parse_args(input_args=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", required=True, help="Folder of the new pipeline.")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(input_args)


def build_tokenizer():
    """A `T5Tokenizer` from a list: common words, then single characters, so that no English caption is unknown."""
    letters = [chr(code) for code in (0xB0, *range(0xC0, 0x180), *range(0x2010, 0x2027))]  # accents, dashes, quotes
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -4.0)]
    vocab += [(f"▁{word}", -5.0) for word in WORDS if len(word) > 1]
    vocab += [(ending, -6.0) for ending in ("ing", "ed", "er", "es", "ly", "th", "an", "on", "re", "in")]
    vocab += [(character, -8.0) for character in (*string.printable[:94], *letters)]
    return T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def build_text_encoder(vocab_size, text_dim):
    """A random `UMT5EncoderModel`; its last norm gives every token embedding a root mean square of 1."""
    config = UMT5Config(vocab_size=vocab_size, d_model=text_dim, d_kv=text_dim // 2, d_ff=2 * text_dim, num_heads=2,
                        num_layers=1, dropout_rate=0.0)  # fmt: skip
    return UMT5EncoderModel(config).eval()


def smooth_videos(batch_size=4, num_frames=9, height=64, width=64):
    """Random smooth videos in [-1, 1], shape `(batch_size, 3, num_frames, height, width)`."""
    coarse = torch.randn(batch_size, 3, 3, 5, 5)
    return F.interpolate(coarse, size=(num_frames, height, width), mode="trilinear").tanh()


@torch.no_grad()
def measure_latents(vae, videos):
    """Write the latents' mean and std per channel over `videos`, each `(B, 3, F, H, W)`, to the VAE's config."""
    latents = [vae.encode(pixels).latent_dist.mode().transpose(0, 1).flatten(1) for pixels in videos]
    latents = torch.cat(latents, dim=1)  # (C, B * F * H * W)
    vae.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())


def build_small_wan(path, *, base_dim=16, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=1, text_dim=64, num_layers=6,
                    num_attention_heads=4, attention_head_dim=36, ffn_dim=512, freq_dim=256, rope_max_seq_len=128,
                    seed=0):  # fmt: skip
    """Save a `WanPipeline` with random weights to the folder `path`.

    Args:
        path (`str` or `Path`): The folder; `WanPipeline.from_pretrained(path)` loads it.
        base_dim, z_dim, dim_mult, num_res_blocks: The VAE, always 8x in space and 4x in time.
        text_dim (`int`): Width of the text encoder, hence of the prompt embeddings.
        num_layers, num_attention_heads, attention_head_dim, ffn_dim, freq_dim, rope_max_seq_len: The transformer.
        seed (`int`): Same seed, same weights. The caller's random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = build_tokenizer()
        text_encoder = build_text_encoder(len(tokenizer), text_dim)
        vae = AutoencoderKLWan(base_dim=base_dim, z_dim=z_dim, dim_mult=list(dim_mult), num_res_blocks=num_res_blocks,
                               temperal_downsample=[False, True, True]).eval()  # fmt: skip
        measure_latents(vae, [smooth_videos()])
        transformer = WanTransformer3DModel(
            in_channels=z_dim, out_channels=z_dim, text_dim=text_dim, num_layers=num_layers,
            num_attention_heads=num_attention_heads, attention_head_dim=attention_head_dim, ffn_dim=ffn_dim,
            freq_dim=freq_dim, rope_max_seq_len=rope_max_seq_len)  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    WanPipeline(tokenizer, text_encoder, vae, scheduler, transformer).save_pretrained(path)


def main(args):
    build_small_wan(args.output_dir, **PRESETS[args.preset], seed=args.seed)
    print(f"Saved {Path(args.output_dir)}")


if __name__ == "__main__":
    main(parse_args())
