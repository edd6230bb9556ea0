"""`train_ltd.py`, but for an error in the third micro-batch of rank 1."""

import itertools
import os
import sys

import torch

import train_ltd

if __name__ == "__main__":
    torch.set_num_threads(1)
    calls = itertools.count(1)

    def fail(*args):
        if os.environ["RANK"] == "1" and next(calls) == 3:
            raise RuntimeError("this rank has had enough")
        return train_ltd.compute_loss(*args)

    train_ltd.main(train_ltd.parse_args(sys.argv[1:]), fail)
