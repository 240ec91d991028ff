"""How much longer an update of a tiny training takes beside a process that keeps one core busy.

python benchmarks/beside_busy.py [--processes N] [key=value ...]: the tiny family's guidance on small
pictures, launched as a user does, under torchrun for several processes. Each round trains alone and then
beside the busy process, which is a session of its own as in another terminal. The median of 20 updates should
be at most 3 times as long; on a machine that does other work, "alone" is not.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parents[1]
UPDATES, WARM, ROUNDS = 24, 4, 3
BATCH = 2  # divides by one and two processes
SETTINGS = (
    "webdataset_path=figures/example_personalized", "image_size=96", "multi_aspect_ratio=[1/1]",
    f"batch_size={BATCH}", "pictures_at_once=1", "num_workers=0", f"updates={UPDATES}", "warmup_updates=1",
    "tracker=none", "experiment_id=run", "previewer_checkpoint_path=null",
)  # fmt: skip


@contextmanager
def busy_process() -> Iterator[None]:
    """Within it, another process keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def seconds_per_update(processes: int, overrides: list[str]) -> float:
    """The median of a training's updates."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with tempfile.TemporaryDirectory() as folder:
        words = ["train/train_t2i.py", "configs/tiny/train_t2i.yaml", *SETTINGS, f"checkpoint_path={folder}"]
        command = [sys.executable, *(launcher if processes > 1 else []), *words, *overrides]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        lines = Path(folder, "run", "log.jsonl").read_text("utf-8").splitlines()
    return median(BATCH / json.loads(line)["images_per_second"] for line in lines[WARM:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=1, help="of the training, under torchrun")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="any key of the configuration")
    arguments = parser.parse_args()
    alone, beside = [], []
    for _ in range(ROUNDS):
        alone.append(seconds_per_update(arguments.processes, arguments.overrides))
        with busy_process():
            beside.append(seconds_per_update(arguments.processes, arguments.overrides))
        print(f"alone {alone[-1]:.3f} s, beside a busy process {beside[-1]:.3f} s")
    print(f"medians: {median(beside) / median(alone):.2f} times as long")


if __name__ == "__main__":
    main()
