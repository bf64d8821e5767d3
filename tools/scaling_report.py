"""A page of runs and figures: the command `crnet report` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("report", __file__)

if __name__ == "__main__":
    main.start()
