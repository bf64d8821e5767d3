"""Count what is sent: the command `crnet measure-communication` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("measure-communication", __file__)

if __name__ == "__main__":
    main.start()
