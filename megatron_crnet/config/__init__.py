"""What a run is: every field typed, checked and resolved once, before anything is built.

In: YAML files and command lines.
Out: One frozen `Config`; the table of positions and ranks; DeepSpeed's JSON; Megatron-Core's `TransformerConfig`.
May import: utils.
Start with schema.py, then positions.py and loading.py.
"""
