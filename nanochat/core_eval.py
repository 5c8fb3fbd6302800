"""Download CORE's tasks into the cache folder: python -m nanochat.core_eval"""

import argparse

from nanochat.errors import command
from nanochat.evaluation.core_bundle import download_bundle


def parse_args(argv=None):
    return argparse.ArgumentParser(prog="python -m nanochat.core_eval", description=__doc__).parse_args(argv)


@command
def main(argv=None):
    parse_args(argv)
    print(f"CORE's tasks are in {download_bundle()}")


if __name__ == "__main__":
    main()
