"""
Plant bugs into what writes and reads checkpoints, one at a time, and see which test finds each.

    python extras/faults/mutants.py                a quarter of an hour on one core
    python extras/faults/mutants.py --only=fsync   those whose description has this word

Every mutant is a copy of the repository with a few words replaced; the one test or campaign named with
it has to fail there, and passes without the bug. All 36 are found.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not extras/faults/

import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass

from extras.faults.tiny import prepare
from plumbing.flags import UserError, parse_command_line, run

LOST, DISK = "lost_writes.py --unfinished=false", "full_disk.py --sizes=4"
KILLS = "kill.py --kills=25 --steps=12"
CALLS = "calls.py --errors=EIO --limits=0 --only="
WHOLE, RESUMED = "test_checkpoints.py::", "test_train.py::test_resumed_run_equals_undisturbed"
RANKS = "test_ranks.py::"
STATE = "test_cls.py::test_a_damaged_state_or_model_is_refused_and_an_older_whole_state_is_used"
FILES_SYNCED = '''    for path in [*paths, partial / "manifest.json", partial]:
        sync(path)
'''
NAMED = '''    if folder.exists():
        raise FileExistsError(errno.EEXIST, "there already", str(folder))
    partial.rename(folder)
'''
MUTANTS = [  # what is wrong, in which file, [(its words, the words instead), ...], what finds it
    ("no fsync of a checkpoint's files", "plumbing/files.py", [(FILES_SYNCED, "")], LOST),
    ("no fsync of the manifest", "plumbing/files.py",
     [('[*paths, partial / "manifest.json", partial]', "[*paths]")], LOST),
    ("no fsync of the folders in a checkpoint", "plumbing/files.py",
     [("[*paths, partial", "[*filter(Path.is_file, paths), partial")], LOST),
    ("no fsync after a checkpoint got its name", "plumbing/files.py",
     [("    partial.rename(folder)\n    sync(folder.parent)\n", "    partial.rename(folder)\n")], LOST),
    ("no fsync of a new run's own name", "train_vlm.py",
     [("        sync(path.absolute().parent)  #", "        pass  #")], LOST),
    ("no fsync of the log before a checkpoint", "train_vlm.py",
     [('sync(folder / "log.jsonl")', "pass")], LOST),
    ("no fsync before a rewritten file takes its place", "plumbing/files.py",
     [("    sync(partial)\n", "")], LOST),
    ("a checkpoint gets its name before its manifest", "plumbing/files.py",
     [(NAMED, ""),
      ('    manifest = {**facts, "name"', "    partial.rename(folder)\n    partial = folder\n"
       '    paths = sorted(partial.rglob("*"))\n    manifest = {**facts, "name"')],
     CALLS + "write,fsync"),
    ("an old checkpoint is removed file by file under its own name", "train_vlm.py",
     [("            old.rename(removed)\n            shutil.rmtree(removed)",
       "            shutil.rmtree(old)")],
     CALLS + "unlinkat"),
    ("the old checkpoints go before the new one is saved", "train_vlm.py",
     [("    try:\n        model.save(partial", "    try:\n        for old in checkpoints(run):\n"
       "            shutil.rmtree(old)\n        model.save(partial")], CALLS + "write"),
    ("an error while saving is swallowed", "train_vlm.py",
     [('raise UserError(f"{folder}: not saved', 'print(f"{folder}: not saved'),
      ('"the newest checkpoint") from None', '"the newest checkpoint")')], DISK),
    ("what a failed save wrote stays", "train_vlm.py",
     [("        shutil.rmtree(partial, ignore_errors=True)\n", "")], DISK),
    ("a manifest's checksum is not checked", "plumbing/files.py",
     [('return manifest if manifest["checksum"] == manifest_checksum(manifest) else None',
       "return manifest")],
     WHOLE + "test_every_flipped_bit_is_found"),
    ("a file's hash is not checked", "plumbing/files.py", [('if hash_file(path) != facts["sha256"]', "if False")],
     WHOLE + "test_every_flipped_bit_is_found"),
    ("a file's size is not checked", "plumbing/files.py",
     [('if path.stat().st_size != facts["bytes"]', "if False")],
     WHOLE + "test_a_damaged_checkpoint_is_passed_over_again_and_again"),
    ("files in folders are not in the manifest", "plumbing/files.py",
     [('sorted(partial.rglob("*"))', 'sorted(partial.glob("*"))')],
     WHOLE + "test_every_flipped_bit_is_found"),
    ("the newest checkpoint is loaded unverified", "plumbing/files.py",
     [("        if damage is None:\n            return folder", "        return folder")],
     WHOLE + "test_a_damaged_checkpoint_is_passed_over_again_and_again"),
    ("steps are compared as words", "plumbing/files.py",
     [("key=lambda path: int(path.name[5:])", "key=lambda path: path.name")],
     "test_faults.py::test_a_million_steps_are_more_than_ten"),
    ("a bad sector ends the search", "plumbing/files.py",
     [("except OSError as error:  # a bad", "except KeyError as error:  # a bad")],
     "test_faults.py::test_an_unreadable_checkpoint_is_passed_over"),
    ("what was saved is not read again", "train_vlm.py",
     [("if damage := find_damage(folder):", "if damage := None:")],
     "test_faults.py::test_what_a_disk_alters_while_it_is_saved_is_told_at_once"),
    ("a name is given twice", "plumbing/files.py",
     [(NAMED, '    partial.rename(folder.with_name("other") if folder.exists() else folder)\n')],
     WHOLE + "test_a_name_is_given_once"),
    ("one checkpoint too few stays", "train_vlm.py", [("[config.keep:]", "[config.keep - 1:]")],
     WHOLE + "test_the_newest_few_stay_and_damaged_ones_are_set_aside"),
    ("nothing is removed", "train_vlm.py", [("[config.keep:]", "[10 ** 9:]")],
     WHOLE + "test_the_newest_few_stay_and_damaged_ones_are_set_aside"),
    ("damaged checkpoints are not set aside", "train_vlm.py",
     [('damaged.rename(folder / f"damaged_{time.time_ns()}_{damaged.name}")', "pass")],
     WHOLE + "test_the_newest_few_stay_and_damaged_ones_are_set_aside"),
    ("the sweep takes whole checkpoints along", "train_vlm.py",
     [('folder.glob("partial_step_*")', 'folder.glob("*step_*")')], RESUMED),
    ("the sweep leaves what is unfinished", "train_vlm.py",
     [('[*folder.glob("partial_step_*"), *folder.glob("removed_step_*")]', "[]")],
     WHOLE + "test_what_a_killed_run_left_is_swept"),
    ("a signal ends the run unsaved", "train_vlm.py",
     [("if due or stopped or done", "if due or done")],
     WHOLE + "test_a_signal_lets_the_step_end_saves_and_exits_with_its_code"),
    ("a signal ends the run as if it were finished", "train_vlm.py",
     [("sys.exit(128 + stopped)", "sys.exit(0)")],
     WHOLE + "test_a_signal_lets_the_step_end_saves_and_exits_with_its_code"),
    ("dropout does not depend on the step", "data.py",
     [("2 * len(self.shards) + 2, number,", "2 * len(self.shards) + 2, 0,")],
     "test_batches.py::test_steps_and_layers_drop_different_channels"),
    ("the optimizer's moments are not restored", "train_vlm.py",
     [("        load_optimizer(optimizer, model, checkpoint)\n", "")], RESUMED),
    ("a resumed run leaves out a step", "train_vlm.py",
     [("first = int(checkpoint.name[5:])", "first = int(checkpoint.name[5:]) + 1")], RESUMED),
    ("a resumed run doubles lines of the log", "train_vlm.py",
     [('if json.loads(line)["step"] <= first else []', "")], KILLS),
    ("processes do not sum their gradients", "train_vlm.py",
     [("    dist.all_reduce(flat)\n", "")],
     RANKS + "test_two_processes_have_the_losses_of_one_and_go_on_as_one"),
    ("split gradients are averaged", "train_vlm.py",
     [("        module.set_gradient_divide_factor(1.0)\n", "")],
     RANKS + "test_a_split_language_model_that_trains_in_full_learns_the_same"),
    ("a classifier goes on from a damaged state", "plumbing/results.py",
     [("if not (damage := find_damage(state)):", "if not (damage := None):")], STATE),
    ("a damaged classifier predicts", "train_cls.py",
     [("if damage := find_damage(path):", "if damage := None:")], STATE),
]


@dataclass(frozen=True)
class Config:
    only: str = ""  # mutants whose description has these words; none: all


def passes(test, repository, shards):
    """Whether a test or a campaign passes in this copy; None if it ended in another way."""
    if "::" in test:
        words = ["-m", "pytest", "-n0", "-x", "-q", "-p", "no:cacheprovider", f"tests/{test}"]
    else:
        words = [f"extras/faults/{test.split()[0]}", *test.split()[1:], f"--shards_dir={shards}"]
    try:
        done = subprocess.run([sys.executable, *words], cwd=repository, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300)
    except subprocess.TimeoutExpired:
        return None
    return {0: True, 1: False}.get(done.returncode)


def main(config):
    begin, passed, missed = time.perf_counter(), {}, 0
    chosen = [mutant for mutant in MUTANTS if config.only in mutant[0]]
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=sys.path[0], check=True,
                           capture_output=True, text=True).stdout.splitlines()
    names = [name for name in names if (Path(sys.path[0]) / name).is_file()]
    with tempfile.TemporaryDirectory() as folder:
        copy, shards = Path(folder) / "repository", Path(folder) / "shards"
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(sys.path[0]) / name, copy / name)
        prepare(shards)
        for what, name, changes, test in chosen:
            if test not in passed:
                passed[test] = passes(test, copy, shards)
                if not passed[test]:
                    raise UserError(f"{test} does not even pass without a bug")
            original = mutated = (copy / name).read_text()
            for old, new in changes:
                if mutated.count(old) != 1:
                    raise UserError(f"{what}: {name} has {old!r} {mutated.count(old)} times")
                mutated = mutated.replace(old, new)
            (copy / name).write_text(mutated)
            found = passes(test, copy, shards) is False
            missed += not found
            print(f"{'found' if found else 'MISSED':6}  {what}, by {test}", flush=True)
            (copy / name).write_text(original)
    print(f"{len(chosen) - missed} of {len(chosen)} bugs found, in {time.perf_counter() - begin:.0f} s")
    if missed:
        sys.exit(1)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
