"""What makers of fixtures are called with: a folder to make them in, and a seed."""

import argparse
from pathlib import Path

import torch


def run(description, make):
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make(arguments.out, arguments.seed)
