"""A disk that takes nothing more: in the place of whatever writes."""

import errno


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")
