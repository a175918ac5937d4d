"""`fit` whose processes all end by SIGKILL with half of a certain file written.

python fit_killed.py PART ARGUMENTS...    PART: what only the path of that file has in it
"""

import os
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch


def dying(write, part):
    """The function that writes, but for one file."""

    def write_or_die(content, path, *arguments, **settings):
        if part in str(path):
            Path(path).write_bytes(b"half of a")
            os.killpg(os.getpgrp(), signal.SIGKILL)
        return write(content, path, *arguments, **settings)

    return write_or_die


if __name__ == "__main__":
    torch.save = dying(torch.save, sys.argv[1])
    safetensors.torch.save_file = dying(safetensors.torch.save_file, sys.argv[1])
    from metaembed_pl.cli.main import main

    sys.exit(main(["fit", *sys.argv[2:]]))
