"""`train_ltd.py`, but rank 1 is given one more flag."""

import os
import sys

import torch

import train_ltd

if __name__ == "__main__":
    torch.set_num_threads(1)
    train_ltd.SECONDS_TO_END = 2  # no other rank has found the mistake, so none is ended meanwhile
    if os.environ["RANK"] == "1":
        sys.argv.append(os.environ["FLAG_OF_RANK_1"])
    train_ltd.run_script(train_ltd.main, train_ltd.parse_args)
