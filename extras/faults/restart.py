"""
Kill processes of a training under torchrun, which starts all of them again: what is finished at last is,
byte for byte, what an undisturbed run of as many processes makes.

    python extras/faults/restart.py --kills=3        on a CPU; needs `python prepare/all.py --only=sample`

TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is needed for it: without it processes that are started again look for
one another at their old addresses, with torch 2.13 and gloo, and fail or wait. Three kills found nothing.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[0] = str(ROOT)  # the repository, not this folder

from extras.bench.progress import tell
from plumbing.files import newest_checkpoint
from plumbing.flags import UserError, parse_command_line, run

FLAGS = ("--model=sample --data=sample --language=full --questions_per_image=0 "
         "--micro_batch_tokens=512 --batch_size=12 --max_steps=60 --save_every=5 --log_every=1 --held_out=8 "
         "--workers=1 --learning_rate=1e-3 --resume=true").split()


@dataclass(frozen=True)
class Config:
    kills: int = 3  # at most 3 fit into the run
    processes: int = 2  # of the group
    shards_dir: str = "shards"  # where prepare/all.py put the sample


def train(folder, kills, config):
    """Train under torchrun, killing one rank after the other as the log grows; the kills that were made."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={config.processes}",
               "--standalone", f"--max-restarts={2 * kills}", "--", "train_vlm.py", *FLAGS,
               f"--shards_dir={config.shards_dir}", f"--run={folder}"]
    output = open(f"{folder}.txt", "w")
    group = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env={
        **os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})
    log, killed = folder / "log.jsonl", 0
    while group.poll() is None:
        time.sleep(0.2)
        steps = len(log.read_text().splitlines()) if log.exists() else 0
        if killed < kills and steps > 10 + 15 * killed:
            ranks = subprocess.run(["pgrep", "-P", str(group.pid)], capture_output=True, text=True)
            os.kill(int(ranks.stdout.split()[killed % config.processes]), signal.SIGKILL)
            killed += 1
            tell(f"{killed} of {kills} kills, at step {steps}")
            time.sleep(3)  # until torchrun has seen it
    if group.returncode:
        words = Path(output.name).read_text()[-2000:]
        raise UserError(f"torchrun ended with code {group.returncode}: ...{words}")
    return killed


def main(config):
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, disturbed = Path(folder, "undisturbed"), Path(folder, "disturbed")
        train(undisturbed, 0, config)
        killed = train(disturbed, config.kills, config)
        ours, theirs = (
            {path.relative_to(of): path.read_bytes() for path in newest_checkpoint(of).rglob("*.safetensors")}
            for of in (undisturbed, disturbed))
    same = "the same bytes as" if ours == theirs else "OTHER BYTES THAN"
    print(f"{killed} kills; {len(theirs)} files of the last checkpoint have {same} an undisturbed run's")


if __name__ == "__main__":
    run(main, parse_command_line(Config))
