from types import SimpleNamespace

from nanochat.planning import report


def at_start(config, model, horizon, micro_batches, device_name, world_size, device, dtype):
    place = SimpleNamespace(device=device, name=device_name, ranks=SimpleNamespace(world_size=world_size))
    return report.at_start(config, model, horizon, micro_batches, place, dtype)
