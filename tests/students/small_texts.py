"""The texts and sizes that tests of students share."""

WORDS = ["a", "small", "large", "red", "blue", "ring", "square", "left", "of", "right", "dog", "runs", "two"]
WORDS += ["men", "boat", "in", "very", "long", "the"]
TEXTS = ["a small red ring", "dog", "two men in a very long boat left of the large blue square"]
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
N_IMAGES, N_TEXTS = 16, 20  # of a step
