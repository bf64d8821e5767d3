"""What a run does beside its steps: each file one idea, each hook a name of `base.Callback`."""
