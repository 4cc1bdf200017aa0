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
    dist.all_gather_object(errors, error)
    told = [text for text in errors if text is not None]
    if told and dist.get_rank() == 0:
        raise UserError(told[0])
    if told:
        sys.exit(2)
    return result
