"""`python -m megatron_crnet` is `crnet`, for launchers that start a module."""

from megatron_crnet.cli.main import start

if __name__ == "__main__":
    start()
