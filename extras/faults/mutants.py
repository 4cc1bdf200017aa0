"""
Plant bugs, one at a time, and see which test finds each: into what writes and reads checkpoints, and where a
bug gives wrong results and no traceback, from pixels, labels and masks to metrics.

    python extras/faults/mutants.py                half an hour on one core
    python extras/faults/mutants.py --only=fsync   those whose description has this word

Every mutant is a copy of the repository with a few words replaced; the one test or campaign named with
it has to fail there, and passes without the bug.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)  # the repository, not this folder

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
RANKS, RUNS = "test_ranks.py::", "test_runs.py::"
PACKED, MODEL, FOLDER = "test_packing.py::", "test_model.py::", "test_folder.py::"
TOGETHER = "test_generate.py::test_generation_together_equals_uncached_generation_one_at_a_time"
GRPO, BOXES = "test_grpo.py::", "test_boxes.py::"
CHOICES, HARNESS = "test_choices.py::", "test_harness.py::"
OSS, MXFP4 = "test_gpt_oss.py::", "test_mxfp4.py::"
QWEN, GOLDEN = "test_qwen3_vl.py::", "test_qwen3_vl.py::test_golden_numbers_of_a_tiny_model"
SCORES, BLEU = "test_cls_metrics.py::", "test_eval.py::test_bleu1_agrees_with_an_independent_statement"
RANGES = "test_flags.py::test_a_value_out_of_its_range_is_named_in_one_line"
KINDS = "test_pixels.py::test_each_kind_of_file_becomes_what_the_table_says"
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
    ("no fsync of a new run's own name", "plumbing/runs.py",
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
    ("an old checkpoint is removed file by file under its own name", "run.py",
     [("        old.rename(removed)\n        shutil.rmtree(removed)", "        shutil.rmtree(old)")],
     CALLS + "unlinkat"),
    ("the old checkpoints go before the new one is saved", "run.py",
     [("    with sealed(folder, step", "    for old in checkpoints(run):\n        shutil.rmtree(old)\n"
       "    with sealed(folder, step")], CALLS + "write"),
    ("an error while saving is swallowed", "run.py",
     [("import math\nimport shutil\n", "import contextlib\nimport math\nimport shutil\n"),
      ("    with sealed(folder, step", "    with contextlib.suppress(UserError), sealed(folder, step"),
      ("if damage := find_damage(folder):", "if damage := folder.exists() and find_damage(folder):")], DISK),
    ("what a failed save wrote stays", "plumbing/files.py",
     [("        shutil.rmtree(partial, ignore_errors=True)\n        raise", "        raise")], DISK),
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
     [("key=lambda path: int(path.name[5:]), reverse", "key=lambda path: path.name, reverse")],
     "of_extras/test_faults.py::test_a_million_steps_are_more_than_ten"),
    ("a bad sector ends the search", "plumbing/files.py",
     [("except OSError as error:  # a bad", "except KeyError as error:  # a bad")],
     "of_extras/test_faults.py::test_an_unreadable_checkpoint_is_passed_over"),
    ("what was saved is not read again", "run.py", [("if damage := find_damage(folder):", "if damage := None:")],
     "of_extras/test_faults.py::test_what_a_disk_alters_while_it_is_saved_is_told_at_once"),
    ("a name is given twice", "plumbing/files.py",
     [(NAMED, '    partial.rename(folder.with_name("other") if folder.exists() else folder)\n')],
     WHOLE + "test_a_name_is_given_once"),
    ("one checkpoint too few stays", "run.py", [("[keep:]", "[keep - 1:]")],
     WHOLE + "test_the_newest_few_stay_and_damaged_ones_are_set_aside"),
    ("nothing is removed", "run.py", [("[keep:]", "[10 ** 9:]")],
     WHOLE + "test_the_newest_few_stay_and_damaged_ones_are_set_aside"),
    ("the best checkpoint is removed like any other", "run.py", [(" - {best_checkpoint(run)}", "")],
     RUNS + "test_the_best_checkpoint_by_held_out_loss_stays_beside_the_newest"),
    ("a run that goes on forgets the lowest loss that it had", "train_vlm.py",
     [("agree(lambda: lowest_held_out_loss(folder))", "math.inf")],
     RUNS + "test_the_best_checkpoint_by_held_out_loss_stays_beside_the_newest"),
    ("damaged checkpoints are not set aside", "plumbing/runs.py",
     [('damaged.rename(folder / f"damaged_{time.time_ns()}_{damaged.name}")', "pass")],
     WHOLE + "test_the_newest_few_stay_and_damaged_ones_are_set_aside"),
    ("the sweep takes whole checkpoints along", "plumbing/runs.py",
     [('folder.glob(".step_*.partial")', 'folder.glob("*step_*")')], RESUMED),
    ("the sweep leaves what is unfinished", "plumbing/runs.py",
     [('[*folder.glob(".step_*.partial"), *folder.glob("removed_step_*")]', "[]")],
     WHOLE + "test_what_a_killed_run_left_is_swept"),
    ("a signal ends the run unsaved", "train_vlm.py",
     [("if due or stopped or done", "if due or done")],
     WHOLE + "test_a_signal_lets_the_step_end_saves_and_exits_with_its_code"),
    ("a signal ends the run as if it were finished", "plumbing/signals.py",
     [("goes on\")\n    sys.exit(128 + number)", "goes on\")")],
     WHOLE + "test_a_signal_lets_the_step_end_saves_and_exits_with_its_code"),
    ("dropout does not depend on the step", "data.py",
     [("+ DROPOUT, number,", "+ DROPOUT, 0,")],
     "test_batches.py::test_steps_and_layers_drop_different_channels"),
    ("the optimizer's moments are not restored", "train_vlm.py",
     [("        load_optimizer(optimizer, model, checkpoint)\n", "")], RESUMED),
    ("a resumed run leaves out a step", "train_vlm.py",
     [("first = int(checkpoint.name[5:])", "first = int(checkpoint.name[5:]) + 1")], RESUMED),
    ("a resumed run doubles lines of the log", "plumbing/runs.py",
     [(' if first and json.loads(line)["step"] <= first else []', "")], KILLS),
    ("processes do not sum their gradients", "plumbing/devices.py", [("    dist.all_reduce(flat)\n", "")],
     RANKS + "test_two_processes_have_the_losses_of_one_and_go_on_as_one"),
    ("split gradients are averaged", "plumbing/devices.py", [("        module.set_gradient_divide_factor(1.0)\n", "")],
     RANKS + "test_a_split_language_model_that_trains_in_full_learns_the_same"),
    ("a process that shares a model fills its part with another's", "plumbing/devices.py",
     [("parameter.to_local().copy_(mine.to_local())", "parameter.to_local().copy_(mine.to_local().flip(0))")],
     RANKS + "test_a_split_language_model_learns_the_same"),
    ("a classifier goes on from a damaged state", "tasks/encoders.py",
     [("return newest_checkpoint(folder)", "return checkpoints(folder)[0]")], STATE),
    ("a damaged classifier predicts", "weights.py",
     [("if damage := find_damage(path):", "if damage := None:")], STATE),
    # What would give wrong results without a word: masks, positions and the key-value cache
    ("of two questions the second sees the first", "plumbing/kernels.py",
     [("number.max() <= 1", "number.max() <= 2")],
     PACKED + "test_editing_one_branch_leaves_the_others_bit_identical"),
    ("questions that are computed together see one another", "plumbing/kernels.py",
     [("(own[None] == own[:, None]).tril()", "(own[None] > 0).expand(len(own), -1).tril()")],
     PACKED + "test_branches_are_computed_in_bundles_behind_their_prefix"),
    ("questions see those that were computed before them, not their prefix", "plumbing/kernels.py",
     [("back * (prefix > 0)", "1 * (prefix > 0)")],
     PACKED + "test_branches_are_computed_in_bundles_behind_their_prefix"),
    ("in FlexAttention a question sees the groups before its own", "model.py",
     [("(group[at] == group[other]) & own", "own")],
     PACKED + "test_attention_of_packed_groups_is_the_dense_one_either_way"),
    ("positions do not restart behind the image", "data.py",
     [("np.repeat(piece_ends - piece_lengths, piece_lengths) + first", "0")],
     PACKED + "test_supervised_positions_of_a_hand_made_sequence"),
    ("a sample's weight counts for nothing", "model.py", [("(batch.weights * F.cross_entropy", "(F.cross_entropy")],
     PACKED + "test_weights_of_one_are_the_plain_loss_and_others_weigh"),
    ("rotary angles turn the other way", "model.py",
     [("torch.cat([-sin, sin], dim=-1)", "torch.cat([sin, -sin], dim=-1)")],
     MODEL + "test_llama_logits_equal_those_of_transformers"),
    ("positions of generated words are one too high", "generate.py",
     [("piece.branch, position, [token]", "piece.branch, position + 1, [token]")], TOGETHER),
    ("questions that are answered together see one another", "generate.py",
     [("(of_slot == 0) |", "(of_slot >= 0) |")], TOGETHER),
    ("a slot of the cache is off by one", "generate.py",
     [("slot = self.used[row] + lane", "slot = self.used[row] + lane - 1")], TOGETHER),
    ("a row of the cache keeps what was in it", "generate.py", [("cache.used[row] = 0", "pass")],
     "test_generate.py::test_groups_are_taken_in_as_others_are_finished"),
    ("GRPO: no baseline", "grpo.py", [("rewards - rewards.mean(axis=1, keepdims=True)", "rewards * 1.0")],
     f"{GRPO}test_advantages_and_shares_by_hand"),
    ("GRPO: the worse answers become likelier", "grpo.py", [("loss, divergence = -torch", "loss, divergence = torch")],
     f"{GRPO}test_a_steps_gradient_is_that_of_the_expected_reward"),
    ("GRPO: what ends an answer is not trained", "grpo.py",
     [("answer.tokens + [answer.stop] * (answer.stop is not None)", "answer.tokens")],
     f"{GRPO}test_sampled_log_probabilities_are_those_of_training"),
    ("GRPO: the better of bounded and unbounded", "grpo.py", [("torch.minimum(", "torch.maximum(")],
     f"{GRPO}test_what_is_clipped_gives_no_gradient"),
    ("GRPO: trained at another temperature than sampled", "grpo.py",
     [("logits if temperature == 1 else logits / temperature", "logits")],
     f"{GRPO}test_sampled_log_probabilities_are_those_of_training"),
    ("GRPO: shares are those of the reversed order", "grpo.py",
     [("[sample.share for sample in samples]", "[sample.share for sample in samples[::-1]]")],
     f"{GRPO}test_a_group_behind_one_prompt_has_the_loss_and_gradient_of_its_answers_alone"),
    ("GRPO: the divergence is from the model itself", "grpo.py",
     [("d = micro.anchor - values", "d = values.detach() - values")],
     f"{GRPO}test_the_anchor_of_new_lora_is_the_model_without_it"),
    ("GRPO: the anchor stays in the model's place", "train_grpo.py",
     [("            p.copy_(now[name])\n", "            pass\n")],
     f"{GRPO}test_the_anchor_of_new_lora_is_the_model_without_it"),
    ("GRPO: what is drawn does not depend on the step", "train_grpo.py",
     [("default_rng([config.seed, step, place])", "default_rng([config.seed, place])")],
     f"{GRPO}test_each_step_and_prompt_draws_anew"),
    ("GRPO: ranks draw by their own count", "train_grpo.py",
     [("for place in range(rank, len(prompts), ranks)]", "for place in range(len(some))]")],
     f"{GRPO}test_two_processes_are_as_one"),
    ("boxes: boxes too many cost nothing", "tasks/boxes.py",
     [("200 * matched / (predicted + true))", "100 * matched / max(true, 1))")],
     f"{BOXES}test_scores_by_hand"),
    ("boxes: text behind the last box is passed over", "tasks/boxes.py",
     [("    if label.strip():\n", "    if False:\n")],
     f"{BOXES}test_what_cannot_be_read_is_no_answer"),
    ("choices: a likelihood is of the place, not of the option", "asking.py",
     [("letter[options.order[place]] =", "letter[place] =")],
     f"{CHOICES}test_a_likelihood_belongs_to_its_option_in_whatever_order"),
    ("choices: options are rated in the order in which they are listed", "asking.py",
     [("key=lambda place: options.answers[place])", "key=lambda place: place)")],
     f"{CHOICES}test_shared_prompts_are_unshared_ones_and_the_order_of_options_changes_no_bit"),
    ("choices: of a letter the token behind it counts, too", "asking.py",
     [("range(1, min(map(len, answers)) + 1)", "range(3, min(map(len, answers)) + 1)")],
     f"{CHOICES}test_likelihoods_are_those_of_transformers_one_option_at_a_time"),
    ("choices: the exchanged images are not shown", "asking.py",
     [("asked = exchanged(prompt, instead)", "asked = prompt.copy()")],
     f"{CHOICES}test_a_prompt_in_its_own_words_is_the_stored_one"),
    ("choices: what cannot be read is the first option", "tasks/choices.py",
     [("return same[0] if len(same) == 1 else None", "return same[0] if len(same) == 1 else 0")],
     f"{CHOICES}test_strict_reading_guesses_nothing"),
    ("choices: turned options are compared where they are not", "tasks/choices.py",
     [("order.index(right) if right >= 0 else -1", "right")],
     f"{CHOICES}test_a_model_that_favours_a_letter_is_shown_up"),
    ("choices: the question is left in", "tasks/choices.py",
     [('{**record, "question": options, "context": ""}, own)', '{**record, "context": ""}, own)')],
     f"{CHOICES}test_ways_turn_the_options_and_leave_the_question_out"),
    ("reports: the prior's report is left in", "tasks/reports.py",
     [('part.startswith("Prior report:") if', "False if")],
     "test_report_task.py::test_a_study_is_put_without_its_prior_and_with_films_exchanged"),
    ("reports: films are not exchanged", "tasks/reports.py",
     [("order[now], order[before] = before, now", "order[now], order[before] = now, before")],
     f"{HARNESS}test_a_model_that_reads_the_prior_loses_what_it_should"),
    ("reasoning: what stands before the answer is scored with it", "tasks/scoring.py",
     [("reasoning.answer_of(record, text)) for record, note", "text) for record, note")],
     "test_reasoning.py::test_reasoning_is_trained_on_and_kept_apart"),
    ("harness: an evaluation of other code is passed over", "tasks/evaluations.py",
     [('and facts["machine"]["commit"] == machine["commit"]', "")],
     f"{HARNESS}test_other_code_or_other_flags_answer_again"),
    ("harness: damaged answers are passed over", "tasks/evaluations.py",
     [('and hash_file(folder / name) == file["sha256"]', "")],
     f"{HARNESS}test_what_is_damaged_is_answered_again"),
    # What others who wrote Qwen3-VL by hand got wrong
    ("Qwen: no DeepStack", "zoo/qwen3_vl.py", [("if layer < len(deepstack):", "if False:")], GOLDEN),
    ("Qwen: another base of the text's angles", "zoo/qwen3_vl.py", [("config.rope_theta **", "1e4 **")], GOLDEN),
    ("Qwen: positions of one axis", "zoo/qwen3_vl.py",
     [("placed[image_at] = placed[first[image]] + grid", "placed[image_at] = positions[image_at, None]")], GOLDEN),
    ("Qwen: what follows an image begins where its tokens end", "zoo/qwen3_vl.py",
     [("placed -= (behind", "placed -= 0 * (behind")], GOLDEN),
    ("Qwen: an image of another branch moves positions", "zoo/qwen3_vl.py",
     [("        behind &= (branch[first] == 0) | (branch[:, None] == branch[first])\n", "")],
     QWEN + "test_each_branch_is_placed_behind_its_own_images_alone"),
    ("Qwen: angles in chunks, not interleaved", "zoo/qwen3_vl.py",
     [("torch.where(pair < 3 * last, pair % 3, 0)",
       "(pair >= config.mrope_section[0]).long() + (pair >= sum(config.mrope_section[:2]))")], GOLDEN),
    ("Qwen: patches row by row", "zoo/qwen3_vl.py",
     [("return grid.transpose(-3, -2).flatten(-4)", "return grid.flatten(-4)")], GOLDEN),
    ("Qwen: the exact GELU in the tower", "zoo/qwen3_vl.py", [(', approximate="tanh"', "")], GOLDEN),
    ("Qwen: the tanh GELU in the mergers", "zoo/qwen3_vl.py",
     [("F.gelu(self.linear_fc1(x)))\n", 'F.gelu(self.linear_fc1(x), approximate="tanh"))\n')], GOLDEN),
    ("Qwen: positions between the patches' middles", "zoo/qwen3_vl.py",
     [("align_corners=True", "align_corners=False")], GOLDEN),
    ("Qwen: keys that are not normalised", "zoo/qwen3_vl.py", [("rotate(self.k_norm(k)", "rotate((k)")], GOLDEN),
    ("Qwen: rows and columns exchanged in the tower", "zoo/qwen3_vl.py",
     [("place = in_blocks(place, m).T", "place = in_blocks(place, m).T.flip(1)")], GOLDEN),
    ("Qwen: one frame's weight alone", "zoo/qwen3_vl.py", [(".float().sum(2)", ".float()[:, :, 0]")],
     QWEN + "test_logits_and_greedy_answers_are_those_of_transformers"),
    ("Qwen: a head of its own is taken for the embeddings", "zoo/qwen3_files.py",
     [("                require_tied(files, file)\n", "")],
     QWEN + "test_a_head_beside_tied_embeddings_has_to_equal_them"),
    # Where gpt-oss is no LLaMA; mistakes in its formulas are planted by test_gpt_oss.py itself
    ("gpt-oss: the log-sum-exp beside a sink has no gradient", "model.py",
     [("sigmoid(aux.lse - sinks", "sigmoid(aux.lse.detach() - sinks")],
     OSS + "test_sinks_by_the_log_sum_exp_have_the_gradients_of_a_key_of_nothing"),
    ("gpt-oss: a piece sees the beginning of the one before it", "model.py",
     [("x[number - back][first:]", "x[number - back][:seen.shape[1] - length]")],
     OSS + "test_attention_within_a_window_in_pieces_is_the_dense_one"),
    ("gpt-oss: a window by places in the row", "zoo/gpt_oss.py",
     [("positions.split(", "torch.arange(len(positions)).split(")],
     OSS + "test_packed_loss_and_gradients_equal_samples_run_alone"),
    ("gpt-oss: sliding layers see all of the cache", "zoo/gpt_oss.py",
     [("near=self.config.slides(layer)", "near=False")], OSS + "test_logits_out_of_the_cache_are_those_without_it"),
    ("gpt-oss: a window of the cache is one wider", "generate.py", [("< self.window", "<= self.window")],
     OSS + "test_logits_out_of_the_cache_are_those_without_it"),
    ("gpt-oss: sinks are scaled as scores are", "plumbing/kernels.py",
     [("(sinks.to(q.dtype) * hs ** 0.5)", "sinks.to(q.dtype)")], OSS + "test_a_key_of_nothing_is_one_logit_more"),
    ("gpt-oss: shares of experts have no gradient", "zoo/gpt_oss.py",
     [("return largest.softmax(-1), chosen", "return largest.softmax(-1).detach(), chosen")],
     OSS + "test_a_frozen_router_hands_gradients_on"),
    ("gpt-oss: gates are clamped below, too", "zoo/gpt_oss.py",
     [("x[:, ::2].clamp(max=limit)", "x[:, ::2].clamp(-limit, limit)")], OSS + "test_an_expert_by_hand"),
    ("gpt-oss: an expert's LoRA drops by other tokens' keys", "zoo/gpt_oss.py",
     [("keys.wanted)[rows])", "keys.wanted)[:len(rows)])")],
     OSS + "test_dropout_of_experts_is_by_token_packed_recomputed_and_alone"),
    ("gpt-oss: a norm rounds before its weight", "zoo/gpt_oss.py",
     [("(self.weight.float() * wide).to(x.dtype)", "self.weight.to(x.dtype) * wide.to(x.dtype)")],
     OSS + "test_a_norm_in_bfloat16_rounds_once_behind_its_weight"),
    ("gpt-oss: the high nibble comes first", "zoo/mxfp4.py",
     [("[values.repeat(16), values.repeat_interleave(16)]", "[values.repeat_interleave(16), values.repeat(16)]")],
     MXFP4 + "test_the_low_nibble_comes_first"),
    ("gpt-oss: the lowest scale is 0", "zoo/mxfp4.py", [("(bits % 255 == 0).int() << 22", "(bits == 255).int() << 22")],
     MXFP4 + "test_a_scale_is_a_power_of_two_down_to_the_last_and_255_is_no_number"),
    # Metrics
    ("the brevity penalty is turned round", "tasks/vqa.py",
     [("math.exp(1 - len(wanted) / len(predicted))", "math.exp(1 - len(predicted) / len(wanted))")], BLEU),
    ("a word that is repeated counts each time", "tasks/vqa.py",
     [("sum((Counter(predicted) & Counter(wanted)).values())", "sum(word in wanted for word in predicted)")],
     BLEU),
    ("a draw without a closed question leaves no interval", "tasks/stats.py",
     [("np.nanpercentile(", "np.percentile(")],
     "test_eval.py::test_a_resample_without_a_closed_question_blanks_no_cell"),
    ("questions are resampled in place of images", "tasks/stats.py",
     [("_, groups = np.unique(groups, return_inverse=True)", "groups = np.arange(len(groups))")],
     "test_eval.py::test_bootstrap_is_that_of_resampling_the_questions_themselves"),
    ("images are resampled in place of patients", "tasks/labels.py",
     [("multi_label), groups)", "multi_label), range(len(groups)))")],
     "test_cls_runs.py::test_the_interval_draws_patients"),
    ("macro-F1 is a mean over classes that do not occur", "tasks/labels.py",
     [("np.maximum(occurs.sum(-1), 1)", "occurs.shape[-1]")],
     SCORES + "test_one_class_an_image_agrees_with_scikit_learn"),
    ("signs are flipped for one side alone", "tasks/labels.py",
     [("np.abs(signs @ differences) >= abs(differences.sum())", "signs @ differences >= differences.sum()")],
     SCORES + "test_sign_flip"),
    ("p of many differences may be 0", "tasks/labels.py", [("    signs[0] = 1  #", "    pass  #")],
     SCORES + "test_p_of_many_differences_is_never_0"),
    ("the lowest seed decides which runs are averaged", "tasks/encoders.py",
     [("most = max(hashes, key=lambda key: counts[hashes[key]])", "most = min(hashes)")],
     "test_cls_runs.py::test_most_seeds_decide_which_are_averaged"),
    # The leak guard
    ("mirrored copies are not proposed", "prepare/looks.py",
     [("np.where(np.arange(16) % 2, np.float32(-1), np.float32(1))", "np.ones(16, np.float32)")],
     "test_leaks.py::test_proposed_pairs_are_those_of_a_comparison_one_by_one"),
    ("numbers of images are taken for those of samples", "prepare/leaks.py",
     [("np.unique(self.sample[np.isin(self.origin[self.image], self.origin[images])]).tolist()",
       "np.unique(images).tolist()")],
     "test_leaks.py::test_training_images_that_a_test_split_has_are_found_and_left_out"),
    ("a test split that was prepared anew is not compared again", "prepare/leaks.py",
     [('if holds and before["tests"].get(test) == checksum:', 'if holds and test in before["tests"]:')],
     "test_leaks.py::test_only_what_is_new_is_compared_and_no_shard_is_written_again"),
    # Flags
    ("an end that is out of a range is in it", "plumbing/flags.py",
     [("self.low <= value < self.high if", "self.low <= value <= self.high if")], RANGES),
    ("NaN is a finite number", "plumbing/flags.py",
     [('not abs(value) < float("inf")', 'abs(value) >= float("inf")')], RANGES),
    ("of a flag that is given twice the last counts", "plumbing/flags.py",
     [("        given.add(self.dest)\n", "")], RANGES),
    # Pixels
    ("the low byte of 16-bit colour is lost", "plumbing/pixels.py",
     [("        pixels |= np.asarray(", "        np.asarray(")],
     KINDS),
    ("16-bit grey is cut at 255", "plumbing/pixels.py",
     [('if image.mode.startswith(("I", "F")):', 'if image.mode.startswith("F"):')], KINDS),
    ("white stays zero in pixels of 16 bits", "plumbing/pixels.py",
     [("inverted = bool(tags) and tags[WHICH_IS_ZERO] == 0", "inverted = False")], KINDS),
    ("of several pages the first is taken", "plumbing/pixels.py",
     [("    if len(pages) > 1:\n        raise Unreadable(SEVERAL)\n    return", "    return")], KINDS),
    ("NaN counts in a percentile", "plumbing/pixels.py",
     [("    some = some[np.isfinite(some)]\n", "")], KINDS),
    ("the range of a large image is that of its first rows", "plumbing/pixels.py",
     [("(slice(None, None, round(step ** 0.5)),) * 2", "(slice(None, len(counted) // step),)")],
     "test_pixels.py::test_the_range_of_a_large_image_is_that_of_all_its_parts"),
    # Labels and patients
    ("a label that is not known is no finding", "prepare/listing.py",
     [("not (multi_label and not any(parts))", "not multi_label")],
     FOLDER + "test_beside_several_labels_an_empty_cell_is_no_finding_and_a_question_mark_is_none"),
    ("patients are divided", "prepare/folder.py",
     [("split_by_group(groups, [", "split_by_group(range(len(items)), [")],
     FOLDER + "test_a_patient_is_never_divided"),
    ("P7 and p7 are two patients", "prepare/listing.py",
     [("cells = [printable(cells[place]).casefold()", "cells = [printable(cells[place])")],
     FOLDER + "test_capitals_make_no_other_patient"),
    # What a run stands on
    ("a run goes on with other images", "plumbing/runs.py",
     [('differences(record["inputs"], inputs)',
       'differences(record["inputs"]["weights"], inputs["weights"])')],
     RUNS + "test_other_images_tokenizers_and_weights_are_refused_each"),
    ("a stage begins with another tokenizer's parts", "plumbing/sources.py",
     [('read_manifest(begun).get("inputs", {}).get("tokenizer") != tokenizer.sha256', "False")],
     RUNS + "test_a_start_with_another_tokenizer_is_refused"),
    ("a stage leaves out the adapter that it begins with", "train_vlm.py",
     [("        load_adapters(model, adapter)\n", "        pass\n")],
     RUNS + "test_a_stage_begins_with_a_run_a_checkpoint_or_somebody_s_adapter"),
    ("the projector trains at the vision part's rate", "train_vlm.py",
     [('"projector": config.projector_rate', '"projector": config.vision_rate')],
     RUNS + "test_vision_and_projector_have_learning_rates_of_their_own"),
    ("the held-out samples move with the seed", "data.py",
     [("keys = random_keys(0, 2 * index + HELD_OUT", "keys = random_keys(self.seed, 2 * index + HELD_OUT")],
     RUNS + "test_the_held_out_samples_do_not_move_with_the_seed"),
    ("more epochs are not in the record", "train_vlm.py",
     [('record["flags"] |= {name: getattr(config, name) for name in RESTATED}', "pass")],
     RUNS + "test_a_finished_run_goes_on_with_more_epochs_and_says_that_its_schedule_is_another"),
    ("what came to a record is no difference", "plumbing/files.py",
     [("sorted(before.keys() | now.keys(), key=str)", "sorted(before, key=str)")],
     RUNS + "test_differences_name_what_was_and_what_is"),
    ("other base weights are accepted", "plumbing/tensors.py",
     [("elif hash_weights(place) != sha256:", "elif hash_weights(place) is None:")],
     RUNS + "test_other_base_weights_of_the_same_sizes_are_refused"),
    ("weights without hashes of their own are known by their shapes", "plumbing/tensors.py",
     [('get("tensors", "{}")).keys() == tensors.keys()', 'get("tensors", "{}")).keys() <= tensors.keys()')],
     RUNS + "test_weights_are_known_by_every_number_and_setting"),
    ("a lock is held by several at once", "plumbing/files.py",
     [("hold(file, fcntl.LOCK_EX | fcntl.LOCK_NB if fcntl else 0)",
       "hold(file, fcntl.LOCK_SH | fcntl.LOCK_NB if fcntl else 0)")],
     "test_prepare.py::test_a_lock_is_one_s_alone_and_a_killed_process_s_is_nobody_s"),
    ("scans: MONOCHROME1 is not inverted", "formats/dicom.py", [("        shown = 255 - shown\n", "        pass\n")],
     "test_dicom.py::test_greys_follow_the_header"),
    ("scans: a window is as wide as it says, and not one less", "formats/windows.py",
     [("centre, width = centre - 0.5, width - 1", "pass")], "test_dicom.py::test_greys_follow_the_header"),
    ("scans: padding has a grey", "formats/dicom.py", [("    shown[padded] = 0\n", "")],
     "test_dicom.py::test_padding_is_black_and_gives_no_range"),
    ("scans: a mirrored slice stays mirrored", "formats/dicom.py",
     [("pixels = pixels[:, ::-1] if row @ right < 0 else pixels", "pass")],
     "test_dicom.py::test_slices_lie_as_they_are_shown"),
    ("scans: slices are in the order of their files", "formats/dicom.py",
     [("sorted(volume, key=lambda shot: shot.position)", "list(volume)")],
     "test_dicom.py::test_slices_are_in_the_order_of_position"),
    ("scans: a picture in another window is the same picture", "formats/frames.py",
     [("return repr((self.sha256, self.kind, self.place, self.window))",
       "return repr((self.sha256, self.kind, self.place))")], "test_dicom.py::test_bytes_and_other_processes"),
    ("own: a given split may divide a patient", "prepare/own_splits.py",
     [("        if before != split and group.startswith", "        if not before and group.startswith")],
     "test_own_splits.py::test_given_splits_are_kept_or_refused"),
    ("own: a patient's id stays in the names of pictures", "prepare/own_splits.py",
     [("    return re.sub(within, hashed, name", "    return re.sub(within, patient, name")],
     "test_own_private.py::test_no_planted_text_is_in_any_byte_that_was_written"),
    ("own: a study has the probabilities of its last picture", "tasks/encoders.py",
     [("probabilities[some].mean(0)", "probabilities[some[-1]]")],
     "test_cls_runs.py::test_slices_are_summed_up_by_study_and_patient_whose_names_are_hashed"),
    ("own: an answer's probability is that of its first token", "asking.py",
     [("math.exp(sum(answer.log_probabilities))", "math.exp(answer.log_probabilities[0])")],
     "test_asked.py::test_a_probability_is_that_of_exactly_this_answer"),
]


@dataclass(frozen=True)
class Config:
    only: str = ""  # mutants whose description has these words; none: all


def passes(tests, repository, shards=None, seconds=300):
    """Whether tests, or a campaign on these shards, pass in this copy; None if they ended in another way."""
    if shards:
        words = [f"extras/faults/{tests.split()[0]}", *tests.split()[1:], f"--shards_dir={shards}"]
    else:
        words = ["-m", "pytest", "-n0", "-x", "-q", "-p", "no:cacheprovider",
                 *(f"tests/{test}" for test in tests.split())]
    try:
        done = subprocess.run([sys.executable, *words], cwd=repository, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    return {0: True, 1: False}.get(done.returncode)


def copy_repository(folder):
    """A copy of what git knows of this repository."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=sys.path[0], check=True,
                           capture_output=True, text=True).stdout.splitlines()
    for name in names:
        if (Path(sys.path[0]) / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(Path(sys.path[0]) / name, folder / name)


def plant(what, text, changes):
    """A file's text with the bug in it. Raises UserError where the words are not there once."""
    for old, new in changes:
        if text.count(old) != 1:
            raise UserError(f"{what}: its file has {old!r} {text.count(old)} times")
        text = text.replace(old, new)
    return text


def main(config):
    begin, missed = time.perf_counter(), 0
    chosen = [mutant for mutant in MUTANTS if config.only in mutant[0]]
    if not chosen:
        raise UserError(f"--only={config.only}: in the description of no bug")
    tests = list(dict.fromkeys(mutant[3] for mutant in chosen))
    campaigns = [test for test in tests if "::" not in test]
    tests = " ".join(test for test in tests if "::" in test)
    print(f"{len(chosen)} bugs, about {-(-len(chosen) // 3)} minute(s) on one core; what finds them is first "
          "tried without any", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        copy, shards = Path(folder) / "repository", Path(folder) / "shards"
        copy_repository(copy)
        if campaigns:
            prepare(shards)
        for campaign in campaigns:
            if not passes(campaign, copy, shards):
                raise UserError(f"{campaign} does not even pass without a bug")
        if tests and not passes(tests, copy, seconds=3600):
            raise UserError(f"one of {tests} does not even pass without a bug")
        for number, (what, name, changes, test) in enumerate(chosen, start=1):
            print(f"{number:2} of {len(chosen)}  {what}, by {test}: ", end="", flush=True)
            original = (copy / name).read_text()
            (copy / name).write_text(plant(what, original, changes))
            failure = passes(test, copy, None if "::" in test else shards) is False
            missed += not failure
            print("found" if failure else "MISSED", flush=True)
            (copy / name).write_text(original)
    print(f"{len(chosen) - missed} of {len(chosen)} bugs found, in {time.perf_counter() - begin:.0f} s")
    if missed:
        sys.exit(1)


if __name__ == "__main__":
    run(main, parse_command_line(Config))
