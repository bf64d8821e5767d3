"""CR-Net as a library: a model built, trained ten steps, exported to Hugging Face, continued.

python library_use.py runs/library
"""

import json
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM

import megatron_crnet as crnet

folder, text = Path(sys.argv[1]), Path(json.__file__).parent  # any folder of text
folder.mkdir(parents=True, exist_ok=True)
tokenizer = crnet.train_tokenizer([text], folder / "tokenizer", vocab_size=512)
crnet.preprocess([text], folder / "text", tokenizer)

sizes = {"num_layers": 4, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 4, "vocab_size": 512}
values = {
    "model": {"variant": "crnet", "rank": 16, **sizes},
    "data": {"train_data_path": [str(folder / "text")], "tokenizer_model": str(tokenizer)},
    "training": {"train_steps": 10, "micro_batch_size": 4, "global_batch_size": 8, "seq_length": 64, "eval_steps": 0},
    "optimizer": {"lr": 0.005, "lr_warmup_steps": 2},
}
first = crnet.train(crnet.load_config(values, [f"--logging.output_dir={folder / 'first'}"]))

export = crnet.to_hf(folder / "first", folder / "export")
model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
print(f"{model.num_parameters():,} parameters, loss {first.train_loss:.3f} nats per token after step {first.step}")
print(crnet.generate(crnet.load_pretrained(export), ["def "], max_new_tokens=16)[0].text)

second = folder / "second"
crnet.from_hf(export, second / "checkpoints")
print(crnet.train(crnet.load_config(values, [f"--logging.output_dir={second}", "--training.train_steps=20"])))
