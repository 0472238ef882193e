"""Run a Python program as on a smaller machine, to play on one GPU what another one would do:

    python ci/limited.py [--gpu-gib 15] [--host-gb 12.7] [--cores 2] [-m MODULE | FILE] ARGUMENTS

GPU memory is limited in torch's allocator, which planners and backends are told of; a process whose own memory, with
its children's, passes the host limit ends with status 137, as under a kernel that kills it. Pages of files that it has
mapped, such as safetensors, are not counted, since a kernel takes them back before it kills; nor is memory that it
shares, for files in /dev/shm are that, too.
"""

from __future__ import annotations

import argparse
import os
import runpy
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def watch(limit_gb: float) -> None:
    import psutil

    own = psutil.Process()
    while True:
        held = 0
        for process in [own, *own.children(recursive=True)]:
            try:
                memory = process.memory_info()
                held += memory.rss - memory.shared
            except psutil.Error:  # it has just ended
                continue
        if held > limit_gb * 1e9:
            print(
                f"\nStopped: {held / 1e9:.1f} GB of host memory are held, and {limit_gb} are allowed.", file=sys.stderr
            )
            sys.stderr.flush()
            os._exit(137)
        time.sleep(0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu-gib", type=float, default=0.0)
    parser.add_argument("--host-gb", type=float, default=0.0)
    parser.add_argument("--cores", type=int, default=0)
    parser.add_argument("-m", dest="module", default="")
    given, program = parser.parse_known_args()
    if given.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    if given.host_gb:
        threading.Thread(target=watch, args=(given.host_gb,), daemon=True).start()
    if given.gpu_gib:
        import torch

        own = int(os.environ.get("LOCAL_RANK", 0))  # under torchrun
        total = torch.cuda.get_device_properties(own).total_memory / 2**30
        torch.cuda.set_per_process_memory_fraction(min(1.0, given.gpu_gib / total), own)
    if given.module:
        sys.argv = [given.module, *program]
        runpy.run_module(given.module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = program
        runpy.run_path(program[0], run_name="__main__")


if __name__ == "__main__":
    main()
