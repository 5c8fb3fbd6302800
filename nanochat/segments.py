"""A run's segments: its start and every resume, each with what computed it, and what changed from one to the next.

The first is described in config.json, the others by their `resume` events, under the same names. A segment is a dict:
`first_step`, `flags`, `git_commit`, `git_dirty`, `versions`, `device` (with host, compute dtype and number of ranks).
"""

_NAMES = ("flags", "git_commit", "git_dirty", "versions", "device")


def segments_of(record):
    """The segments of a RunRecord that are part of its trajectory, in order; `rollback` says why, where one is."""
    first = {name: record.config.get(name) for name in _NAMES}
    found = [{**first, "first_step": 0}, *({**event, "first_step": event["step"]} for event in record.of("resume"))]
    return [one for one, after in zip(found, [*found[1:], None], strict=True)
            if after is None or after["first_step"] > one["first_step"]]  # else nothing of it was kept


def changes(before, now, flags):
    """[(name, was, is)] of what changes a run's numbers from one segment to another: machine and versions, and those of
    `flags`. What either does not say counts as equal."""
    was, is_now = (_numbers(segment, flags) for segment in (before, now))
    return [(name, was[name], is_now[name]) for name in was
            if None not in (was[name], is_now.get(name)) and was[name] != is_now[name]]


def in_words(changed):
    """`changes` for a message: name was X, is Y; ..."""
    return "; ".join(f"{name} was {was}, is {now}" for name, was, now in changed)


def part_of(values, name):
    """The dict of that name in a dict, or an empty one where there is none."""
    value = values.get(name)
    return value if isinstance(value, dict) else {}


def _numbers(segment, flags):
    """Not the commit: most change nothing, and a mended one may be why a run is resumed. Nor the number of ranks, whose
    sums differ by rounding alone: a preemptible job gets what there is."""
    device, versions, given = (part_of(segment, name) for name in ("device", "versions", "flags"))
    return {"device": device.get("name"), "compute_dtype": device.get("compute_dtype"),
            "triton_interpreted": device.get("triton_interpreted"),
            **{package: versions.get(package) for package in ("torch", "triton")},
            **{f"--{name.replace('_', '-')}": given.get(name) for name in flags}}
