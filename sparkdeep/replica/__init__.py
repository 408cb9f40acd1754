"""TODO: one sentence, and the files below."""
