"""What torchrun's processes do in step: a mistake that one of them meets ends all, with one line."""

import sys

import torch.distributed as dist

from plumbing.flags import UserError


def together(work):
    """
    What work() returns on this process. Where it raises UserError or OSError on any of torchrun's
    processes, it ends all of them: the first process raises the first error, the others leave silently.
    """
    if not dist.is_initialized():
        return work()
    result, error = None, None
    try:
        result = work()
    except (UserError, OSError) as caught:
        error = str(caught)
    errors = [None] * dist.get_world_size()
    try:
        dist.all_gather_object(errors, error)
    except RuntimeError:  # another process has ended, and has said why
        if error is not None:
            raise UserError(error) from None
        sys.exit(2)
    told = [text for text in errors if text is not None]
    if told and dist.get_rank() == 0:
        raise UserError(told[0])
    if told:
        sys.exit(2)
    return result


def agree(decide):
    """What decide() returns on the first process, for all of them; an error of it ends all."""
    if not dist.is_initialized():
        return decide()
    decided = [together(lambda: decide() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(decided)
    return decided[0]
