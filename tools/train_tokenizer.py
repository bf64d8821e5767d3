"""Train a tokenizer: the command `crnet tokenizer` by the name of a file."""

from megatron_crnet.cli.main import Door

main = Door("tokenizer", __file__)

if __name__ == "__main__":
    main.start()
